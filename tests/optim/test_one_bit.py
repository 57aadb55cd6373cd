"""1-bit Adam: AdamW first, then what the paper's formula gives, the same bits on every rank."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run
from references import FrozenAdam, constant
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, Trained, batch, finite, loss_of, network, parameters_of, same, same_training, train

import commpress
from commpress.comm.coding import encode
from commpress.comm.meter import Report
from commpress.comm.prologue import Prologue
from commpress.optim import OneBitAdamW

LR, WARM_UP = 0.01, 4
DEFAULTS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
GROUPS: dict[str, dict[str, Any]] = {
    "0": DEFAULTS,
    "2": {**DEFAULTS, "lr": 0.003, "weight_decay": 0.0},
    "4": {**DEFAULTS, "betas": (0.8, 0.99), "weight_decay": 0.2},
}
"""Settings by layer of the network."""


def pausing(step: int) -> float:
    """A schedule that grows, falls, and stands at 0 in some steps."""
    return (0.5, 1.0, 0.8, 0.0, 0.6, 0.4, 0.0, 0.0, 0.7, 1.3)[step % 10]


def same_settings(_: str) -> dict[str, Any]:
    """One group."""
    return DEFAULTS


def by_layer(name: str) -> dict[str, Any]:
    """Three groups."""
    return GROUPS[name[0]]


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """The network's parameters in the groups of `by_layer`."""
    names = dict(model.named_parameters())
    return [
        {**settings, "params": [p for n, p in names.items() if n[0] == layer]} for layer, settings in GROUPS.items()
    ]


def attached(
    spec: str, exchange: str | None = None, bucket_cap_mb: float = SMALL_BUCKETS, groups: bool = False, **settings: Any
) -> tuple[DistributedDataParallel, OneBitAdamW, commpress.Session]:
    """A network, its optimizer and its session."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb)
    chosen = {**DEFAULTS, "warmup_steps": WARM_UP, **settings}
    optimizer = OneBitAdamW(grouped(ddp.module) if groups else ddp.parameters(), **chosen)
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer, exchange=exchange)


def scheduled(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, schedule: Callable[[int], float]
) -> Trained:
    """Train, with lr's factor by step."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    trained = Trained([])
    for step in steps:
        part = train(model, [step], optimizer=optimizer)
        scheduler.step()
        trained = Trained(part.parameters, trained.gradients + part.gradients)
    return trained


def against_reference(
    spec: str,
    exchange: str | None,
    steps: int,
    groups: bool,
    schedule: Callable[[int], float],
    settings: dict[str, Any],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], float, int]:
    """Parameters, those of the reference, those at the start; the share that was bounded; buckets.

    The reference is all ranks in one process: rank 0 computes it and tells the others.
    """
    ddp, optimizer, session = attached(spec, exchange, groups=groups, **settings)
    layouts = []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        train(ddp, [step], optimizer=optimizer)
        scheduler.step()
        layouts.append([bucket["segments"] for bucket in session.state_dict()["memories"][0]])
    assert layouts[0] != layouts[1] == layouts[-1]
    (used,) = {row.exchange for row in session.report().rows if row.exchange != "all_reduce"} or {"all_reduce"}
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        reference = FrozenAdam(
            network(),
            layouts[0],
            dist.get_world_size(),
            spec,
            used,
            by_layer if groups else same_settings,
            schedule=schedule,
            **{"warmup_steps": WARM_UP, **settings},
        )
        reference.step(0)
        reference.lay_out(layouts[1])
        for step in range(1, steps):
            reference.step(step)
        told = [(list(reference.ranks[0].values()), reference.bounded)]
    dist.broadcast_object_list(told)
    expected, bounded = told[0]
    return parameters_of(ddp.module), expected, parameters_of(network()), bounded, len(layouts[1])


def warm_up_alone(spec: str) -> tuple[Trained, Trained]:
    """Eight steps that all warm up, and torch's own optimizer on plain DDP."""
    mine, optimizer, _ = attached(spec, groups=True, warmup_steps=100)
    plain = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    theirs = torch.optim.AdamW(grouped(plain.module), fused=True)
    return scheduled(mine, optimizer, range(8), pausing), scheduled(plain, theirs, range(8), pausing)


