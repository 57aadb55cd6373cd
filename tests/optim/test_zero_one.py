"""0/1 Adam: local steps drift apart as the paper says, and every sync brings the same bits back to all ranks."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from references import FrozenAdam, constant
from tiers import slow, slowly
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, finite, network, parameters_of, same, train

import commpress
from commpress.comm.meter import Report
from commpress.optim import Growing, OneBitAdamW, ZeroOneAdamW

LR, WARM_UP = 0.01, 4
SETTINGS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
LEARNS = (0, 1, 2, 4, 6, 10, 14, 22)
"""The paper's T_v for kappa = 2, as far as 23 steps go."""


def resting(step: int) -> float:
    """A schedule at 0 for a whole interval, and for parts of others."""
    return 0.0 if step in (5, 8, 9, 10, 11, 14, 19) else 1.0 / (1 + 0.1 * step)


def attached(
    spec: str, *, exchange: str | None = None, bucket_cap_mb: float = SMALL_BUCKETS, **settings: Any
) -> tuple[DistributedDataParallel, ZeroOneAdamW, commpress.Session]:
    """A network, its optimizer and its session."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb)
    optimizer = ZeroOneAdamW(ddp.parameters(), **{**SETTINGS, "warmup_steps": WARM_UP, **settings})
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer, exchange=exchange)


def against_reference(
    spec: str,
    exchange: str | None,
    steps: int,
    schedule: Callable[[int], float],
    settings: dict[str, Any],
    refreshes: tuple[int, ...],
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """This rank's parameters in one bucket, and those of the reference, after each step.

    The reference is all ranks in one process: rank 0 computes it and tells the others.
    """
    ddp, optimizer, session = attached(spec, exchange=exchange, bucket_cap_mb=25, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    mine, layouts = [], []
    for step in range(steps):
        mine.append(train(ddp, [step], optimizer=optimizer).parameters)
        scheduler.step()
        layouts.append([bucket["segments"] for bucket in session.state_dict()["memories"][0]])
    assert len(layouts[0]) == len(layouts[-1]) == 1
    used = {row.exchange for row in session.report().rows if row.spec == spec} - {"all_reduce", "none"} or {
        "all_reduce"
    }
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        reference = FrozenAdam(
            network(),
            layouts[0],
            dist.get_world_size(),
            spec,
            used.pop(),
            lambda name: SETTINGS,
            warmup_steps=WARM_UP,
            schedule=schedule,
            warmup_spec=settings.get("warmup_spec", "none"),
            max_norm=settings.get("max_norm"),
            every=settings["sync_every"],
            refreshes=refreshes,
        )
        theirs: list[list[list[Tensor]]] = [[] for _ in reference.ranks]
        for step in range(steps):
            if step == 1:
                reference.lay_out(layouts[1])
            reference.step(step)
            for found, rank in zip(theirs, reference.ranks, strict=True):
                found.append([p.clone() for p in rank.values()])
        told = [theirs]
    dist.broadcast_object_list(told)
    return list(zip(mine, told[0][dist.get_rank()], strict=True))


def beside_one_bit(spec: str) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of 0/1 Adam without local steps, and of 1-bit Adam."""
    ddp, optimizer, _ = attached(spec, sync_every=1)
    zero_one = train(ddp, range(12), optimizer=optimizer).parameters
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    other = OneBitAdamW(ddp.parameters(), **SETTINGS, warmup_steps=WARM_UP)
    commpress.attach(ddp, spec, optimizer=other)
    return zero_one, train(ddp, range(12), optimizer=other).parameters


def shown_synced(
    spec: str, steps: int, settings: dict[str, Any]
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[list[int]], bool, Report]:
    """Parameters after each step; as `synced` shows them; which of them synced in it; whether leaving restored all bits."""
    ddp, optimizer, session = attached(spec, **settings)
    drifted, synced, which, restored = [], [], [], True
    for step in range(steps):
        before = [a.clone() for p in ddp.parameters() if (a := optimizer.state[p].get("anchor")) is not None]
        drifted.append(train(ddp, [step], optimizer=optimizer).parameters)
        with optimizer.synced():
            synced.append(parameters_of(ddp))
        restored &= same(drifted[-1], parameters_of(ddp))
        said = outcome(lambda: failing_inside(optimizer))
        restored &= said == "ZeroDivisionError: inside" and same(drifted[-1], parameters_of(ddp))
        after = [a for p in ddp.parameters() if (a := optimizer.state[p].get("anchor")) is not None]
        which.append([i for i, pair in enumerate(zip(before, after, strict=False)) if not torch.equal(*pair)])
    return drifted, synced, which, restored, session.report()


