"""Compressed optimizers under DeepSpeed at ZeRO 0, 1 and 2: as under DDP, and OneBitAdamW sharded."""

import contextlib
import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import RANKS, adamw, engine, rows, same_on_all_ranks, train, weights
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import CLASSES, INPUTS, batch, network, same
from training import train as train_ddp

from commpress.hooks.ddp import attach as ddp_attach
from commpress.hooks.deepspeed import attach, initialize
from commpress.optim import DGC, OneBitAdamW, ZeroOneAdamW
from commpress.optim.sharded_one_bit import ShardedOneBitAdamW

LIBRARIES = ("engines",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

STEPS, WARM = 28, 8
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def one_bit(parameters: Iterable[Tensor], **settings: Any) -> OneBitAdamW:
    """OneBitAdamW with a short warm-up."""
    return OneBitAdamW(parameters, lr=1e-2, **{"warmup_steps": WARM, **settings})  # type: ignore[arg-type]


def in_groups(parameters: Iterable[Tensor], **settings: Any) -> OneBitAdamW:
    """Vectors without weight decay, as is usual."""
    alike: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in parameters:
        alike[p.dim() > 1].append(p)
    groups = [{"params": alike[True]}, {"params": alike[False], "weight_decay": 0.0}]
    return one_bit(groups, **settings)  # type: ignore[arg-type]


def coded_warm_up(parameters: Iterable[Tensor]) -> OneBitAdamW:
    """Gradients by int4 in the warm-up, the test's short one."""
    return one_bit(parameters, warmup_spec="int4", warmup_steps=3)


def final(losses: list[float]) -> float:
    """The mean over all ranks of the last ten."""
    mean = torch.tensor(losses[-10:]).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


SHARDED = "sharded"
SETUPS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1, groups": {"stage": 1, "optimizer": in_groups},
    "ZeRO 2": {"stage": 2},
    "ZeRO 1, sharded": {"stage": 1},
    "ZeRO 1, groups, sharded": {"stage": 1, "optimizer": in_groups},
    "ZeRO 2, sharded": {"stage": 2, "zero": {"reduce_bucket_size": 3000}},
    "ZeRO 2, bf16, sharded": {"stage": 2, "bf16": {"enabled": True}},
    "ZeRO 2, accumulated, sharded": {"stage": 2, "gradient_accumulation_steps": 2},
}


def trained(names: list[str]) -> list[dict[str, Any]]:
    """OneBitAdamW by `sign` in each of these setups, and AdamW by DeepSpeed itself for as many batches, at ZeRO 0."""
    found = []
    settings = {STEPS: {}, 2 * STEPS: {"gradient_accumulation_steps": 2}}
    dense = {steps: final(train(engine(0, **accumulated), range(steps))) for steps, accumulated in settings.items()}
    for name in names:
        setup = {"optimizer": one_bit, **SETUPS[name]}
        steps = range(STEPS * setup.get("gradient_accumulation_steps", 1))
        coded = engine(**setup)
        session = attach(coded, "sign", parameters="sign" if SHARDED in name else None)
        losses = [dense[len(steps)], final(train(coded, steps))]
        optimizer = coded.basic_optimizer
        held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        found.append(
            {
                "name": name,
                "losses": losses,
                "agree": same_on_all_ranks(weights(coded)),
                "frozen at": optimizer.param_groups[0]["frozen_at"],
                "held": held,
                "how": {(row.role, row.spec, row.reason, row.steps) for row in session.report().rows},
            }
        )
    return found