def warm_up_clipped(most: float) -> tuple[Trained, Trained, Trained]:
    """Six steps of the warm-up under `max_norm`; torch's clipping and optimizer; the same without clipping."""
    trained = []
    mine, optimizer, _ = attached("sign", warmup_steps=100, max_norm=most)
    trained.append(train(mine, range(6), optimizer=optimizer))
    for bound in (most, 1e9):
        plain = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
        theirs = torch.optim.AdamW(plain.parameters(), **DEFAULTS, fused=True)
        for step in range(6):
            theirs.zero_grad()
            loss_of(plain, step).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), bound)
            theirs.step()
        trained.append(Trained(parameters_of(plain)))
    return trained[0], trained[1], trained[2]


def blended_apart(spec: str, groups: bool) -> int:
    """How often a bucket was blended before it came to the codec, in four steps behind the warm-up; all in one bucket."""
    ddp, optimizer, _ = attached(spec, groups=groups, warmup_steps=1, bucket_cap_mb=25)
    train(ddp, range(2), optimizer=optimizer)
    apply, calls = Prologue.apply, 0

    def counted(self: Prologue, x: Tensor) -> None:
        nonlocal calls
        calls += 1
        apply(self, x)

    Prologue.apply = counted  # type: ignore[method-assign]
    try:
        train(ddp, range(2, 6), optimizer=optimizer)
    finally:
        Prologue.apply = apply  # type: ignore[method-assign]
    return calls


def replicas(spec: str, steps: int, settings: dict[str, Any]) -> tuple[list[list[Tensor]], Report, list[list[Tensor]]]:
    """Parameters after each step, what was sent, and the residuals after each step."""
    ddp, optimizer, session = attached(spec, **settings)
    history, residuals = [], []
    for step in range(steps):
        history.append(train(ddp, [step], optimizer=optimizer).parameters)
        kept = [bucket["residual"] for bucket in session.state_dict()["memories"][0]]
        residuals.append([r for r in kept if r is not None])
    return history, session.report(), residuals


def settling(growth: float, steps: int) -> tuple[int | None, list[float], list[Tensor]]:
    """The step after which the variance froze, its own sums after each step, and the parameters.

    The loss grows by this factor from step to step.
    """
    beta2 = 0.9
    ddp, optimizer, _ = attached("sign", warmup_steps=None, betas=(0.9, beta2))
    frozen: int | None = None
    squares = [torch.zeros_like(p, dtype=torch.float64) for p in ddp.parameters()]
    sums = []
    for step in range(steps):
        train(ddp, [step], optimizer=optimizer, loss=lambda model, at: growth**at * loss_of(model, at))
        for square, p in zip(squares, ddp.parameters(), strict=True):
            assert p.grad is not None
            square.mul_(beta2).add_(p.grad.double().square(), alpha=1 - beta2)
        sums.append(float(sum(square.sum() for square in squares)))
        if optimizer.frozen and frozen is None:
            frozen = step + 1
    return frozen, sums, parameters_of(ddp)


def accumulated(spec: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two backwards a step, one of them under no_sync; both losses in one backward."""
    one, optimizer, _ = attached(spec)
    train(one, range(8), optimizer=optimizer, accumulate=2)
    other, optimizer, _ = attached(spec)

    def both(model: nn.Module, step: int) -> Tensor:
        return (loss_of(model, 2 * step) + loss_of(model, 2 * step + 1)) / 2

    train(other, range(8), optimizer=optimizer, loss=both)
    return parameters_of(one), parameters_of(other)


def viewed(spec: str) -> tuple[Trained, Trained]:
    """Gradients as copies of DDP's buckets, and as views of them."""
    trained = []
    for views in (False, True):
        ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS, gradient_as_bucket_view=views)
        optimizer = OneBitAdamW(ddp.parameters(), lr=LR, warmup_steps=WARM_UP)
        commpress.attach(ddp, spec, optimizer=optimizer)
        trained.append(train(ddp, range(9), optimizer=optimizer))
    return trained[0], trained[1]


