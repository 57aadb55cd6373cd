"""Training that continues with another number of ranks: no residual of the old ranks is lost.

The mean of the residuals counts: the residual of old rank i goes to new rank i mod W', times W' / W. The residual of a chunk's
owner counts W times. The state that an optimizer has on each rank is replaced by its mean over the old ranks.

If each rank has only its own state (`moved`), it keeps its residual, times W' / W; the residuals of missing ranks are lost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from commpress.comm.feedback import Memory

State = dict[str, Any]
Memories = list[dict[str, Any]]
"""The return type of `Feedback.state_dict`."""
SUMMED = ("residual", "momentum")
"""Entries of a memory that add up over the ranks."""
OF_RANK = ("rank", "optimizer", "memories", "versions", "side traffic")
"""Entries of a state that differ from rank to rank."""


def summary(state: State) -> State:
    """Return the summary of a state that ranks compare before they restore it (JSON values): run, step, layout of the buckets.

    Raises KeyError for a state that lacks an entry.
    """
    needed = [(bucket, {"owner_start", "owner_residual"}) for memories in state["memories"] for bucket in memories]
    for holder, keys in [(state, {"optimizer", "scale", "step", "side traffic"}), *needed]:
        if lost := keys - holder.keys():
            raise KeyError(*sorted(lost))
    layouts = [
        [
            {"segments": [list(part) for part in bucket["segments"]], "draws": bucket.get("draws", 0)}
            | {key: bucket[key] is not None for key in SUMMED}
            | {"factors": bool(bucket.get("factors"))}
            for bucket in memories
        ]
        for memories in state["memories"]
    ]
    versions = [[[v["segments"], v["own"].numel()] for v in known] for known in state.get("versions", ())]
    alike = {key: value for key, value in state.items() if key not in OF_RANK}
    return alike | {"layouts": layouts, "versions of": versions}


def unreadable(error: Exception) -> Exception:
    """Return the error to raise on all ranks if one cannot read a state: the error itself if commpress raised it."""
    if isinstance(error, ValueError | TypeError):
        return error
    what = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
    return ValueError(
        f"cannot restore: the state is damaged, or something else ({what}); expected what state_dict() returned on this rank"
    )


def require_one_run(everyone: Sequence[State]) -> State:
    """Return the common summary of all ranks that restore a state. Raises ValueError, with both values, if they differ."""
    for rank, other in enumerate(everyone):
        if "error" in other:
            raise ValueError(f"rank {rank}: {other['error']}")
    holders = [rank for rank, other in enumerate(everyone) if "nothing" not in other]
    if not holders:
        raise ValueError("cannot restore: no rank has a state, expected at least one with a state")
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
    """Raise ValueError, with both values, if an entry of a state is not the expected one."""
    for key, value in expected.items():
        if state.get(key) != value:
            raise ValueError(f"cannot restore: the saved state has {key} {state.get(key)!r}, this run has {value!r}")


def share(states: Sequence[State], rank: int, world_size: int) -> list[State]:
    """Return the states from which `rank` of `world_size` continues; `states` are those of all old ranks, in any order.

    With the same number of ranks it is only the rank's own. Raises ValueError if the states are not those of all ranks of one
    run.
    """
    if not states:
        raise ValueError("cannot restore: no states, expected those of all ranks")
    old = int(states[0]["world_size"])
    by_rank = {int(state["rank"]): state for state in states}
    if sorted(by_rank) != list(range(old)) or len(states) != old:
        raise ValueError(f"cannot restore: states of ranks {sorted(by_rank)}, expected one of each of {old}")
    for key in (key for key in by_rank[0] if key not in OF_RANK):
        for other, state in by_rank.items():
            if state.get(key) != by_rank[0].get(key):
                raise ValueError(
                    f"cannot restore: rank {other} saved {key} {state.get(key)!r}, rank 0 {by_rank[0].get(key)!r}"
                )
    return [by_rank[i] for i in range(old) if i % world_size == rank % world_size]


def of_replicas(memories: list[Memories], old: int) -> list[Memories]:
    """Return the memories of one of `old` replicas with the residuals of its slices and chunks added to the first residual."""
    return [[_folded(bucket, old) for bucket in buckets] for buckets in memories]


def empty_memories(first: State) -> list[Memories]:
    """Return empty memories in the layouts of a summary, for a rank that has no state."""
    nothing = {"owner_start": 0, "owner_residual": None, **dict.fromkeys(SUMMED)}
    return [
        [{"segments": bucket["segments"], "draws": bucket["draws"], **nothing} for bucket in buckets]
        for buckets in first["layouts"]
    ]


def merged_memories(mine: Sequence[list[Memories]], times: float) -> list[Memories]:
    """Return the sum of several ranks' memories in the same layouts, multiplied by `times`."""
    total = []
    for of_collectives in zip(*mine, strict=True):
        buckets = []
        for parts in zip(*of_collectives, strict=True):
            kept = {key: _sum([part[key] for part in parts], times) for key in SUMMED}
            alike = {"segments": parts[0]["segments"], "draws": parts[0].get("draws", 0)}
            alike["factors"] = parts[0].get("factors", [])
            buckets.append({**alike, "owner_start": 0, "owner_residual": None, **kept})
        total.append(buckets)
    return total


def moved(state: State, rank: int, world_size: int) -> State:
    """Return a saved state for the rank's new place, `rank` of `world_size`. Its residual counts as before in the mean."""
    old = int(state["world_size"])
    if (state["rank"], old) == (rank, world_size):
        return state
    return {
        **state,
        "rank": rank,
        "world_size": world_size,
        "groups": [world_size],
        "memories": merged_memories([of_replicas(state["memories"], old)], world_size / old),
    }


def require_same_parameters(saved: dict[str, int], present: dict[str, int]) -> None:
    """Raise ValueError, with both values, if a parameter has another size in a saved state than now."""
    for name in sorted(saved.keys() | present.keys()):
        if saved.get(name) != present.get(name):
            raise ValueError(
                f"cannot restore: parameter {name!r} has {saved.get(name, 'no')} values in the saved state, "
                f"{present.get(name, 'no')} in the model"
            )


def _folded(bucket: State, world_size: int) -> State:
    memory = Memory.saved(bucket, torch.device("cpu"))
    memory.give_back(world_size)
    return {**bucket, **memory.state(), "owner_start": 0}


def _sum(parts: Sequence[Tensor | None], share: float) -> Tensor | None:
    """Return the sum of the parts that are not None, times `share`; None if all are."""
    there = [part for part in parts if part is not None]
    return torch.stack(there).sum(dim=0).mul_(share) if there else None