@pytest.mark.slow
def test_one_bit_adamw_trains_at_every_stage_that_it_knows() -> None:
    for ranks in zip(*run(RANKS, trained, list(SETUPS), timeout=240), strict=True):
        for found in ranks:
            name, (dense, coded) = found["name"], found["losses"]
            assert found["agree"], name
            assert found["frozen at"] == WARM, name
            assert coded < dense + 0.15, (name, dense, coded)
            if SHARDED in name:  # n, what is known of it, d and a step, each of a third
                assert found["held"] < 3.1 * 2310, (name, found["held"])
            sent = {(role, spec) for role, spec, reason, _ in found["how"] if not reason}
            roles = ("gradients", "parameters") if SHARDED in name else ("gradients",)
            assert sent == {(role, "sign") for role in roles}, (name, sent)
            reasons = {reason for _, _, reason, _ in found["how"]} - {"", "fewer than 256 values"}
            once = {"the variance, once, when it stands", "what is known of the momentum, after a start"}
            once = once if SHARDED in name else set()
            assert reasons == {"the variance warms up"} | once, name
            assert all(steps == 1 for _, _, reason, steps in found["how"] if reason in once), name


def same_steps() -> list[float]:
    """By how much ZeRO 1 and 2 differ from ZeRO 0 where nothing is rounded away."""
    flat = []
    for stage, zero in ((0, {}), (1, {}), (2, {"reduce_bucket_size": 3000})):
        e = engine(stage, zero, optimizer=in_groups)
        # payloads that would be no smaller: means are exact
        attach(e, "topk(1)", parameters="topk(1)" if stage else None)
        train(e, range(WARM + 10))
        flat.append(torch.cat([p.view(-1) for p in weights(e)]))
    start = torch.cat([p.detach().view(-1) for p in network().parameters()])
    return [float((other - flat[0]).norm() / (flat[0] - start).norm()) for other in flat[1:]]


@pytest.mark.slow
def test_partitions_step_as_replicas_do() -> None:
    for differences in run(RANKS, same_steps, timeout=120):
        assert all(difference < 1e-3 for difference in differences), differences


def what_is_known() -> tuple[list[float], list[float], float]:
    """How near each rank's part of what all know of the momentum is to it: the cosine, by group. The most that is known after a
    step at next to no rate, in which the differences are what was withheld; and the loss that follows."""
    e = engine(2, optimizer=in_groups, zero={"reduce_bucket_size": 3000})
    session = attach(e, "sign", parameters="int8")
    assert "OneBitAdamW is sent its own values" in outcome(lambda: session.send_dense(True))
    train(e, range(WARM + 10))
    states = [s for s in e.basic_optimizer.state.values() if s["known"].numel()]
    cosines = [float(torch.cosine_similarity(s["known"], s["exp_avg"], dim=0)) for s in states]
    groups = e.basic_optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 1e-9
    train(e, [WARM + 10])
    most = [float((s["known"] / groups[0]["unit"]).abs().max()) for s in states]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return cosines, most, final(train(e, range(WARM + 11, WARM + 41)))


@pytest.mark.slow
def test_all_learn_the_momentum_from_the_steps_of_its_owners() -> None:
    for cosines, most, loss in run(RANKS, what_is_known):
        assert len(cosines) == 2
        assert all(cosine > 0.98 for cosine in cosines)
        assert all(k <= 1 for k in most)
        assert loss < 1


def coded_along(**settings: Any) -> tuple[int, int]:
    """Steps behind the warm-up, and how many buckets were coded with what is known in them."""
    e = engine(2, optimizer=lambda p: one_bit(p, warmup_steps=2), **settings)
    attach(e, "sign", parameters="int8")
    known, calls = ShardedOneBitAdamW.shifts, 0

    def counted(self: ShardedOneBitAdamW, layout: Any) -> list[Any]:
        nonlocal calls
        found = known(self, layout)
        calls += bool(found)
        return found

    ShardedOneBitAdamW.shifts = counted  # type: ignore[method-assign]
    try:
        train(e, range(6 * settings.get("gradient_accumulation_steps", 1)))
    finally:
        ShardedOneBitAdamW.shifts = known  # type: ignore[method-assign]
    return e.basic_optimizer.param_groups[0]["steps"] - 2, calls


@pytest.mark.parametrize("settings", [
    {}, slow({"managed_gradient_accumulation": False}), slow({"gradient_accumulation_steps": 2}),
])  # fmt: skip
def test_what_is_known_is_coded_along_once_a_step(settings: dict[str, Any]) -> None:
    for steps, calls in run(RANKS, partial(coded_along, **settings)):
        assert steps == calls == 4  # all parameters are in one bucket