def failing_inside(optimizer: ZeroOneAdamW) -> None:
    """An error while the model is shown as of its last syncs."""
    with optimizer.synced():
        raise ZeroDivisionError("inside")


def sent_by_step(spec: str, steps: int, sync_every: Growing) -> list[int]:
    """Bytes that each step sent."""
    ddp, optimizer, session = attached(spec, sync_every=sync_every, warmup_steps=1, bucket_cap_mb=25)
    sent = [0]
    for step in range(steps):
        train(ddp, [step], optimizer=optimizer)
        sent.append(session.report().sent_bytes)
    return [b - a for a, b in itertools.pairwise(sent)]


def learning(refresh_every: int, steps: int) -> tuple[list[int], list[Tensor], Report]:
    """The steps behind the warm-up that changed the variance of any parameter; its inverse at the end; what was sent."""
    ddp, optimizer, session = attached("sign", refresh_every=refresh_every)
    changed = []
    for step in range(steps):
        before = [s["inverse"].clone() for s in optimizer.state.values() if "inverse" in s]
        train(ddp, [step], optimizer=optimizer)
        after = [s["inverse"] for s in optimizer.state.values() if "inverse" in s]
        moved = [not torch.equal(one, other) for one, other in zip(before, after, strict=False)]
        assert all(moved) or not any(moved)
        if any(moved):
            changed.append(step)
    return changed, [s["inverse"].clone() for s in optimizer.state.values()], session.report()


def away(one: list[Tensor], other: list[Tensor], by: float) -> float:
    """The share of values that differ by more than this."""
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (one, other))
    return float(((a - b).abs() > by).double().mean())


def require_equal(steps: list[tuple[list[Tensor], list[Tensor]]], lossy: bool) -> None:
    """In every step to rounding.

    Under a lossy codec a few values are coded the other way, which ones depends on how a processor multiplies matrices, and the
    gradients of later steps carry that to the others: a fiftieth of a step.
    """
    for mine, theirs in steps:
        assert away(mine, theirs, LR / 50 if lossy else 2e-5) <= (0.005 if lossy else 0)
    assert away(steps[0][1], steps[-1][1], LR) > 0.5


@pytest.mark.parametrize(("spec", "exchange", "world_size"), [
    slow("none", None, 2), slow("none", None, 3), ("sign", None, 2), ("sign", "two_shot", 3), ("topk(0.1)|sign", None, 2),
])  # fmt: skip
def test_it_is_zero_one_adam(spec: str, exchange: str | None, world_size: int) -> None:
    results = run(world_size, against_reference, spec, exchange, WARM_UP + 17, constant, {"sync_every": 4}, ())
    for steps in results:
        require_equal(steps, spec != "none")
    for after, one, other in zip(range(WARM_UP + 17), results[0], results[1], strict=True):
        drifted = after >= WARM_UP and (after - WARM_UP + 1) % 4 != 0
        assert same(one[0], other[0]) != drifted


@pytest.mark.parametrize(
    ("case", "spec"),
    slowly(
        [(case, spec) for case in ("resting", "clipped", "learning") for spec in ("none", "sign")],
        quick=[("resting", "sign"), ("clipped", "none"), ("learning", "none")],
    ),
)
def test_it_is_zero_one_adam_in_other_settings(case: str, spec: str) -> None:
    schedule = resting if case == "resting" else constant
    settings = {
        "resting": {"sync_every": 4},
        "clipped": {"sync_every": 3, "max_norm": 0.2},
        "learning": {"sync_every": 3, "refresh_every": 2},
    }[case]
    refreshes = LEARNS if case == "learning" else ()
    for steps in run(2, against_reference, spec, None, 23, schedule, settings, refreshes):
        require_equal(steps, spec != "none")
        assert all(finite(mine) for mine, _ in steps)


