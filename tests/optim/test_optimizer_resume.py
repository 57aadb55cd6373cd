"""What may interrupt a compressed optimizer leaves no trace: a restart, and a step that a loss scaler skips."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    SMALL_BUCKETS,
    WIDTH,
    Trained,
    finite,
    gradients_of,
    loss_of,
    network,
    parameters_of,
    same,
    same_training,
)

import commpress
from commpress.comm.segments import Segment
from commpress.optim import DGC, EF21Muon, OneBitAdamW, ZeroOneAdamW, norm
from commpress.optim.base import CompressedOptimizer
from commpress.optim.eigenbasis import LONG

WARM_UP = 3
AFTER = 6
"""Steps that a resumed run goes on: every bucket is synced and refreshed in them."""
WAYS: dict[str, dict[str, Any]] = {
    "one bit": {"warmup_steps": WARM_UP},
    "one bit after int4": {"warmup_steps": WARM_UP, "warmup_spec": "int4"},
    "one bit clipped": {"warmup_steps": WARM_UP, "max_norm": 0.3},
    "zero one": {"warmup_steps": WARM_UP, "sync_every": 4},
    "zero one refreshed": {"warmup_steps": WARM_UP, "sync_every": 3, "refresh_every": 2},
    "zero one refreshed by int4": {
        "warmup_steps": WARM_UP,
        "warmup_spec": "int4",
        "sync_every": 3,
        "refresh_every": 2,
    },
    "dgc": {"weight_decay": 0.01},
    "dgc warming up": {"warmup_steps": 15, "nesterov": True, "max_norm": 0.3},
    "muon": {},
    "muon clipped": {"max_norm": 0.3, "others_spec": "none"},
    "muon in other coordinates": {"others_spec": "none"},
}
"""Settings by name; its first words say which optimizer."""


def started(
    way: str, spec: str, seed: int = 0, exchange: str | None = None, **attaching: Any
) -> tuple[DistributedDataParallel, CompressedOptimizer, commpress.Session]:
    """A network, its optimizer in two groups, and its session."""
    model = network(seed, width=LONG if way == "muon in other coordinates" else WIDTH)
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS)
    if way.startswith("muon"):
        muon = EF21Muon(ddp, lr=0.01, **WAYS[way])
        return ddp, muon, commpress.attach(ddp, spec, optimizer=muon, exchange=exchange, **attaching)
    kind = {"one": OneBitAdamW, "zero": ZeroOneAdamW, "dgc": DGC}[way.split()[0]]
    first, rest = list(ddp.module[0].parameters()), list(ddp.module[1:].parameters())
    lr = 0.1 if kind is DGC else 0.01
    optimizer = kind([{"params": first, "lr": lr}, {"params": rest, "weight_decay": 0.1}], lr=lr / 2, **WAYS[way])
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer, exchange=exchange, **attaching)


def decaying(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that is another in each step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: range
) -> Trained:
    """Train; the parameters after every step are what is kept."""
    history = Trained([])
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()
        history.gradients += [gradients_of(model), list(parameters_of(model))]
    history.parameters = parameters_of(model)
    return history


@dataclass
class Resumed:
    """Steps from a checkpoint on, unbroken and by other objects; what the session has saved, and whether it is needed."""

    unbroken: Trained
    pieced: Trained
    same_without_memory: bool
    saved: dict[str, Any]


def interrupted(way: str, spec: str, exchange: str | None, ats: Sequence[int], folder: str) -> list[Resumed]:
    """Train with a checkpoint before each of the steps `ats`, and again from each of them on."""
    ddp, optimizer, session = started(way, spec, exchange=exchange)
    schedule = decaying(optimizer)
    parts = {"model": ddp.module, "optimizer": optimizer, "session": session, "schedule": schedule}
    whole = []
    last = 17 if way == "muon in other coordinates" else 11
    for step in range(min(last, max(ats) + AFTER)):
        if step in ats:
            torch.save(
                {name: part.state_dict() for name, part in parts.items()}, f"{folder}/{step}.{dist.get_rank()}.pt"
            )
        whole.append(trained(ddp, optimizer, schedule, range(step, step + 1)))

    found = []
    for at in ats:
        state = torch.load(f"{folder}/{at}.{dist.get_rank()}.pt", weights_only=True)
        pieced = []
        for complete in (True, False):
            ddp, optimizer, session = started(way, spec, seed=99, exchange=exchange)
            schedule = decaying(optimizer)
            ddp.module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            if complete:
                session.load_state_dict(state["session"])
            elif isinstance(optimizer, EF21Muon):  # it does not go on at all
                said = outcome(lambda ddp=ddp: loss_of(ddp, at).backward())  # type: ignore[misc]  # noqa: B023
                assert "a state was loaded without the session's" in said
                continue
            pieced.append(trained(ddp, optimizer, schedule, range(at, min(last, at + (AFTER if complete else 4)))))
        steps = [whole[at : at + len(part.gradients) // 2] for part in pieced]
        starts = [Trained(part[-1].parameters, [g for one in part for g in one.gradients]) for part in steps]
        same_without = len(pieced) > 1 and same_training(starts[1], pieced[1])
        found.append(Resumed(starts[0], pieced[0], same_without, state["session"]))
    return found


@pytest.mark.parametrize(("way", "spec", "exchange", "ats", "world_size"), [
    slow("one bit", "sign", None, [2, 3, 7], 2),  # in the warm-up, at the switch, behind it
    ("one bit", "topk(0.1)|sign", None, [7], 3),
    slow("one bit after int4", "sign", None, [2, 3], 2),
    slow("one bit after int4", "int4", "two_shot", [3], 3),
    slow("one bit clipped", "sign", None, [2, 7], 2),
    slow("zero one", "sign", None, [3, 5], 2),  # at the switch, between syncs
    ("zero one", "sign", "two_shot", [6], 3),
    slow("zero one", "topk(0.1)|sign", None, [8], 3),
    slow("zero one", "none", None, [6], 2),
    slow("zero one refreshed", "sign", None, [5, 7], 2),
    slow("zero one refreshed by int4", "sign", "two_shot", [5], 3),
    slow("zero one refreshed by int4", "topk(0.1)|sign", None, [7], 2),
    ("dgc", "topk(0.1)", None, [4], 2),
    slow("dgc", "topk(0.1)|int4", None, [5], 3),
    slow("dgc warming up", "topk(0.01)", None, [5], 2),
    ("muon", "sign", None, [3], 2),
    slow("muon", "topk(0.1)|sign", None, [4], 3),
    slow("muon clipped", "int2", "two_shot", [5], 3),
    slow("muon in other coordinates", "int4", "two_shot", [11, 13], 3),  # some of its matrices are in them, then all
])  # fmt: skip
def test_resumed_is_unbroken(
    way: str, spec: str, exchange: str | None, ats: list[int], world_size: int, tmp_path: Path
) -> None:
    for places in run(world_size, interrupted, way, spec, exchange, ats, str(tmp_path)):
        for at, place in zip(ats, places, strict=True):
            assert len(place.saved["memories"][0]) >= 3  # a new DDP module starts with a single bucket
            assert same_training(place.unbroken, place.pieced), f"from step {at} on"
            assert finite(place.unbroken.parameters)
            memories = place.saved["memories"][0]
            kept = any(bucket[key] is not None for bucket in memories for key in ("residual", "momentum"))
            drifts = any(bool(own["total"].any()) for own in (place.saved["optimizer"] or {}).values())
            assert not ((kept or drifts) and place.same_without_memory), f"from step {at} on"


# a step that a loss scaler skips


def scaled_steps(
    way: str, spec: str, exchange: str | None, steps: Sequence[int], bad: Sequence[int]
) -> tuple[Trained, list[bool], list[str]]:
    """Train under a loss scale. At the places `bad` of `steps`, rank 1 has an Inf in its gradient.

    Returns the parameters after each step that was not bad, whether the bad ones changed anything, and what was changed.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    ddp, optimizer, session = started(way, spec, exchange=exchange, grad_scaler=scaler)
    spoils = [False]

    def spoil(gradient: Tensor) -> Tensor | None:
        if not spoils[0]:
            return None
        spoilt = gradient.clone()
        spoilt.view(-1)[5] = torch.inf
        return spoilt

    ddp.module[2].weight.register_hook(spoil)
    history, skipped, moved = Trained([]), [], []
    for place, step in enumerate(steps):
        spoils[0] = place in bad and dist.get_rank() == 1
        before = parameters_of(ddp), copy.deepcopy(optimizer.state_dict()), scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        if place not in bad:
            history.gradients.append(list(parameters_of(ddp)))
            continue
        skipped.append(scaler.get_scale() == before[2] / 2)
        if not same(before[0], parameters_of(ddp)):
            moved.append("parameters")
        if differences(before[1], optimizer.state_dict()):
            moved.append("optimizer")
    history.parameters = parameters_of(ddp)
    state = session.state_dict()
    memories = [bucket[key] for bucket in state["memories"][0] for key in ("residual", "owner_residual", "momentum")]
    history.extra = [None if kept is None else kept / state["scale"] for kept in memories]
    return history, skipped, moved


