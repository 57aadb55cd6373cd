"""EF21-Muon: torch's Muon and AdamW as long as nothing is left out, the paper's formula once something is."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from references import Ef21Muon
from scripted import Scripted
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import PRODUCTS, SMALL_BUCKETS, exact_products, finite, loss_of, network, parameters_of, same, train

import commpress
from commpress.comm.codecs import parse
from commpress.comm.meter import Report
from commpress.comm.prologue import Ahead
from commpress.optim import EF21Muon
from commpress.optim.muon_groups import groups
from commpress.optim.newton_schulz import newton_schulz

LR = 0.01
STEPS = 15
TORCHS: dict[str, Any] = {"momentum": 0.95, "nesterov": True}
"""What torch.optim.Muon has by default."""
LONG = 256
"""Units of a network whose matrices are long enough for other coordinates."""


def attached(
    spec: str,
    bucket_cap_mb: float = SMALL_BUCKETS,
    exchange: str | None = None,
    unused: bool = False,
    width: int = 64,
    **settings: Any,
) -> tuple[DistributedDataParallel, EF21Muon, commpress.Session]:
    """A network, its optimizer and its session."""
    ddp = DistributedDataParallel(network(width=width), bucket_cap_mb=bucket_cap_mb, find_unused_parameters=unused)
    optimizer = EF21Muon(ddp, **{"lr": LR, "others_spec": "none", **settings})
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer, exchange=exchange)


@exact_products
def beside_torch(settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after some steps, and those of torch's Muon and AdamW, all in float32."""
    mine, optimizer, _ = attached("none", **{**TORCHS, **settings})
    theirs = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    matrices, others = ([p for p in theirs.parameters() if (p.dim() == 2) == two] for two in (True, False))
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **settings)
    adamw = torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    ours = train(mine, range(STEPS), optimizer=optimizer).parameters
    with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", in_float32):
        for step in range(STEPS):
            theirs.zero_grad()
            loss_of(theirs, step).backward()
            muon.step()
            adamw.step()
    return ours, parameters_of(theirs)


def in_float32(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz of torch's Muon, without its rounding to bfloat16."""
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """How far the parameters of one training are from the other's, as a share of how far that one went."""
    start = torch.cat([t.reshape(-1) for t in parameters_of(network(width=len(one[0])))])
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (one, other))
    return float((a - b).norm() / (b - start).norm())


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"momentum": 0.5}], ids=str)
@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_exact_it_is_torchs_muon(settings: dict[str, Any], world_size: int) -> None:
    for mine, theirs in run(world_size, beside_torch, settings):
        assert distance(mine, theirs) < 1e-3