class Branches(nn.Module):
    """Two branches behind a trunk; which of them is used in a step is `uses`. A third layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()
        self.fixed = nn.Linear(64, 64)
        self.other = nn.Linear(64, 10)
        self.uses = "both"
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the branches that are in use."""
        x = self.layers[:-1](x) + 0.1 * self.fixed(self.layers[:2](x))
        out = x[:, :10]
        if self.uses != "other":
            out = out + self.layers[-1](x)
        if self.uses != "first":
            out = out + self.other(x)
        return out


def unused_with_zeros(set_to_none: bool) -> list[Tensor]:
    """Parameters of a training in which a branch rests in steps behind the warm-up, its gradient None or zeros."""
    torch.manual_seed(5)
    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = OneBitAdamW([p for p in ddp.parameters() if p.requires_grad], lr=LR, warmup_steps=WARM_UP)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    for step in range(12):
        model.uses = "first" if step > WARM_UP and step % 3 == 1 else "both"
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(ddp, step).backward()
        optimizer.step()
    return parameters_of(model)


def asked_in_a_step() -> list[str]:
    """What a step behind the warm-up asks of tensors, where a branch is not used."""
    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = OneBitAdamW([p for p in ddp.parameters() if p.requires_grad], lr=LR, warmup_steps=2)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    asked: list[str] = []
    with contextlib.ExitStack() as patched:
        for step in range(4):
            model.uses = "first" if step == 3 else "both"
            optimizer.zero_grad(set_to_none=False)
            loss_of(ddp, step).backward()
            if step == 3:
                for name in ("__bool__", "tolist", "item"):
                    asks = getattr(Tensor, name)

                    def noted(x: Tensor, name: str = name, asks: Any = asks) -> Any:
                        asked.append(name)
                        return asks(x)

                    patched.enter_context(mock.patch.object(Tensor, name, noted))
            optimizer.step()
    return asked


def test_the_host_asks_once_a_step_which_gradients_are_zero() -> None:
    assert run(2, asked_in_a_step) == [["tolist"], ["tolist"]]


def branching(when: str, spec: str, views: bool) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Parameters after each step; the frozen ones before and after. `when` says in which steps a branch is not used.

    It is unused on all ranks in some steps ("all"), on rank 1 ("one"), or never used by anybody ("never").
    """
    torch.manual_seed(5)
    model = Branches()
    before = parameters_of(model.fixed)
    ddp = DistributedDataParallel(
        model, bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=True, gradient_as_bucket_view=views
    )
    optimizer = OneBitAdamW([p for p in ddp.parameters() if p.requires_grad], lr=LR, warmup_steps=WARM_UP)
    commpress.attach(ddp, spec, optimizer=optimizer)
    history = []
    for step in range(12):
        missing = {"all": step % 3 == 1, "one": step % 3 == 1 and dist.get_rank() == 1, "never": True}[when]
        model.uses = "first" if missing else "both"
        history.append(train(ddp, [step], optimizer=optimizer).parameters)
    return history, before, parameters_of(model.fixed)


class Rows(nn.Module):
    """An embedding of which half the rows are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean of the rows that the inputs name."""
        return self.out(self.embedding((x.abs() * 10).long() % 20).mean(dim=1))  # type: ignore[no-any-return]


def idle_rows(steps: int) -> tuple[Tensor, Tensor]:
    """How far each value of the rows moved after the warm-up: those in use, those not."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Rows()
    ddp = DistributedDataParallel(model, bucket_cap_mb=25)
    optimizer = OneBitAdamW(ddp.parameters(), lr=LR, weight_decay=0.0, warmup_steps=10)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    train(ddp, range(10), optimizer=optimizer)
    assert optimizer.frozen
    before = model.embedding.weight.detach().clone()
    train(ddp, range(10, 10 + steps), optimizer=optimizer)
    moved = (model.embedding.weight.detach() - before).abs()
    return moved[:20], moved[20:]


def away(actual: list[Tensor], expected: list[Tensor], by: float) -> float:
    """The share of values that are away from what is expected by more than this."""
    one, other = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (actual, expected))
    return float(((one - other).abs() > by).double().mean())


