"""Checkpoints of a session in frameworks where only rank 0 writes: each rank writes a file of its own beside them.

    FOLDER/commpress-rank0.pt       {"step": the framework's count of steps, "session": session.state_dict()} of rank 0

A framework without a count of steps draws a number for each save instead. If the run follows a recipe, "scheduler" holds the
state of its scheduler, and in rank 0's file "dense" the values that its budget is compared with. Each file carries a checksum
(`commpress.files`).

With the same number of ranks each rank reads only its own file, so hosts need no shared folder. With another number each rank
reads all files.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from commpress.comm.agreement import refuse_on_all, require_agreement
from commpress.comm.session import Session
from commpress.files import load_state, save_state

if TYPE_CHECKING:
    from commpress.hooks.limits import Limits
    from commpress.model import Recipe, Scheduler

State = dict[str, Any]


def content(session: Session, step: int, scheduler: "Scheduler | None" = None, limits: "Limits | None" = None) -> State:
    """Return what this rank's file holds; `step` is the framework's count of steps."""
    state: State = {"step": step, "session": session.state_dict()}
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    if limits is not None and (dense := limits.state_dict()) is not None:
        state["dense"] = dense
    return state


def save(
    session: Session,
    folder: str | Path,
    step: int,
    name: str = "commpress",
    scheduler: "Scheduler | None" = None,
    limits: "Limits | None" = None,
) -> None:
    """Write this rank's file into the folder of a checkpoint. Not collective."""
    path = _path(folder, session.rank, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(path, content(session, step, scheduler, limits))


def load(
    session: Session,
    group: dist.ProcessGroup,
    folder: str | Path,
    step: int,
    name: str = "commpress",
    scheduler: "Scheduler | None" = None,
    limits: "Limits | None" = None,
) -> bool:
    """Restore a session from the folder of a checkpoint. Collective; returns and raises as `restore` does."""
    return restore(session, group, step, lambda rank: read(folder, rank, name), scheduler, limits)


def read(folder: str | Path, rank: int, name: str = "commpress") -> State | None:
    """Return what a rank's file in the folder of a checkpoint holds; None if there is none. Raises DamagedFileError."""
    path = _path(folder, rank, name)
    return load_state(path) if path.is_file() else None


def chosen_recipe(read: Callable[[int], State | None], rank: int) -> "Recipe | None":
    """Return the recipe of a checkpoint whose budget has chosen its entries, by what `read(rank)` finds; None without one.

    A model is prepared by it before the checkpoint is loaded into it. Not collective: what is damaged `restore` tells, on all
    ranks.
    """
    from commpress.model import Recipe

    with contextlib.suppress(ValueError, OSError):
        if (file := read(rank) or read(0)) is not None and "scheduler" in file:
            recipe = Recipe.of(file["scheduler"]["recipe"], "the saved recipe")
            return recipe if recipe.budget is not None and recipe.budget.settled else None
    return None


def restore(
    session: Session,
    group: dist.ProcessGroup,
    step: int,
    read: Callable[[int], State | None],
    scheduler: "Scheduler | None" = None,
    limits: "Limits | None" = None,
) -> bool:
    """Restore a session from saved states; `read(rank)` returns that of a rank, or None. Collective.

    Load model and optimizer first. `group` is the session's process group. A `scheduler` and `limits` are restored before the
    session; if the checkpoint has no scheduler, it begins at `step`. Returns False if nothing was saved. Raises ValueError on
    all ranks if a file is damaged, is missing, or is of another step, and if the checkpoint follows a recipe and the run does
    not.
    """
    try:
        own = read(session.rank)
        first = read(0) if own is None else own
        saved = 0 if first is None else int(first["session"]["world_size"])
        found = {session.rank: own} if saved == session.world_size else {rank: read(rank) for rank in range(saved)}
        states = [_session(file, rank, step) for rank, file in found.items()]
        if limits is not None:
            limits.load_state_dict(None if first is None else first.get("dense"))
    except Exception as error:
        refuse_on_all(error, group, session.device)
    with_recipe = first is not None and "scheduler" in first
    told: dict[str, object] = {
        "number of ranks in the checkpoint": saved,
        "whether the checkpoint has a recipe's state": with_recipe,
    }
    require_agreement(told, group, session.device)
    if with_recipe and scheduler is None:
        raise ValueError(
            "cannot restore: the checkpoint is of a run that follows a recipe, this one has none; expected recipe"
        )
    if scheduler is not None and first is not None and with_recipe:
        scheduler.load_state_dict(first["scheduler"])
    elif scheduler is not None:
        scheduler.begin_at(step)
    if states:
        session.load_state_dict(states[0] if saved == session.world_size else states)
    return bool(states)


def _session(file: State | None, rank: int, step: int) -> State:
    if file is None:
        raise ValueError(f"cannot restore: the checkpoint has no file of rank {rank} for commpress")
    if file["step"] != step:
        raise ValueError(
            f"cannot restore: rank {rank}'s file for commpress is of step {file['step']}, the checkpoint of step {step}"
        )
    state: State = file["session"]
    return state


def _path(folder: str | Path, rank: int, name: str) -> Path:
    return Path(folder) / f"{name}-rank{rank}.pt"