@exact_products
def against_reference(spec: str, settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    ddp, optimizer, session = attached(
        spec, bucket_cap_mb=25, exchange="one_shot", unused=True, width=LONG, **settings
    )  # one layout
    train(ddp, [0], optimizer=optimizer)
    layout = [bucket["segments"] for bucket in session.state_dict()["memories"][0]]
    matrices = [segments for segments in layout if all(name.endswith("weight") for name, _ in segments)]
    assert len(matrices) == 1
    model = network(width=LONG)
    chosen = {"lr": LR, "momentum": 0.9, "nesterov": False, **settings}
    reference = Ef21Muon(model, matrices, dist.get_world_size(), parse(spec), **chosen)
    reference.step(0)
    names = {p: name for name, p in ddp.module.named_parameters() if p.dim() == 2}
    for step in range(1, STEPS):
        train(ddp, [step], optimizer=optimizer)
        reference.step(step)
        for p, name in names.items():
            if "basis_vectors" in optimizer.state[p]:
                vectors, sizes = (optimizer.state[p][f"basis_{what}"] for what in ("vectors", "sizes"))
                reference.turns[name] = (vectors / sizes).T, vectors * sizes
    assert len(reference.turns) == (3 if parse(spec).nbytes(1000) < 1000 else 0)
    return parameters_of(ddp.module), parameters_of(model)


@pytest.mark.parametrize(("spec", "settings"), [
    ("sign", {}), ("int4", TORCHS), slow("int2", {"momentum": 0.8}), ("topk(0.1)|sign", {}), ("int8", {}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_it_is_ef21_muon(spec: str, settings: dict[str, Any], world_size: int) -> None:
    """In the coordinates that it has chosen, from steps 10, 11 and 12 on, but for int8.

    Some values are so small that rounding decides on their code, and Newton-Schulz enlarges that; in the matrices' own
    coordinates the distance would be 0.2 to 0.5.
    """
    for mine, theirs in run(world_size, against_reference, spec, settings):
        assert distance(mine, theirs) < (0.02 if spec == "int8" else 0.1)


def replicas(spec: str, steps: int, settings: dict[str, Any]) -> tuple[list[list[Tensor]], Report]:
    """Parameters after each step, and what was sent."""
    ddp, optimizer, session = attached(spec, **settings)
    return [train(ddp, [step], optimizer=optimizer).parameters for step in range(steps)], session.report()


@pytest.mark.parametrize(("spec", "world_size"), [("sign", 3), ("int2", 2), slow("topk(0.1)|sign", 4), slow("int4", 4)])
def test_replicas_hold_the_same_bits(spec: str, world_size: int) -> None:
    results = run(world_size, replicas, spec, 8, {"others_spec": "int8"})
    for history, report in results:
        assert all(same(one, other) for one, other in zip(history, results[0][0], strict=True))
        assert all(finite(parameters) for parameters in history)
        assert not same(history[-1], history[-2])
        assert spec in {row.spec for row in report.rows}


def test_matrices_and_others_have_rows_of_their_own() -> None:
    for _, report in run(2, replicas, "sign", 4, {"others_spec": "int8", "bucket_cap_mb": 25}):
        sent = {row.spec: row for row in report.rows}
        assert sent.keys() == {"sign", "none"}  # the biases are too few for a code
        assert sent["sign"].values == 32 * 64 + 64 * 64 + 64 * 10


def passes_before_the_code(spec: str, steps: int) -> int:
    """How often a momentum was moved in a pass of its own."""
    ddp, optimizer, _ = attached(spec, bucket_cap_mb=25, width=LONG, others_spec="int8")
    with mock.patch.object(Ahead, "apply", autospec=True, side_effect=Ahead.apply) as applied:
        train(ddp, range(steps), optimizer=optimizer)
    return applied.call_count


@pytest.mark.parametrize(("spec", "passes"), [("int8", 0), slow("rotate|sign", 0), ("topk(0.1)|sign", 12)])
def test_the_pass_that_encodes_moves_the_momentum(spec: str, passes: int) -> None:
    """In other coordinates, too, which the matrices have from the 11th step on. top-k reads values twice, and cannot."""
    assert run(2, passes_before_the_code, spec, 12) == [passes] * 2


def by_exchange(exchange: str | None) -> list[Tensor]:
    ddp, optimizer, _ = attached("int8", exchange=exchange, others_spec="int8")
    return train(ddp, range(8), optimizer=optimizer).parameters


def test_a_node_of_one_rank_sends_what_a_rank_does() -> None:
    """`hierarchical` encodes by an encoder of its own, which knows no momentum."""
    for nodes, ranks in zip(run(2, by_exchange, "hierarchical(1)"), run(2, by_exchange, "one_shot"), strict=True):
        assert same(nodes, ranks)


def switched(*specs: str) -> dict[str, float]:
    """How far, in units of the mean momentum, the estimate is from it after steps by these specs; and how far each rank's
    momentum is from one that is kept here, and the ranks' estimates from each other."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    optimizer = EF21Muon(ddp, lr=LR)
    session = commpress.attach(ddp, optimizer=optimizer)
    assert session.step_buffer is not None
    assert session.step_buffer.auto is not None
    session.step_buffer.auto.search = Scripted(*specs)  # type: ignore[assignment]
    matrices = {name: p for name, p in ddp.module.named_parameters() if p.dim() == 2}
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for step in range(len(specs)):
        for name, g in zip(matrices, torch.autograd.grad(loss_of(ddp.module, step), [*matrices.values()]), strict=True):
            momenta[name].lerp_(g, 1 - 0.9)
        train(ddp, [step], optimizer=optimizer)
    mine = torch.cat([momenta[name].view(-1) for name in matrices])
    estimate = torch.cat([optimizer.state[p]["momentum_buffer"].view(-1) for p in matrices.values()])
    of, kept = session.collectives[0].feedback, dict[str, Tensor]()
    for segments, memory in of.memories.items():
        if memory.momentum is not None:
            parts = memory.momentum.split([segment.n for segment in segments])
            kept |= zip((segment.name for segment in segments), parts, strict=True)
    own = torch.cat([kept[name] for name in matrices])
    mean, of_rank_0 = mine.clone(), estimate.clone()
    dist.all_reduce(mean)
    dist.broadcast(of_rank_0, 0)
    mean /= dist.get_world_size()
    ahead = float((estimate - mean).norm() / mean.norm())
    return {
        "ahead": ahead,
        "own": float((own - mine).norm() / mine.norm()),
        "apart": float((estimate != of_rank_0).sum()),
    }


@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_a_spec_that_changes_loses_nothing_of_the_momenta(world_size: int) -> None:
    """What int8 had withheld goes along with the first exact exchange, and with the next coarse one."""
    for found in run(world_size, switched, *["none"] * 2, *["int8"] * 5, "none"):
        assert found["ahead"] < 1e-5
        assert found["own"] < 1e-5
        assert found["apart"] == 0
    for found in run(world_size, switched, *["none"] * 2, *["int8"] * 5):
        assert 1e-4 < found["ahead"] < 0.02
        assert found["own"] < 1e-5
        assert found["apart"] == 0


def test_by_none_nothing_is_coded() -> None:
    settings = {"others_spec": "int8", "others": ["*.0.weight"]}
    for spec, found in (("none", {"none"}), ("int4", {"int4", "int8", "none"})):  # the biases are too few for a code
        for _, report in run(2, replicas, spec, 2, settings):
            assert {row.spec for row in report.rows} == found


def mistakes() -> list[str]:
    """What is said to a session without feedback, and to ranks whose products may differ."""
    ddp = DistributedDataParallel(network())
    said = [outcome(lambda: commpress.attach(ddp, "sign", optimizer=EF21Muon(ddp), error_feedback=False))]
    ddp, optimizer, _ = attached("sign")
    torch.set_num_threads(1 + dist.get_rank())
    said.append(outcome(lambda: train(ddp, range(3), optimizer=optimizer)))
    torch.set_num_threads(1)
    return said


def test_what_would_part_the_replicas_is_an_error_on_all() -> None:
    for without, threads in run(2, mistakes, fresh=True):
        assert without.startswith("ValueError: error_feedback=False: EF21Muon adds up what it receives")
        assert "matrix products by" in threads
        assert "2 threads" in threads


def loaded_apart() -> tuple[str, str]:
    """What is said to an optimizer's state without the session's, and then to both."""
    ddp, optimizer, session = attached("sign")
    train(ddp, range(3), optimizer=optimizer)
    saved = optimizer.state_dict(), session.state_dict()
    ddp, optimizer, session = attached("sign")
    optimizer.load_state_dict(saved[0])
    alone = outcome(lambda: train(ddp, range(1), optimizer=optimizer))
    ddp, optimizer, session = attached("sign")  # DDP does not survive an error
    optimizer.load_state_dict(saved[0])
    session.load_state_dict(saved[1])
    return alone, outcome(lambda: train(ddp, range(1), optimizer=optimizer))


def test_a_state_without_the_momenta_is_an_error_unless_the_session_brings_them() -> None:
    for alone, together in run(2, loaded_apart):
        assert "EF21Muon: a state was loaded without the session's" in alone
        assert together == ""


def losses(spec: str, settings: dict[str, Any]) -> list[float]:
    ddp, optimizer, _ = attached(spec, **settings)
    train(ddp, range(60), optimizer=optimizer)
    with torch.no_grad():
        return [sum(float(loss_of(ddp.module, 1000 + step)) for step in range(16)) / 16]


@pytest.mark.slow
def test_one_bit_trains_as_far_as_none() -> None:
    exact, coded = (run(2, losses, spec, {})[0][0] for spec in ("none", "sign"))
    untrained = run(2, losses, "none", {"lr": 0.0})[0][0]
    assert coded - exact < 0.05 * (untrained - exact)


def kinds_of(model: nn.Module, **more: Any) -> dict[str, bool]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["muon"] for group in groups(model, **more) for p in group["params"]}


class Language(nn.Module):
    """Embeddings, a convolution, hidden layers and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.hidden, self.norm = nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.convolution, self.head = nn.Conv1d(16, 16, 3), nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_hidden_matrices_are_muons_and_the_rest_adamws() -> None:
    expected = {
        "embedding.weight": False, "hidden.weight": True, "hidden.bias": False, "norm.weight": False, "norm.bias": False,
        "convolution.weight": True, "convolution.bias": False, "head.weight": False,
    }  # fmt: skip
    assert kinds_of(Language()) == expected
    del expected["head.weight"]
    assert kinds_of(Language(tied=True)) == expected
    assert not kinds_of(Language(), others=["hidden.*"])["hidden.weight"]
    wide = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 64))
    assert [kind for name, kind in kinds_of(wide).items() if "weight" in name] == [True, True, False, False]
    frozen = Language()
    frozen.hidden.weight.requires_grad_(False)
    assert "hidden.weight" not in kinds_of(frozen)


def test_what_is_wrong_with_groups_says_so() -> None:
    model = Language()
    assert "others: 'hiden.*' matches no parameter" in outcome(lambda: EF21Muon(model, others=["hiden.*"]))
    assert "a group has muon None" in outcome(lambda: EF21Muon([{"params": list(model.parameters())}]))
    group = {"params": [model.norm.weight], "muon": True}
    assert "a parameter of shape (16,)" in outcome(lambda: EF21Muon([group]))
    assert "others_spec 'sign'" in outcome(lambda: EF21Muon(model, others_spec="sign"))
    assert "torch.bfloat16" in outcome(
        lambda: EF21Muon([{"params": [Language().hidden.bfloat16().weight], "muon": True}])
    )
    assert "the hidden matrices are torch.bfloat16, expected float32" in outcome(
        lambda: EF21Muon(Language().bfloat16())
    )
    assert "others_spec 'int2': AdamW trains worse with it; expected one of none, bf16" in outcome(
        lambda: EF21Muon(model, others_spec="int2")
    )
    for spec in ("rotate|int2", "rotate|int4"):
        assert EF21Muon(model, others_spec=spec).param_groups[0]["others_spec"] == spec
    assert "others_spec 'topk(0.1)'" in outcome(lambda: EF21Muon(model, others_spec="topk(0.1)"))
    assert "momentum 1.0: expected a number in [0, 1)" in outcome(lambda: EF21Muon(model, momentum=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 40), (2, 40, 5), (1, 1, 9)])
def test_newton_schulz_makes_singular_values_of_about_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with mock.patch(PRODUCTS, dtype):
        found = newton_schulz(1000 * x)
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    cosine = (found * (u @ v)).sum(dim=(1, 2)) / found.flatten(1).norm(dim=1) / (u @ v).flatten(1).norm(dim=1)
    assert cosine.min() > 0.95
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0


def test_after_a_checkpoint_another_state_of_as_many_steps_is_loaded() -> None:
    """A distributed checkpoint brings one state twice, by the session and for the optimizer; what comes later is another."""

    def stepped(estimate: float) -> tuple[EF21Muon, dict[str, Any]]:
        p = nn.Parameter(torch.zeros(8, 8))
        optimizer = EF21Muon([{"params": [p], "muon": True}])
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p, estimate)
        optimizer.param_groups[0]["steps"] = 7
        return optimizer, copy.deepcopy(optimizer.state_dict())

    (live, first), (_, second) = stepped(1.0), stepped(2.0)
    live.load_with_session(second)
    live.load_state_dict(first)  # ignored: the session has brought what belongs to this checkpoint
    assert torch.equal(live.state_dict()["state"][0]["momentum_buffer"], second["state"][0]["momentum_buffer"])
    live.load_state_dict(first)
    assert torch.equal(live.state_dict()["state"][0]["momentum_buffer"], first["state"][0]["momentum_buffer"])
