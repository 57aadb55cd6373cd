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


def summary(state: State) -> State:
    """What ranks compare of the states that they restore (JSON values): the run, the step, the layout of the buckets.

    Raises KeyError for a state that lacks anything which is restored.
    """
    for holder, keys in [(state, {"optimizer"}), *((bucket, {"start", "second"}) for bucket in state["buckets"])]:
        if lost := keys - holder.keys():
            raise KeyError(*sorted(lost))
    buckets = [
        {"segments": [list(part) for part in bucket["segments"]]}
        | {key: bucket[key] is not None for key in ("residual", "momentum")}
        for bucket in state["buckets"]
    ]
    return {key: state[key] for key in ("version", "settings", "world_size", "step", "scale")} | {"buckets": buckets}


def unreadable(error: Exception) -> Exception:
    """Return what to raise on all ranks where one cannot read a state: the error itself if it is a sentence of ours."""
    if isinstance(error, ValueError | TypeError):
        return error
    what = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
    return ValueError(
        f"cannot restore: the state is damaged, or another thing ({what}); expected what state_dict() returned on this rank"
    )


def require_one_run(everyone: Sequence[State]) -> State:
    """The summary that all ranks have which restore anything. Raises ValueError, with both values, if they differ."""
    for rank, other in enumerate(everyone):
        if "error" in other:
            raise ValueError(f"rank {rank}: {other['error']}")
    holders = [rank for rank, other in enumerate(everyone) if "nothing" not in other]
    if not holders:
        raise ValueError("cannot restore: no rank has a state, expected at least one that has")
    first = everyone[holders[0]]
    for rank in holders:
        for key, value in first.items():
            if everyone[rank].get(key) != value:
                raise ValueError(
                    f"cannot restore: rank {rank}'s state has {key} {everyone[rank].get(key)!r}, rank {holders[0]}'s has "
                    f"{value!r}; expected session.state_dict() of every rank, saved at one step"
                )
    alone = [rank for rank in range(len(everyone)) if rank not in holders]
    if alone and int(first["world_size"]) >= len(everyone):
        raise ValueError(
            f"cannot restore: rank {alone[0]} has no state, rank {holders[0]} has one of step {first['step']}; expected "
            "session.state_dict() of every rank"
        )
    return first


def require_same_values(expected: State, state: State) -> None:
    """Raise ValueError, with both values, if a state has other ones than expected."""
    for key, value in expected.items():
        if state.get(key) != value:
            raise ValueError(f"cannot restore: the saved state has {key} {state.get(key)!r}, this run has {value!r}")


def share(states: Sequence[State], rank: int, world_size: int) -> list[State]:
    """Which states of a run's ranks, in any order, a rank among `world_size` goes on with.

    With as many ranks as before its own alone. Raises ValueError if the states are not those of all ranks of one run.
    """
    if not states:
        raise ValueError("cannot restore: no states, expected those of all ranks")
    old = int(states[0]["world_size"])
    by_rank = {int(state["rank"]): state for state in states}
    if sorted(by_rank) != list(range(old)) or len(states) != old:
        raise ValueError(f"cannot restore: states of ranks {sorted(by_rank)}, expected one of each of {old}")
    for key in ("version", "settings", "world_size", "step", "scale"):
        for other, state in by_rank.items():
            if state.get(key) != by_rank[0].get(key):
                raise ValueError(
                    f"cannot restore: rank {other} saved {key} {state.get(key)!r}, rank 0 {by_rank[0].get(key)!r}"
                )
    return [by_rank[i] for i in range(old) if i % world_size == rank % world_size]


def merged(mine: Sequence[State], first: State, rank: int, world_size: int) -> State:
    """The state of a rank among `world_size` out of its share of those of another number; `first` is the summary of all."""
    old = int(first["world_size"])
    times = world_size / old
    buckets = []
    for place, bucket in enumerate(first["buckets"]):  # all ranks have the same layouts in the same order
        parts = [state["buckets"][place] for state in mine]
        kept = {key: _sum([part[key] for part in parts], times) for key in ("residual", "momentum")}
        for part in parts:
            _give_back(kept["residual"], part, old * times)
        buckets.append({"segments": bucket["segments"], "start": 0, "second": None, **kept})
    return {**first, "rank": rank, "world_size": world_size, "buckets": buckets}


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
