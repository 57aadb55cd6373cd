"""Rows of Muon for `training.py`, and which part of their steps is Newton-Schulz and the coordinates of coarse codes.

Both are work of this rank that no link and no codec changes: what is left of a step beside `no communication` is what the
exchange costs. `no communication` is EF21Muon on each rank's own gradients. `plain DDP` is torch.optim.Muon behind DDP's
all-reduce.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from peers import DENSE, FLOOR, Attached, Way, plain, register
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import _muon as torch_muon

import commpress
from commpress.optim import EF21Muon, eigenbasis, muon
from commpress.optim.muon_groups import groups

SPECS = ("none", "int4", "rotate|sign")
RATE = 1e-4
FIRST = 2
"""Coordinates are chosen after this update, in the steps that do not count; EF21Muon chooses them after the tenth."""
NEWTON_SCHULZ, MOVED, ENTERED = "newton_schulz_seconds", "moved", "entered"
CALLS: tuple[tuple[str, Any, str], ...] = (
    (NEWTON_SCHULZ, muon, "newton_schulz"),
    (NEWTON_SCHULZ, torch_muon, "_zeropower_via_newtonschulz"),
    (MOVED, EF21Muon, "_direction"),
    (MOVED, EF21Muon, "_turn"),
    (ENTERED, EF21Muon, "_enter"),
)
"""What is timed apart. Gradients enter their coordinates beside backward, on the thread that encodes; all else is in `step`."""


def muon_ways(specs: Sequence[str]) -> list[Way]:
    """Return the rows: no communication, dense Muon, and EF21Muon by each of these specs."""
    dense = [Way(FLOOR, "floor", _alone), Way(DENSE, "torch", _dense)]
    return dense + [Way(f"EF21Muon {spec}", "commpress", partial(_behind, spec)) for spec in specs]


def _alone(model: DistributedDataParallel) -> Attached:
    register(noop_hook, model)
    optimizer = EF21Muon(model, lr=RATE)
    optimizer.step_alone()
    return Attached(optimizer=optimizer)


def _dense(model: DistributedDataParallel) -> Attached:
    matrices, others = (group["params"] for group in groups(model))
    adamw = torch.optim.AdamW(others, lr=RATE, fused=True)
    attached = plain(model)
    attached.optimizer = torch.optim.Muon(matrices, lr=RATE)

    def step_others() -> None:
        adamw.step()
        adamw.zero_grad()

    attached.after_step = step_others
    return attached


def _behind(spec: str, model: DistributedDataParallel) -> Attached:
    eigenbasis.FIRST = FIRST
    optimizer = EF21Muon(model, lr=RATE)
    return Attached(session=commpress.attach(model, spec, optimizer=optimizer), optimizer=optimizer)


@contextlib.contextmanager
def apart(finished: Callable[[], None]) -> Iterator[dict[str, float]]:
    """Seconds in each of `CALLS` while the block runs. `finished` returns when the device has done what it was given."""
    seconds = dict.fromkeys((NEWTON_SCHULZ, MOVED, ENTERED), 0.0)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **settings: Any) -> Any:
            finished()
            began = time.perf_counter()
            result = call(*args, **settings)
            finished()
            seconds[name] += time.perf_counter() - began
            return result

        return called

    with contextlib.ExitStack() as stack:
        for name, owner, attribute in CALLS:
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds


def parts_of_steps(times: Sequence[float], parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return what a row says of its steps beside their time; {} for steps without Newton-Schulz.

    Coordinates are means, since each matrix chooses them in another step. The rest is a median of steps: what is neither
    Newton-Schulz nor the coordinates' part in `step`.
    """
    if not any(each[NEWTON_SCHULZ] for each in parts):
        return {}
    rests = [seconds - each[NEWTON_SCHULZ] - each[MOVED] for seconds, each in zip(times, parts, strict=True)]
    return {
        NEWTON_SCHULZ: statistics.median(each[NEWTON_SCHULZ] for each in parts),
        "coordinates_seconds": statistics.mean(each[MOVED] + each[ENTERED] for each in parts),
        "rest_seconds": statistics.median(rests),
    }
