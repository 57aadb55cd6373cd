"""DeepSpeed engines of all ZeRO stages, compressed: what DeepSpeed promises holds, however it is set up."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import RANKS, engine, rows, same_on_all_ranks, train, weights
from ranks import run
from tiers import slow
from torch import Tensor, nn
from training import CLASSES, INPUTS, WIDTH, network, same

import commpress
from commpress.comm.collectives import MEAN, Collectives
from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.joining import timeout_of
from commpress.comm.plan import FEWEST_VALUES, Override, Plan
from commpress.comm.segments import Segment
from commpress.hooks.deepspeed import attach
from commpress.optim.sharded_one_bit import Shift, shifted

LIBRARIES = ("engines",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

STEPS, FIRST = 14, 4
VALUES = 6922
"""Parameters of the network."""
PARTITION = 2308
"""Of ZeRO 1 and 2 on three ranks; the last has two values that are no parameter."""
NOISE = 0.06
"""Between final losses (mean of the last eight): seeds and bucket sizes alone make half of it."""


def frozen() -> nn.Module:
    """A network whose middle layer is not trained."""
    model = network()
    model[2].requires_grad_(False)
    return model


SMALL = {"reduce_bucket_size": 3000}
SETUPS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 0, bf16": {"stage": 0, "bf16": {"enabled": True}},
    "ZeRO 0, accumulated": {"stage": 0, "gradient_accumulation_steps": 2},
    "ZeRO 0, frozen": {"stage": 0, "model": frozen},
    "ZeRO 1": {"stage": 1},
    "ZeRO 1, several buckets": {"stage": 1, "zero": SMALL},
    "ZeRO 1, gradients apart": {"stage": 1, "zero": {**SMALL, "contiguous_gradients": False}},
    "ZeRO 1, accumulated": {"stage": 1, "gradient_accumulation_steps": 2},
    "ZeRO 2": {"stage": 2},
    "ZeRO 2, overlapped": {"stage": 2, "zero": {**SMALL, "overlap_comm": True}},
    "ZeRO 2, without reduce_scatter": {"stage": 2, "zero": {**SMALL, "reduce_scatter": False}},
    "ZeRO 2, round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "ZeRO 2, to owners": {"stage": 2, "zero": {**SMALL, "use_multi_rank_bucket_allreduce": False}},
    "ZeRO 2, aligned": {"stage": 2, "zero": {"parameter_alignment": True}},
    "ZeRO 2, accumulated": {"stage": 2, "gradient_accumulation_steps": 2},
    "ZeRO 2, frozen": {"stage": 2, "model": frozen},
    "ZeRO 2, bf16": {"stage": 2, "bf16": {"enabled": True}},
    "ZeRO 2, bf16 into float32": {
        "stage": 2,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero": SMALL,
    },
    "ZeRO 3": {"stage": 3},
    "ZeRO 3, several buckets": {"stage": 3, "zero": {**SMALL, "overlap_comm": True}},
    "ZeRO 3, without reduce_scatter": {"stage": 3, "zero": {**SMALL, "reduce_scatter": False}},
    "ZeRO 3, accumulated": {"stage": 3, "gradient_accumulation_steps": 2},
    "ZeRO 3, frozen": {"stage": 3, "model": frozen},
    "ZeRO 3, bf16": {"stage": 3, "bf16": {"enabled": True}},
}


def final(losses: list[float]) -> float:
    """The mean over all ranks of the last eight."""
    mean = torch.tensor(losses[-8:]).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def compressed_and_plain(names: list[str]) -> list[dict[str, Any]]:
    """Train these setups by int4 gradients and int8 parameters, and some steps plain and by `none`.

    Plain losses are those of the first setup that differs by nothing but what DeepSpeed sends when.
    """
    found = []
    plain_losses: dict[str, float] = {}
    for name in names:
        setup = SETUPS[name]
        plain, none, coded = engine(**setup), engine(**setup), engine(**setup)
        exact = attach(none, "none")
        session = attach(coded, "int4", **({"parameters": "int8"} if setup["stage"] else {}))
        for e in (plain, none):
            train(e, range(FIRST))
        is_plain = same(weights(plain), weights(none))
        kind = repr({key: setup[key] for key in sorted(setup) if key not in ("stage", "zero")})
        if kind not in plain_losses:
            plain_losses[kind] = final(train(plain, range(FIRST, STEPS)))
        losses = [plain_losses[kind], final(train(coded, range(STEPS)))]
        trained = weights(coded)
        kept = all(bool(t.isfinite().all()) for t in trained)
        unchanged = same(trained[2:4], [p.to(trained[2].dtype) for p in list(network().parameters())[2:4]])
        found.append(
            {
                "name": name,
                "losses": losses,
                "none is plain": is_plain,
                "replicas agree": same_on_all_ranks(trained) and kept,
                "frozen kept": unchanged or setup.get("model") is not frozen,
                "none": exact.report().to_dict(),
                "coded": session.report().to_dict(),
            }
        )
    return found


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), slow(3)])
def test_training_is_deepspeeds_own(stage: int) -> None:
    names = [name for name, setup in SETUPS.items() if setup["stage"] == stage]
    for ranks in zip(*run(RANKS, compressed_and_plain, names, timeout=240), strict=True):
        for found in ranks:
            name, losses = found["name"], found["losses"]
            assert found["none is plain"], name
            assert found["replicas agree"], name
            assert found["frozen kept"], name
            assert abs(losses[1] - losses[0]) < NOISE, (name, losses)
            assert losses[0] < 2.1, (name, losses)  # it has learned something: the first loss is 2.4
            none, coded = found["none"], found["coded"]
            assert none["dense_bytes"] == none["sent_bytes"] > 0, name
            assert {row["reason"] for row in none["rows"]} == {"spec is none"}, name
            least = 3 if "bf16" not in name else 2
            assert coded["ratio"] > least, (name, coded["ratio"])
            for row in coded["rows"]:
                small = row["values"] < 256 * RANKS or "read as a whole" in row["reason"]
                assert (row["reason"] == "") or small, (name, row)


# --- bytes -------------------------------------------------------------------------------------------------------


def bytes_of(stage: int, gradients: str, parameters: str | None) -> tuple[int, int, int, int]:
    """Sent and dense bytes of gradients, then of parameters, in ten steps."""
    e = engine(stage)
    session = attach(e, gradients, parameters=parameters)
    train(e, range(10))
    return tuple(  # type: ignore[return-value]
        sum(getattr(row, kind) for row in rows(session, role))
        for role in ("gradients", "parameters")
        for kind in ("sent_bytes", "dense_bytes")
    )


def test_zero_1_and_2_send_each_part_once() -> None:
    int4, sign = commpress.parse("int4"), commpress.parse("sign")
    for stage in (1, 2):
        of_ranks = run(RANKS, bytes_of, stage, "int4", "sign", timeout=120)
        for rank, (sent, dense, sent_parameters, dense_parameters) in enumerate(of_ranks):
            parts = [PARTITION, PARTITION, VALUES - 2 * PARTITION]
            assert sent == 10 * sum(int4.nbytes(n) for owner, n in enumerate(parts) if owner != rank)
            assert dense == 10 * sum(4 * n for owner, n in enumerate(parts) if owner != rank)
            assert sent_parameters == 10 * 2 * sign.nbytes(PARTITION)
            assert dense_parameters == 10 * 2 * 4 * PARTITION


def test_zero_0_and_3_send_what_the_spec_says() -> None:
    int4, int8 = commpress.parse("int4"), commpress.parse("int8")
    cuts = chunk_bounds(VALUES, RANKS, int4.granularity)
    chunks = [int4.nbytes(stop - start) for start, stop in itertools.pairwise(cuts)]
    for rank, (sent, dense, *none) in enumerate(run(RANKS, bytes_of, 0, "int4", None)):
        assert sent == 10 * (sum(chunks) - chunks[rank] + 2 * chunks[rank])  # two shots
        assert dense == 10 * ring_bytes(4 * VALUES, RANKS)
        assert none == [0, 0]
    gathers = 11  # a step gathers once for forward and backward; the first one, without a trace, once more
    small = [-(-n // RANKS) for n in (WIDTH, WIDTH, CLASSES)]
    large = [-(-n // RANKS) for n in (INPUTS * WIDTH, WIDTH * WIDTH, WIDTH * CLASSES)]
    assert large[-1] < FEWEST_VALUES  # a part of the last layer
    exact = sum(small) + large.pop()
    for sent, dense, sent_parameters, dense_parameters in run(RANKS, bytes_of, 3, "int4", "int8"):
        assert sent == 10 * 2 * int4.nbytes(exact + sum(large))
        assert dense == 10 * 2 * 4 * (exact + sum(large))  # what a reduce-scatter must send; Gloo's sends twice that
        assert sent_parameters == gathers * 2 * (sum(int8.nbytes(n) for n in large) + 4 * exact)
        assert dense_parameters == gathers * 2 * 4 * (sum(large) + exact)


# --- what is withheld is sent later ------------------------------------------------------------------------------


def owners_sum(cuts: list[int], known: bool) -> list[float]:
    """By how much the sums of means and of what was sent differ: with what memory holds, and without.

    With `known`, something that all ranks know is coded along.
    """
    rank, W = dist.get_rank(), dist.get_world_size()
    plan = Plan.of("sign", None, True)
    owners = Collectives(dist.distributed_c10d._get_default_group(), torch.device("cpu"), plan, Plan.of("none"))
    n = cuts[-1]
    override = Override(plan.codec)
    mine = slice(cuts[rank], cuts[rank + 1])
    true, sent = torch.zeros(n), torch.zeros(n)
    for step in range(8):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(n, generator=generator)
        total = x.clone()
        dist.all_reduce(total)
        true += total / W
        choice = plan.choose(n, 4, W, override)
        every = torch.randn(n, generator=torch.Generator().manual_seed(step)).bfloat16()
        along = [Shift(a, every[a:b], 0.9) for a, b in itertools.pairwise(cuts) if b > a] if known else []
        owners.reduce_scatter(
            *(x, x[mine], (Segment("p", n),), 0, MEAN),
            cuts=cuts,
            plan=choice,
            override=shifted(override, along, mine),
        ).wait()
        sent[mine] += x[mine]
    kept = owners.feedback.memories[(Segment("p", n),)].residual
    assert kept is not None
    held = kept.clone()
    dist.all_reduce(held)
    lost, accounted = (true - sent)[mine], (true - sent - held / W)[mine]
    return [float(t.abs().max()) if t.numel() else 0.0 for t in (lost, accounted)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("cuts", [[0, 700, 1400, 2100], [0, 0, 1500, 1501], [0, 3000, 3000, 3000]])
def test_nothing_is_lost_on_the_way_to_owners(cuts: list[int], known: bool) -> None:
    found = run(RANKS, owners_sum, cuts, known)
    assert max(lost for lost, _ in found) > 0.1
    assert max(accounted for _, accounted in found) < 1e-4


def replicas_catch_up(spec: str) -> list[float]:
    """How far the parameters that all compute with are from the exact ones, while the optimizer stands still."""
    e = engine(1)
    attach(e, "int4", parameters=spec)
    train(e, range(10))
    zero = e.optimizer
    distances = []
    for group in e.basic_optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(50):
        mine = zero.parallel_partitioned_bit16_groups[0][dist.get_rank()]
        distances.append(float((mine - zero.single_partition_of_fp32_groups[0].detach()).norm()))
        train(e, [step])
    return distances


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sign", "topk(0.1)|int8"])
def test_replicas_reach_the_exact_parameters(spec: str) -> None:
    for distances in run(RANKS, replicas_catch_up, spec, timeout=120):
        assert distances[0] > 0.1
        assert distances[-1] < 0.1 * distances[0]


# --- what ZeRO 3 computes with -----------------------------------------------------------------------------------


class Watched(nn.Linear):
    """A layer that keeps what it computed with."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.weight.detach().clone()
        return super().forward(x)


