"""Checkpoints that survive a crash: all ranks write into a folder for the step, then one small file is switched to it.

    out/latest                      step-00000300
    out/step-00000300/checkpoint.pt          the state that all ranks share, written by rank 0
    out/step-00000300/session-rank0.pt       the state that only rank 0 has, and so on for each rank

Until `latest` is replaced the older folder is complete and counts; then it is removed. Each host that does not share `out`
has the files of its own ranks, and its own `latest` (`run_folder`). The files carry a checksum
(`commpress.files`).
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from commpress.files import DamagedFileError, load_state, save_state, write_atomically

MARKER = "latest"
SHARED = "checkpoint.pt"
NEEDED = {
    SHARED: ("step", "identity", "model", "durations", "curve", "traffic"),
    "session": ("step", "session", "windows", "random"),
}
"""Keys that the shared file, and the file of one rank, must have."""


def write(out: Path, step: int, rank: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Write this rank's part of a checkpoint; rank 0 writes `shared`, too. `weights_only` must be able to load all values.

    It counts once all ranks have written and `publish` was called.
    """
    folder = _folder(out, step)
    folder.mkdir(parents=True, exist_ok=True)
    save_state(_own_file(folder, rank), {**own, "step": step})
    if rank == 0:
        save_state(folder / SHARED, {**shared, "step": step})


def publish(out: Path, step: int) -> None:
    """Make the complete checkpoint of that step the current one, and remove older ones."""
    folder = _folder(out, step)
    write_atomically(out / MARKER, lambda f: f.write(f"{folder.name}\n".encode()))
    for old in out.glob("step-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)  # another rank may remove it, too


def exists(out: Path) -> bool:
    """Whether a complete checkpoint is in `out`."""
    return (out / MARKER).is_file()


def clear(out: Path) -> None:
    """Remove what `save` wrote into `out`, the marker first."""
    (out / MARKER).unlink(missing_ok=True)
    for old in out.glob("step-*"):
        shutil.rmtree(old)


def load_shared(out: Path) -> dict[str, Any]:
    """Return the state that all ranks share, on the CPU; "step" is the number of updates done.

    Raises ValueError if there is none, DamagedFileError (a ValueError) if the file is damaged.
    """
    if not exists(out):
        raise ValueError(f"--resume: no checkpoint in {out}; start without --resume")
    name = _newest(out)
    return _read(out / name / SHARED, name)


def shared_file(out: Path) -> tuple[str, bytes]:
    """Return name and bytes of the newest checkpoint's file, which `load_shared` reads, for ranks that cannot see it."""
    name = _newest(out)
    return name, (out / name / SHARED).read_bytes()


def load_shared_file(name: str, content: bytes) -> dict[str, Any]:
    """Return what `load_shared` returns, from what `shared_file` returned."""
    with tempfile.TemporaryDirectory(prefix="commpress-") as folder:
        out = Path(folder)
        (out / name).mkdir()
        (out / name / SHARED).write_bytes(content)
        (out / MARKER).write_text(f"{name}\n")
        return load_shared(out)


def _newest(out: Path) -> str:
    """Return the folder that the marker names."""
    marker = (out / MARKER).read_bytes()
    if not re.fullmatch(rb"step-\d{8,}\n", marker):
        raise DamagedFileError(
            f"--resume: {out / MARKER}: expected the name of a folder, step-00000300, got {marker!r:.80}"
        )
    return marker.decode().strip()


def load_own(out: Path, step: int, rank: int) -> dict[str, Any]:
    """Return the state of one rank at that step. Raises ValueError if it is missing, damaged or from another step."""
    folder = _folder(out, step)
    return _read(_own_file(folder, rank), folder.name)


def _folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def _own_file(folder: Path, rank: int) -> Path:
    return folder / f"session-rank{rank}.pt"


def _read(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--resume: {path} is missing; the files of a checkpoint must stay together")
    state: Any = load_state(path)
    needed = NEEDED[SHARED if path.name == SHARED else "session"]
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing or not isinstance(state["step"], int):
        raise DamagedFileError(f"{path}: not a checkpoint of this version, it has no {(missing or ['step'])[0]!r}")
    if name != f"step-{state['step']:08d}":
        raise ValueError(f"--resume: {path} was written at step {state['step']}, expected that of {name}")
    return dict(state)