def differences(one: Any, other: Any) -> bool:
    """Whether two nested states differ in any bit."""
    if isinstance(one, Tensor):
        return not same([one], [other])
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(differences(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) != len(other) or any(differences(a, b) for a, b in zip(one, other, strict=True))
    return bool(one != other)


def with_and_without(
    way: str, spec: str, exchange: str | None, bad: Sequence[int], steps: int
) -> tuple[Trained, Trained, list[bool], list[str]]:
    """A training with bad steps, and one in which those never were."""
    with_bad, skipped, moved = scaled_steps(way, spec, exchange, range(steps), bad)
    good = [step for step in range(steps) if step not in bad]
    without, _, _ = scaled_steps(way, spec, exchange, good, [])
    return with_bad, without, skipped, moved


@pytest.mark.parametrize(("way", "spec", "exchange", "bad", "world_size"), [
    ("one bit", "sign", None, [2, 4], 2),  # in the warm-up, and the first one behind it
    slow("one bit", "sign", "two_shot", [6, 7], 3),
    slow("one bit", "topk(0.1)|sign", None, [6], 2),
    slow("one bit after int4", "sign", None, [2, 4], 3),
    slow("one bit after int4", "int4", None, [3, 4, 8], 2),
    slow("one bit clipped", "sign", None, [2, 6], 2),
    ("zero one", "sign", None, [2, 4, 6, 8, 10], 2),  # each of four steps has other buckets for its sync
    slow("zero one", "topk(0.1)|sign", "two_shot", [5, 8], 3),
    slow("zero one refreshed", "sign", None, [4, 5], 2),
    slow("zero one refreshed by int4", "sign", "two_shot", [3, 4], 3),
    slow("zero one refreshed by int4", "sign", None, [6, 7], 2),
    ("dgc", "topk(0.1)", None, [4], 2),
    slow("dgc", "topk(0.1)", None, [2, 5, 6], 3),
    slow("dgc warming up", "topk(0.01)", None, [4, 7], 2),
    ("muon", "sign", "two_shot", [2, 5], 2),
    slow("muon clipped", "topk(0.1)|sign", None, [4], 3),
])  # fmt: skip
def test_a_skipped_step_never_was(way: str, spec: str, exchange: str | None, bad: list[int], world_size: int) -> None:
    """All scales are powers of two, so the bits are the same whatever the scale is."""
    steps = bad[-1] + 5
    results = run(world_size, with_and_without, way, spec, exchange, bad, steps)
    for with_bad, without, skipped, moved in results:
        assert skipped == [True] * len(bad)
        assert moved == []
        assert all(same(one, other) for one, other in zip(with_bad.gradients, without.gradients, strict=True))
        assert len(without.gradients) == steps - len(bad)
        assert same(with_bad.parameters, without.parameters)
        assert finite(with_bad.parameters)
        assert same(with_bad.extra, without.extra)
    if not way.startswith("zero"):
        for with_bad, _, _, _ in results[1:]:
            assert same_training(with_bad, results[0][0])


class Resting(nn.Module):
    """A network between two layers that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.layers = network()
        self.behind = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the network."""
        return self.layers(x)  # type: ignore[no-any-return]


def skipped_at_rest(steps: int) -> tuple[list[list[Tensor]], list[float]]:
    """Parameters, as of their last syncs, and scale after each step, of which each second one has an Inf on rank 1."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Resting()
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=True)
    optimizer = ZeroOneAdamW(ddp.parameters(), lr=0.01, warmup_steps=1, sync_every=4)
    commpress.attach(ddp, "sign", optimizer=optimizer, grad_scaler=scaler)
    history, scales = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(ddp, step)
        spoilt = step % 2 == 1 and dist.get_rank() == 1
        scaler.scale(loss * torch.inf if spoilt else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with optimizer.synced():
            history.append(parameters_of(ddp))
        scales.append(scaler.get_scale())
    return history, scales


def test_all_skip_though_parameters_are_not_used() -> None:
    results = run(2, skipped_at_rest, 12)
    for history, scales in results:
        assert scales == [1024.0 / 2 ** ((step + 1) // 2) for step in range(12)]
        assert all(same(one, other) for one, other in zip(history, results[0][0], strict=True))
        assert finite(history[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_max_norm_clips_by_the_same_bits_in_all_layouts(dtype: torch.dtype) -> None:
    """The first step of a resumed run may have other buckets than the same step of the unbroken one."""
    draw, lengths = torch.Generator().manual_seed(0), {"a": 1001, "b": 3, "c": 4098, "d": 515}
    for _ in range(20):
        parts = {f"{name}.weight": torch.randn(n, generator=draw).to(dtype) for name, n in lengths.items()}
        found = set()
        for layout in (["abcd"], ["d", "c", "b", "a"], ["ac", "bd"]):
            optimizer = EF21Muon([{"params": [nn.Parameter(torch.zeros(2, 2))], "muon": True}], max_norm=1.0)
            for names in layout:
                segments = tuple(Segment(f"{name}.weight", lengths[name]) for name in names)
                optimizer.on_bucket(torch.cat([parts[one.name] for one in segments]), segments)
            optimizer.on_all_buckets()
            found.add(optimizer._clip)
        assert len(found) == 1
        assert min(found) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_part_is_summed_from_a_place_of_its_own(dtype: torch.dtype) -> None:
    """A GPU sums the values before a multiple of 16 bytes apart; a CPU gives the same bits from anywhere."""
    segments = tuple(Segment(str(number), n) for number, n in enumerate((1001, 3, 98)))
    bucket, summed = torch.ones(1102, dtype=dtype), []

    def noted(values: Tensor) -> Tensor:
        summed.append(values.data_ptr() % norm.ALIGNED)
        return values.square().sum().sqrt()

    with mock.patch.object(torch.linalg, "vector_norm", noted):
        assert norm.norm_of([(bucket, segments)]) == pytest.approx(1102**0.5)
    assert bucket[1001:].data_ptr() % norm.ALIGNED
    assert summed == [0] * 4