def watched() -> nn.Module:
    """Three layers, of which the middle one is watched."""
    model = network()
    model[2] = Watched(WIDTH, WIDTH)
    with torch.no_grad():
        model[2].weight.copy_(network()[2].weight)
        model[2].bias.copy_(network()[2].bias)
    return model


def computed_with() -> list[Any]:
    """The exact weight, and what forward saw: at first, in a later pass of the same step, and without a gradient."""
    e = engine(3, {"stage3_prefetch_bucket_size": 10_000}, model=watched)
    attach(e, "int4", parameters="int8")
    train(e, range(3))
    if dist.get_rank() == RANKS - 1:
        e.module[2].weight.ds_tensor[-2:] = torch.nan  # what pads it, which DeepSpeed never writes
    exact, seen = weights(e)[2], []
    for _ in range(3):
        e(torch.ones(2, INPUTS)).sum().backward()  # no step: the parameters stay
        seen.append(e.module[2].seen)
    with torch.no_grad():
        e(torch.ones(2, INPUTS))
    seen.append(e.module[2].seen)  # before it is gathered again, to be read
    return [exact, weights(e)[2], *seen]


def test_zero_3_computes_with_what_was_decoded() -> None:
    of_ranks = run(RANKS, computed_with)
    exact, read, *seen = of_ranks[0]
    assert torch.equal(exact, read)
    codec, size = commpress.parse("int8"), -(-WIDTH * WIDTH // RANKS)
    padded = nn.functional.pad(exact.view(-1), (0, RANKS * size - exact.numel()))
    parts = [codec.decode(codec.encode(part), size) for part in padded.split(size)]
    decoded = torch.cat(parts)[: exact.numel()]
    assert all(torch.equal(weight.view(-1), decoded) for weight in seen)
    assert not torch.equal(exact.view(-1), decoded)
    assert all(same(of_rank, of_ranks[0]) for of_rank in of_ranks)


def waited(stage: int) -> list[float]:
    """Seconds that the engine's group may take, before and after the attach, and those of the user's."""
    made = engine(stage)
    group, default = made.seq_data_parallel_group, dist.distributed_c10d._get_default_group()
    CPU = torch.device("cpu")
    found = [timeout_of(group, CPU)]
    attach(made, "int4")
    found += [timeout_of(group, CPU), timeout_of(default, CPU)]
    return [seconds.total_seconds() for seconds in found if seconds is not None]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nobody_waits_longer_than_the_user_said(stage: int) -> None:
    for before, after, users in run(2, waited, stage, group_timeout=12):
        assert before in (12.0, 1800.0)  # DeepSpeed makes its groups with torch's default
        assert after == users == 12.0
