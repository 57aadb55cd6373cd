"""Checkpoints of a session in frameworks where only rank 0 writes: each rank writes a file of its own beside them.

    FOLDER/commpress-rank0.pt       {"step": the framework's count of steps, "session": session.state_dict()} of rank 0

A framework without a count of steps draws a number for each save instead. If the run follows a recipe, "scheduler" holds the
state of its scheduler. Each file carries a checksum (`commpress.files`).

With the same number of ranks each rank reads only its own file, so hosts need no shared folder. With another number each rank
reads all files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from commpress.comm.agreement import refuse_on_all, require_agreement
from commpress.comm.session import Session
from commpress.files import load_state, save_state

if TYPE_CHECKING:
    from commpress.model import Scheduler

State = dict[str, Any]


def content(session: Session, step: int, scheduler: "Scheduler | None" = None) -> State:
    """Return the content of this rank's file; `step` is the framework's count of steps."""
    state = {"step": step, "session": session.state_dict()}
    return state if scheduler is None else {**state, "scheduler": scheduler.state_dict()}


def save(
    session: Session, folder: str | Path, step: int, name: str = "commpress", scheduler: "Scheduler | None" = None
) -> None:
    """Write this rank's file into the folder of a checkpoint. Not collective."""
    path = _path(folder, name, session.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(path, content(session, step, scheduler))


def load(
    session: Session,
    group: dist.ProcessGroup,
    folder: str | Path,
    step: int,
    name: str = "commpress",
    scheduler: "Scheduler | None" = None,
) -> bool:
    """Restore a session from the folder of a checkpoint. Collective; returns and raises as `restore` does."""

    def read(rank: int) -> State | None:
        path = _path(folder, name, rank)
        return load_state(path) if path.is_file() else None

    return restore(session, group, step, read, scheduler)


def restore(
    session: Session,
    group: dist.ProcessGroup,
    step: int,
    read: Callable[[int], State | None],
    scheduler: "Scheduler | None" = None,
) -> bool:
    """Restore a session from saved states; `read(rank)` returns that of a rank, or None. Collective.

    Load model and optimizer first. `group` is the session's process group. A `scheduler` is restored before the session; if
    the checkpoint has no scheduler, it begins at `step`. Returns False if nothing was saved. Raises ValueError on all ranks if
    a file is damaged, is missing, or is of another step, and if the checkpoint follows a recipe and the run does not.
    """
    try:
        own = read(session.rank)
        first = read(0) if own is None else own
        saved = 0 if first is None else int(first["session"]["world_size"])
        found = {session.rank: own} if saved == session.world_size else {rank: read(rank) for rank in range(saved)}
        states = [_session(file, rank, step) for rank, file in found.items()]
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


def _path(folder: str | Path, name: str, rank: int) -> Path:
    return Path(folder) / f"{name}-rank{rank}.pt"