def require_equal(actual: list[Tensor], expected: list[Tensor], start: list[Tensor], lossy: bool) -> None:
    """To rounding; a few values may have been rounded, or chosen, the other way by a codec. A step is about LR."""
    assert away(start, expected, LR) > 0.6
    assert away(actual, expected, 1e-5) <= (0.005 if lossy else 0)


@pytest.mark.parametrize(("spec", "exchange", "world_size"), [
    ("none", None, 2), slow("none", None, 3), ("sign", None, 2), ("int4", None, 2), ("topk(0.1)|sign", None, 2),
    slow("topk(0.1)|sign", None, 3), ("sign", "two_shot", 3), slow("sign", "one_shot", 3),
])  # fmt: skip
def test_it_is_one_bit_adam(spec: str, exchange: str | None, world_size: int) -> None:
    results = run(world_size, against_reference, spec, exchange, WARM_UP + 10, False, constant, {})
    for actual, expected, start, bounded, buckets in results:
        require_equal(actual, expected, start, spec != "none")
        assert bounded > 0.005  # so that the bound was put to the test
        assert buckets == 3


@pytest.mark.parametrize("spec", ["none", "sign"])
def test_groups_and_a_schedule(spec: str) -> None:
    for actual, expected, start, _, _ in run(2, against_reference, spec, None, 16, True, pausing, {}):
        assert away(start, expected, 0.001) > 0.9
        assert away(actual, expected, 1e-5) <= (0 if spec == "none" else 0.005)


@pytest.mark.parametrize(("spec", "most"), [("none", 0.2), ("sign", 0.2), slow("sign", 100.0)])
def test_clipped_gradients(spec: str, most: float) -> None:
    for actual, expected, start, _, _ in run(
        2, against_reference, spec, None, WARM_UP + 10, False, constant, {"max_norm": most}
    ):
        require_equal(actual, expected, start, spec != "none")


@pytest.mark.parametrize(("world_size", "exchange"), [(2, None), slow(3, None)])
def test_a_compressed_warm_up_hands_its_feedback_over(world_size: int, exchange: str | None) -> None:
    """The reference scales what feedback kept of gradients to what it keeps of n."""
    settings = {"warmup_spec": "int4"}
    results = run(world_size, against_reference, "int4", exchange, WARM_UP + 8, False, constant, settings)
    for actual, expected, start, _, _ in results:
        require_equal(actual, expected, start, True)


def test_residuals_of_a_compressed_warm_up() -> None:
    exact = run(2, replicas, "int4", 8, {})
    coarse = run(2, replicas, "int4", 8, {"warmup_spec": "int4"})
    for (history, report, residuals), (_, dense, none_yet) in zip(coarse, exact, strict=True):
        assert all(same(one, other) for one, other in zip(history, coarse[0][0], strict=True))
        assert report.sent_bytes < 0.6 * dense.sent_bytes
        assert not none_yet[WARM_UP - 1]
        for step in (WARM_UP - 1, WARM_UP, 7):
            assert len(residuals[step]) == 3
            assert finite(residuals[step])
            assert all(bool(r.any()) for r in residuals[step])


def test_the_warm_up_is_adamw() -> None:
    for mine, theirs in run(2, warm_up_alone, "sign"):
        assert same_training(mine, theirs)


def test_the_warm_up_is_adamw_under_clipping() -> None:
    for mine, theirs, free in run(2, warm_up_clipped, 0.2):
        assert same(mine.parameters, theirs.parameters)
        assert not same(mine.parameters, free.parameters)