def settled() -> list[tuple[int, float]]:
    """When the variance has settled by the paper's test, and its sum then, at ZeRO 0 and 1."""
    found = []
    for stage in (0, 1):
        e = engine(stage, optimizer=lambda p: OneBitAdamW(p, lr=1e-6, betas=(0.9, 0.9)))
        attach(e, "sign", parameters="sign" if stage else None)
        train(e, [0] * 42)  # one batch, so that the variance becomes a constant
        group = e.basic_optimizer.param_groups[0]
        found.append((group["frozen_at"], group["variance"]))
    return found


@pytest.mark.slow
def test_the_variance_settles_on_all_ranks_at_once() -> None:
    of_ranks = run(RANKS, settled, timeout=120)
    for (replicas, whole), (partitions, together) in of_ranks:
        assert replicas == partitions == 40  # the sums at 30 and 40 steps are the first that differ by less than 4 %
        assert together == pytest.approx(whole, rel=1e-3)


def clipped(stage: int, parameters: str | None) -> tuple[float, float]:
    """Norms of one step's update under a tiny `gradient_clipping`, in the warm-up and after it; SGD-like, by a huge eps."""
    e = engine(stage, optimizer=lambda p: one_bit(p, warmup_steps=2, eps=1e3, weight_decay=0.0), gradient_clipping=1e-3)
    attach(e, "int8", parameters=parameters)
    moved = []
    for step in range(6):
        before = weights(e)
        train(e, [step])
        moved.append(sum(float((a - b).square().sum()) for a, b in zip(before, weights(e), strict=True)) ** 0.5)
    return moved[0], moved[-1]


@pytest.mark.parametrize(("stage", "parameters"), [slow(0, None), (2, None), slow(2, "int8")])
def test_clipping_ends_with_the_warm_up(stage: int, parameters: str | None) -> None:
    for first, last in run(RANKS, clipped, stage, parameters):
        assert first < 1.01 * 1e-2 * 1e-3 / 1e3  # lr * clip / eps
        assert last > 100 * first


# --- the others --------------------------------------------------------------------------------------------------


def zero_one(parameters: Iterable[Tensor], **settings: Any) -> ZeroOneAdamW:
    """ZeroOneAdamW with a short warm-up."""
    return ZeroOneAdamW(parameters, lr=1e-2, **{"warmup_steps": WARM, "sync_every": 4, **settings})  # type: ignore[arg-type]


def dgc(parameters: Iterable[Tensor], **settings: Any) -> DGC:
    """DGC that sends what is clipped to a norm."""
    return DGC(parameters, lr=0.1, **{"max_norm": 5.0, **settings})  # type: ignore[arg-type]


def others() -> list[Any]:
    """ZeroOneAdamW and DGC at ZeRO 0, 1 and 2: how they go and what they leave after some steps, what they learn at ZeRO 0."""
    found = []
    first, rest = range(WARM + 13), range(WARM + 13, WARM + 45)  # the last of each is a local step
    for stage in range(3):
        e = engine(stage, optimizer=zero_one, gradient_clipping=0.1)
        session = attach(e, "sign")
        train(e, first)
        left = weights(e)
        loss = final(train(e, rest)) if stage == 0 else None
        drifted, kept = same_on_all_ranks(weights(e)), {row.how for row in rows(session, "gradients")}
        with e.basic_optimizer.synced():
            found.append((loss, drifted, same_on_all_ranks(weights(e)), kept, rows(session, "parameters"), left))
        e = engine(stage, optimizer=dgc)
        session = attach(e, "topk(0.1)|int4")
        train(e, first)
        left = weights(e)
        loss = final(train(e, rest)) if stage == 0 else None
        found.append((loss, same_on_all_ranks(weights(e)), session.report().ratio, left))
    return found


