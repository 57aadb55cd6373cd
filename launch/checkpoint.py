"""Checkpoints that a crash cannot tear: all ranks write into one folder a step, then one small file is switched to it.

    out/latest                      step-00000300
    out/step-00000300/checkpoint.pt          what all ranks share, written by rank 0
    out/step-00000300/session-rank0.pt       what rank 0 alone has, and so on for each rank

Until `latest` is replaced the older folder is complete and counts; afterwards it is removed. `out` must be on a file
system that all hosts see. The files carry a checksum (`commpress.files`).
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from commpress.files import DamagedFileError, load_state, save_state, write_atomically

MARKER = "latest"


def save(out: Path, step: int, rank: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Write a checkpoint. Collective; `shared` is taken from rank 0. Values are those that `weights_only` loads."""
    folder = _folder(out, step)
    folder.mkdir(parents=True, exist_ok=True)
    save_state(_own_file(folder, rank), {**own, "step": step})
    if rank == 0:
        save_state(folder / "checkpoint.pt", {**shared, "step": step})
    dist.barrier()  # all parts are there
    if rank == 0:
        write_atomically(out / MARKER, lambda f: f.write(f"{folder.name}\n".encode()))
        for old in out.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)


def exists(out: Path) -> bool:
    """Whether a complete checkpoint is in `out`."""
    return (out / MARKER).is_file()


def clear(out: Path) -> None:
    """Remove what `save` wrote into `out`, the marker first."""
    (out / MARKER).unlink(missing_ok=True)
    for old in out.glob("step-*"):
        shutil.rmtree(old)


def load_shared(out: Path) -> dict[str, Any]:
    """What all ranks share, on the CPU; "step" is the number of updates done.

    Raises ValueError if there is none, DamagedFileError, one of them, if what there is is not what was written.
    """
    if not exists(out):
        raise ValueError(f"--resume: no checkpoint in {out}; start without --resume")
    marker = (out / MARKER).read_bytes()
    if not re.fullmatch(rb"step-\d{8,}\n", marker):
        raise DamagedFileError(
            f"--resume: {out / MARKER}: expected the name of a folder, step-00000300, got {marker!r:.80}"
        )
    name = marker.decode().strip()
    return _read(out / name / "checkpoint.pt", name)


def load_own(out: Path, step: int, rank: int) -> dict[str, Any]:
    """What one rank alone has at that step. Raises ValueError if it is missing, damaged or of another step."""
    folder = _folder(out, step)
    return _read(_own_file(folder, rank), folder.name)


def _folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def _own_file(folder: Path, rank: int) -> Path:
    return folder / f"session-rank{rank}.pt"


def _read(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--resume: {path} is missing; all hosts must see one --out, and its files must stay together")
    state: dict[str, Any] = load_state(path)
    if name != f"step-{state['step']:08d}":
        raise ValueError(f"--resume: {path} was written at step {state['step']}, expected that of {name}")
    return state