@pytest.mark.parametrize(("spec", "world_size"), [("sign", 2), ("sign", 3), ("int4", 2), ("topk(0.1)|sign", 2)])
def test_replicas_hold_the_same_bits(spec: str, world_size: int) -> None:
    results = run(world_size, replicas, spec, 12, {})
    first = results[0][0]
    for history, report, _ in results:
        assert all(same(one, other) for one, other in zip(history, first, strict=True))
        assert all(finite(parameters) for parameters in history)
        assert not any(same(a, b) for a, b in itertools.pairwise(history))
        last = [
            row for row in report.rows if row.values < 6922
        ]  # DDP has laid its buckets out anew after the first step
        warm = [row for row in last if row.reason == "the variance warms up"]
        cold = [row for row in last if not row.reason]
        assert [row.steps for row in warm] == [WARM_UP - 1] * 3
        assert [row.steps for row in cold] == [12 - WARM_UP] * 3
        assert {row.spec for row in warm} == {"none"}
        assert {row.spec for row in cold} == {spec}
        assert report.steps == 12
        sent, dense = (sum(getattr(row, f"{kind}_bytes") for row in cold) for kind in ("sent", "dense"))
        if world_size == 2:
            assert dense > {"sign": 20, "int4": 6, "topk(0.1)|sign": 20}[spec] * sent


def test_the_warm_up_ends_when_the_variance_has_settled() -> None:
    results = run(2, settling, 1.0, 70)
    for frozen, sums, parameters in results:
        checks = [(sums[at - 11], sums[at - 1], at) for at in range(20, 71, 10)]
        settled = [at for before, now, at in checks if min(before, now) >= 0.96 * max(before, now)]
        assert frozen == settled[0]
        assert frozen > 20  # so that a check has said no before
        assert same(parameters, results[0][2])


@pytest.mark.parametrize("growth", [2.0, slow(0.5)])
def test_a_variance_that_moves_keeps_warming_up(growth: float) -> None:
    for frozen, sums, parameters in run(2, settling, growth, 32):
        assert frozen is None
        assert sums[31] > 2 * sums[21] or sums[31] < sums[21] / 2
        assert finite(parameters)


@pytest.mark.parametrize("spec", [slow("none"), "sign"])
def test_accumulated_gradients(spec: str) -> None:
    for one, other in run(2, accumulated, spec):
        require_equal(one, other, parameters_of(network()), spec != "none")


@pytest.mark.parametrize("spec", [slow("sign"), "topk(0.1)|sign"])
def test_views_of_buckets_make_no_difference(spec: str) -> None:
    for copies, views in run(2, viewed, spec):
        assert same_training(copies, views)


@pytest.mark.parametrize(("when", "views"), [slow("one", False), ("one", True), ("all", True), ("never", False)])
def test_parameters_that_are_not_used_or_not_trained(when: str, views: bool) -> None:
    results = run(2, branching, when, "sign", views)
    for history, before, after in results:
        assert all(same(one, other) for one, other in zip(history, results[0][0], strict=True))
        assert all(finite(parameters) for parameters in history)
        assert same(before, after)
        assert not same(history[-1][:2], history[0][:2])


def test_zeros_that_wait_for_a_gradient_are_none() -> None:
    """DDP leaves the gradient of what no rank used as it was; what was exchanged of it counts all the same."""
    one, other = (run(2, unused_with_zeros, set_to_none) for set_to_none in (True, False))
    assert same(one[0], one[1])
    assert same(other[0], other[1])
    assert same(one[0], other[0])


def test_a_value_without_gradients_is_not_thrown_about() -> None:
    for used, idle in run(2, idle_rows, 20):
        assert float(idle.max()) <= 20 * LR * 3
        assert float(used.mean()) > LR


def test_the_batches_differ_by_rank() -> None:
    assert not torch.equal(batch(0, 0)[0], batch(0, 1)[0])


def test_the_pass_that_encodes_makes_the_momentum() -> None:
    assert run(2, blended_apart, "sign", False) == [0, 0]
    assert run(2, blended_apart, "sign", True)[0] > 0  # groups of other betas


@pytest.mark.parametrize("spec", ["int8", "int4", "int2", "sign", "topk(0.1)", "topk(0.1)|sign"])
def test_no_codec_but_the_casts_blends_in_a_pass_of_its_own(spec: str) -> None:
    x, residual = torch.randn(5000), torch.zeros(5000)
    before = x.clone()
    encode(commpress.parse(spec), x, residual, prologue=Prologue(torch.ones(5000), torch.ones(5000), 1.0, 0.1, 0.9))
    assert torch.equal(x, before)  # such a pass would have left it there