@pytest.mark.parametrize(("spec", "world_size"), [("sign", 2), slow("topk(0.1)|sign", 3)])
def test_the_variance_learns_from_coded_gradients(spec: str, world_size: int) -> None:
    settings = {"sync_every": 3, "refresh_every": 2, "warmup_spec": "int8"}
    results = run(world_size, against_reference, spec, None, 23, constant, settings, LEARNS)
    for steps in results:
        require_equal(steps, lossy=True)


@pytest.mark.parametrize("spec", [slow("none"), "sign"])
def test_without_local_steps_it_is_one_bit_adam(spec: str) -> None:
    for zero_one, one_bit in run(2, beside_one_bit, spec):
        assert away(zero_one, one_bit, 1e-5) <= (0.005 if spec != "none" else 0)
        assert away(zero_one, parameters_of(network()), LR) > 0.5


@pytest.mark.parametrize(("spec", "world_size", "settings"), [
    slow("sign", 2, {"sync_every": 2}), ("sign", 3, {"sync_every": 2}), ("topk(0.1)|sign", 2, {"sync_every": 3}),
    ("sign", 2, {"sync_every": 3, "refresh_every": 2}),
])  # fmt: skip
def test_a_sync_brings_the_same_bits_back(spec: str, world_size: int, settings: dict[str, Any]) -> None:
    results = run(world_size, shown_synced, spec, WARM_UP + 8, settings)
    drifted, _, which, _, _ = results[0]
    for other, shown, theirs, restored, _ in results:
        assert restored
        assert theirs == which
        assert all(same(a, b) for a, b in zip(shown, results[0][1], strict=True))
        for step in range(WARM_UP, WARM_UP + 8):
            same_here = [i for i in which[step] if same([drifted[step][i]], [other[step][i]])]
            assert same_here == which[step]
            assert same([shown[step][i] for i in which[step]], [drifted[step][i] for i in which[step]])
    if "refresh_every" in settings:
        return  # a refresh after a sync makes the same steps on all ranks
    for step in range(WARM_UP, WARM_UP + 8):
        elsewhere = [i for i in range(6) if i not in which[step]]
        assert elsewhere
        assert not any(same([drifted[step][i]], [results[1][0][step][i]]) for i in elsewhere)


def test_a_part_of_the_buckets_syncs_in_each_step() -> None:
    for _, _, which, _, report in run(2, shown_synced, "sign", WARM_UP + 8, {"sync_every": 2}):
        turns = which[WARM_UP:]
        assert all(turns)
        assert turns == turns[:2] * 4
        assert sorted(turns[0] + turns[1]) == list(range(6))
        rows = [row for row in report.rows if row.values < 6922]
        assert [row.steps for row in rows if row.reason == "a local step"] == [4, 4, 4]
        assert [row.steps for row in rows if not row.reason] == [4, 4, 4]
        assert all(row.sent_bytes == 0 and row.exchange == "none" for row in rows if row.reason == "a local step")
        assert all(row.sent_bytes > 0 and row.spec == "sign" for row in rows if not row.reason)
        assert report.steps == WARM_UP + 8


def test_growing_intervals() -> None:
    growing = Growing(steps=10, first=1, last=4)
    assert [growing.interval(step) for step in (0, 9, 10, 19, 20, 29, 30, 10**9)] == [1, 1, 2, 2, 4, 4, 4, 4]
    assert Growing(5, 3, 7).interval(5) == 6
    assert Growing(5, 3, 7).interval(10) == 7
    sent = run(2, sent_by_step, "sign", 41, growing)[0][1:]
    each = sent[0]
    assert 0 < each < 4 * 6922 / 25
    assert [sum(sent[at : at + 10]) for at in (0, 10)] == [10 * each, 5 * each]
    assert sum(sent[20:40]) == 5 * each
    assert set(sent) == {0, each}


def test_the_variance_goes_on_learning() -> None:
    results = run(2, learning, 2, 23)
    for changed, inverse, report in results:
        assert changed == [step for step in LEARNS if step >= WARM_UP]
        assert same(inverse, results[0][1])
        rows = [row for row in report.rows if row.reason == "the variance is refreshed"]
        assert [row.steps for row in rows] == [len(changed)] * 3
        assert all(row.sent_bytes == row.dense_bytes for row in rows)
    for changed, _, _ in run(2, learning, 0, 23):
        assert changed == []