@pytest.mark.slow
def test_zero_one_adamw_and_dgc_at_zero_0_to_2() -> None:
    for found in run(RANKS, others, timeout=120):
        assert found[0][0] < 0.9
        assert found[1][0] < 1.6
        for (_, drifted, synced, how, parameters, left), (_, agree, ratio, left_by_dgc) in zip(
            found[::2], found[1::2], strict=True
        ):
            assert not drifted
            assert synced
            assert "not sent: a local step" in how
            assert not parameters
            assert agree
            assert ratio > 15
            assert same(left, found[0][-1])
            assert same(left_by_dgc, found[1][-1])


def one_bit_at_all_stages() -> list[bool]:
    """Whether OneBitAdamW leaves the bits of ZeRO 0 at ZeRO 1 and 2, in groups, after a coded warm-up."""
    left = []
    for stage in range(3):
        e = engine(stage, optimizer=lambda p: in_groups(p, warmup_steps=5, warmup_spec="int8"))
        attach(e, "sign")
        train(e, range(20))
        left.append(weights(e))
    return [same(left[0], other) for other in left[1:]]


def test_one_bit_adamw_is_the_same_at_zero_0_to_2() -> None:
    assert all(equal == [True, True] for equal in run(RANKS, one_bit_at_all_stages))


def matrix() -> nn.Module:
    """A model of one parameter: DDP and an engine send it in the same order."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(INPUTS, CLASSES, bias=False)


MADE: dict[str, tuple[Make, str]] = {
    "OneBitAdamW": (lambda p: one_bit(p, warmup_steps=5, max_norm=0.1), "sign"),
    "OneBitAdamW, settled": (lambda p: one_bit(p, warmup_steps=None, betas=(0.9, 0.8), warmup_spec="int8"), "int4"),
    "ZeroOneAdamW": (lambda p: zero_one(p, warmup_steps=5, sync_every=3, max_norm=0.1), "sign"),
    "ZeroOneAdamW, refreshed": (lambda p: zero_one(p, warmup_steps=5, warmup_spec="int8", refresh_every=4), "int4"),
    "DGC": (lambda p: dgc(p, max_norm=0.1, weight_decay=0.01), "topk(0.1)"),
}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 2, overlapped": {"stage": 2, "zero": {"overlap_comm": True, "reduce_bucket_size": 100}},
}


def by_ddp_and_engines() -> list[tuple[str, str, bool]]:
    """Each of these on one matrix, after 15 steps: whether an engine leaves the bits that DDP leaves."""
    found = []
    for name, (make, spec) in MADE.items():
        ddp = DistributedDataParallel(matrix())
        optimizer = make(ddp.parameters())
        ddp_attach(ddp, spec, optimizer=optimizer)  # type: ignore[arg-type]
        steps = range(40 if "settled" in name else 15)
        under_ddp = train_ddp(ddp, steps, optimizer=optimizer).parameters
        assert optimizer.param_groups[0].get("frozen_at", 1) in range(1, 30)
        for way, setup in ENGINES.items():
            e = engine(**setup, optimizer=make, model=matrix, gradient_clipping=0.0)
            attach(e, spec)
            train(e, steps)
            found.append((name, way, same(under_ddp, weights(e))))
    return found


def test_an_engine_steps_as_ddp_does_bit_for_bit() -> None:
    for found in run(2, by_ddp_and_engines, timeout=120):
        assert all(equal for _, _, equal in found), [case for case in found if not case[2]]


def accumulated() -> list[tuple[str, bool]]:
    """ZeroOneAdamW on gradients of two backwards, in all ways to say so: whether they leave the bits of ZeRO 0."""
    steps, twice = range(20), {"gradient_accumulation_steps": 2}
    first = engine(0, optimizer=zero_one, **twice)
    attach(first, "sign")
    train(first, steps)
    found = []
    for stage in (1, 2):
        managed, owned, together = (
            engine(stage, {"reduce_bucket_size": 3000}, optimizer=zero_one, **settings)
            for settings in (twice, {**twice, "managed_gradient_accumulation": False}, {})
        )
        for e in (managed, owned, together):
            attach(e, "sign")
        train(managed, steps)
        for step in steps:
            for e in (owned, together):
                e.set_gradient_accumulation_boundary(step % 2 == 1) if e is together else None
                x, y = batch(step, dist.get_rank())
                e.backward(nn.functional.cross_entropy(e(x), y) / (2 if e is together else 1))
                if step % 2:
                    e.step()
        ways = {"managed": managed, "owned": owned, "together": together}
        found += [(f"{stage} {way}", same(weights(first), weights(e))) for way, e in ways.items()]
    return found


@pytest.mark.slow
def test_accumulated_gradients_are_sent_once() -> None:
    for found in run(RANKS, accumulated, timeout=120):
        assert all(equal for _, equal in found), found


def refused() -> list[str]:
    """What does not work, in its own words."""
    found = []
    for stage, make in (
        (1, lambda p: one_bit(p, max_norm=1.0)),
        (3, one_bit),
        (3, zero_one),
    ):
        e = engine(stage, optimizer=make)
        found.append(outcome(lambda e=e: attach(e, "sign", parameters="int4")))
    found.append(outcome(lambda: attach(engine(2, optimizer=zero_one), "sign", parameters="int8")))
    for make in (zero_one, one_bit):
        found.append(outcome(lambda make=make: attach(engine(1, optimizer=make, bf16={"enabled": True}), "sign")))
    found.append(outcome(lambda: attach(engine(1, {"elastic_checkpoint": True}, optimizer=zero_one), "sign")))
    block = {"commpress": {"gradients": "sign"}, "bf16": {"enabled": True}}
    found.append(outcome(lambda: engine(0, optimizer=one_bit, start=initialize, **block)))
    found.append(outcome(lambda: attach(engine(1), "sign", optimizer=one_bit(network().parameters()))))
    found.append(outcome(lambda: attach(engine(1), "sign", optimizer=adamw(network().parameters()))))  # type: ignore[arg-type]
    return found


def variance_taken_over(stage: int) -> tuple[set[str], bool, list[Tensor], str]:
    """The specs of four steps that begin with AdamW's variance; whether all moved; the weights; what sharding says to it."""
    model = network()
    source = adamw(model.parameters())
    for step in range(3):
        source.zero_grad()
        x, y = batch(step, 0)
        nn.functional.cross_entropy(model(x), y).backward()
        source.step()

    def make(parameters: Iterable[Tensor]) -> OneBitAdamW:
        return OneBitAdamW(parameters, lr=1e-2, variance_from=source.state_dict())

    e = engine(stage, optimizer=make, model=lambda: copy.deepcopy(model))
    session = attach(e, "sign")
    train(e, range(4))
    moved = not any(same([a], [b]) for a, b in zip(weights(e), model.state_dict().values(), strict=True))
    refusal = outcome(lambda: attach(engine(2, optimizer=make), "sign", parameters="int4"))
    return {row.spec for row in session.report().rows if row.sent_bytes}, moved, weights(e), refusal


