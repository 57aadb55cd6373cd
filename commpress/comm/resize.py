"""A training that goes on with another number of ranks: nothing that the old ones had withheld is lost.

What the ranks keep counts by its mean: old rank i's goes to new rank i mod W', times W' / W. What an owner of a chunk kept of
a mean counts W-fold. What an optimizer has of its own on each rank becomes the mean of them on all.

Where each rank brings its own state alone (`moved`), what it kept goes with it, times W' / W; that of lost ranks is lost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def resized(states: Sequence[State], rank: int, world_size: int) -> State:
    """The state of a rank among `world_size`, out of `Session.state_dict()` of all ranks of a run, in any order.

    With as many ranks as before it is that rank's own. Raises ValueError if the states are not those of all ranks of one run.
    """
    if not states:
        raise ValueError("cannot restore: no states, expected those of all ranks")
    old = int(states[0]["world_size"])
    by_rank = {int(state["rank"]): state for state in states}
    if sorted(by_rank) != list(range(old)) or len(states) != old:
        raise ValueError(f"cannot restore: states of ranks {sorted(by_rank)}, expected one of each of {old}")
    for key in ("version", "settings", "world_size", "scale"):
        for other, state in by_rank.items():
            if state[key] != by_rank[0][key]:
                raise ValueError(f"cannot restore: rank {other} saved {key} {state[key]!r}, rank 0 {by_rank[0][key]!r}")
    if old == world_size:
        return by_rank[rank]
    mine = [by_rank[i] for i in range(old) if i % world_size == rank]
    share = world_size / old
    buckets = []
    for place, bucket in enumerate(by_rank[0]["buckets"]):  # all ranks have the same layouts in the same order
        parts = [state["buckets"][place] for state in mine]
        kept = {key: _sum([part[key] for part in parts], share) for key in ("residual", "momentum")}
        for part in parts:
            _give_back(kept["residual"], part, old * share)
        buckets.append({"segments": bucket["segments"], "start": 0, "second": None, **kept})
    own = _mean([by_rank[i]["optimizer"] for i in range(old)])
    return {**by_rank[0], "rank": rank, "world_size": world_size, "buckets": buckets, "optimizer": own}


def moved(state: State, rank: int, world_size: int) -> State:
    """The state that a rank saved, for where it is now: `rank` of `world_size`. What it had withheld counts as before."""
    old = int(state["world_size"])
    if (state["rank"], old) == (rank, world_size):
        return state
    buckets = []
    for bucket in state["buckets"]:
        kept = {key: _sum([bucket[key]], world_size / old) for key in ("residual", "momentum")}
        _give_back(kept["residual"], bucket, world_size)
        buckets.append({"segments": bucket["segments"], "start": 0, "second": None, **kept})
    return {**state, "rank": rank, "world_size": world_size, "buckets": buckets}


def _give_back(residual: Tensor | None, bucket: State, times: float) -> None:
    """Add to a new residual what the owner of a chunk in a saved bucket kept of a mean."""
    if bucket["second"] is not None and residual is not None:
        stop = bucket["start"] + bucket["second"].numel()
        residual[bucket["start"] : stop].add_(bucket["second"], alpha=times)


def _sum(parts: Sequence[Tensor | None], share: float) -> Tensor | None:
    """Of those that are there, times `share`; None if there are none."""
    there = [part for part in parts if part is not None]
    return torch.stack(there).sum(dim=0).mul_(share) if there else None


def _mean(states: Sequence[Any]) -> Any:
    """Of tensors in dicts of dicts."""
    if isinstance(states[0], Tensor):
        return torch.stack(tuple(states)).mean(dim=0)
    return None if states[0] is None else {key: _mean([state[key] for state in states]) for key in states[0]}