@pytest.mark.parametrize("stage", [slow(0), 2])
def test_a_variance_of_adamw_is_taken_over_unless_it_would_be_sharded(stage: int) -> None:
    results = run(RANKS, variance_taken_over, stage, timeout=120)
    for specs, moved, values, refusal in results:
        assert specs == {"sign"}
        assert moved
        assert same(values, results[0][2])
        assert "variance_from under ZeRO 2 with parameters=" in refusal


def test_what_is_not_possible_says_so() -> None:
    of_ranks = run(RANKS, refused, timeout=120)
    norm, stage, other, parameters, bf16, one_bit_bf16, elastic, copies, another, torchs = of_ranks[0]
    assert "ZeroOneAdamW under ZeRO 3: expected ZeRO 0, 1 or 2" in other
    assert "parameters 'int8': ZeroOneAdamW under ZeRO 2 sends no parameters" in parameters
    assert "ZeroOneAdamW under ZeRO 1 with bf16: every rank steps all parameters" in bf16
    assert "OneBitAdamW under ZeRO 1 with bf16: every rank steps all parameters" in one_bit_bf16
    assert "OneBitAdamW with parameters='int4' or so, which is sharded" in one_bit_bf16
    assert "ZeroOneAdamW under ZeRO 1: elastic_checkpoint would save a part of its state" in elastic
    assert "max_norm 1.0 under ZeRO 1: each bucket leaves before the others are known" in norm
    assert "OneBitAdamW under ZeRO 3: expected ZeRO 0, 1 or 2" in stage
    assert "OneBitAdamW under ZeRO 0 with bf16: DeepSpeed steps copies of the parameters" in copies
    assert "the engine steps another AdamW, not this OneBitAdamW" in another
    assert "expected one of commpress.optim, got AdamW" in torchs
    assert all(found == of_ranks[0] for found in of_ranks)


# --- checkpoints -------------------------------------------------------------------------------------------------

RESUMED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "ZeRO 0": ({"stage": 0}, "int4", None),
    "ZeRO 1": ({"stage": 1}, "int4", "sign"),
    "ZeRO 2": ({"stage": 2, "zero": {"reduce_bucket_size": 3000}}, "sign", "int8"),
    "ZeRO 2, bf16": ({"stage": 2, "bf16": {"enabled": True}}, "int4", "sign"),
    "ZeRO 3": ({"stage": 3}, "int4", "int8"),
    "OneBitAdamW, ZeRO 0": ({"stage": 0, "optimizer": coded_warm_up}, "sign", None),
    "OneBitAdamW, ZeRO 1, sharded": ({"stage": 1, "optimizer": coded_warm_up}, "sign", "sign"),
    **{
        f"OneBitAdamW, ZeRO 2, between its phases, {parameters}": (
            {"stage": 2, "optimizer": lambda p: one_bit(p, warmup_spec="int4", warmup_steps=4)},
            "sign",
            parameters,
        )
        for parameters in (None, "sign")
    },
    **{
        f"ZeroOneAdamW, ZeRO {stage}": (
            {"stage": stage, "optimizer": lambda p: zero_one(p, warmup_steps=3, sync_every=2)},
            "sign",
            None,
        )
        for stage in (0, 2)
    },
    "DGC, ZeRO 1": ({"stage": 1, "optimizer": dgc}, "topk(0.1)|int4", None),
}


def resumed(folder: str) -> list[tuple[str, bool, bool]]:
    """Whether a run goes on as the unbroken one, with and without the session's state."""
    found = []
    for name, (setup, gradients, parameters) in RESUMED.items():
        e = engine(**setup)
        session = attach(e, gradients, parameters=parameters)
        train(e, range(4))
        local = isinstance(e.basic_optimizer, ZeroOneAdamW)
        with e.basic_optimizer.synced() if local else contextlib.nullcontext():
            e.save_checkpoint(folder, tag=name)
        state = copy.deepcopy(session.state_dict())
        train(e, range(4, 7))
        again, without = engine(**setup), engine(**setup)
        kept = attach(again, gradients, parameters=parameters)
        attach(without, gradients, parameters=parameters)
        for restarted in (again, without):
            restarted.load_checkpoint(folder, tag=name)
        kept.load_state_dict(state)
        for restarted in (again, without):
            train(restarted, range(4, 7))
        unbroken = weights(e)
        found.append((name, same(unbroken, weights(again)), same(unbroken, weights(without))))
    return found


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    for found in run(RANKS, resumed, str(tmp_path), timeout=240):
        for name, with_state, without in found:
            assert with_state, name
            assert not without, f"{name}: the session's state makes no difference"


def exported(folder: str) -> bool:
    """Whether DeepSpeed's tool makes of a checkpoint the weights that all ranks had at their last sync."""
    e = engine(2, optimizer=lambda p: zero_one(p, warmup_steps=3))
    attach(e, "sign")
    train(e, range(6))
    with e.basic_optimizer.synced():
        e.save_checkpoint(folder, tag="tag")
        expected = weights(e)
    return same(expected, list(get_fp32_state_dict_from_zero_checkpoint(folder, tag="tag").values()))


def test_zero_to_fp32_finds_what_all_ranks_step(tmp_path: Path) -> None:
    assert all(run(RANKS, exported, str(tmp_path)))
