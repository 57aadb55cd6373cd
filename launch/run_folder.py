"""The folder of a run, shared by all ranks or separate on each host.

Every rank writes a mark into its --out and looks for the marks of others. Ranks that see each other's marks share the folder;
the lowest of them leads: it writes the small file that names the newest checkpoint, and removes older ones. Rank 0 writes the
state that all ranks share. A host with its own disk has the files of its own ranks, and finds them there on --resume; rank 0's
file reaches the others over the network.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commpress.comm.agreement import gather_settings
from commpress.launch import checkpoint
from commpress.launch.runtime import TrainingError, together
from commpress.launch.settings import Settings
from commpress.notice import global_rank


def require_usable(settings: Settings) -> None:
    """Raise ValueError if --out cannot be written, or if it, --resume and --fork do not fit the files there."""
    out, first = settings.folder, global_rank() == 0  # the other ranks may have no disk in common with the first
    if not settings.resume and holds_checkpoint(out, "--out"):
        raise TrainingError(f"{out} holds the checkpoint of a run: go on with --resume, or give another --out")
    if settings.resume and first and not holds_checkpoint(out, "--out"):
        raise TrainingError(f"--resume: no checkpoint in {out}; start without --resume")
    if settings.fork is not None and first and not holds_checkpoint(settings.fork, "--fork"):
        raise TrainingError(f"--fork {settings.fork}: there is no checkpoint")
    require_writable(out)


def require_writable(out: Path) -> None:
    """Raise ValueError if a folder cannot be made or written to, as far as that can be known without trying."""
    existing = out
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        reason = "" if existing.is_dir() else "Not a directory"
    except OSError as error:
        reason = error.strerror or str(error)
    if not reason and not os.access(existing, os.W_OK | os.X_OK):
        reason = "Permission denied or a read-only disk"
    if reason:
        raise ValueError(f"--out {out}: cannot write to {existing}: {reason}")


def holds_checkpoint(folder: Path, flag: str) -> bool:
    """Return whether a folder has a checkpoint. Raises ValueError that names the flag if the folder cannot be read."""
    try:
        return checkpoint.exists(folder)
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot read: {error.strerror or error}") from None


def leaders(out: Path, device: torch.device) -> list[int]:
    """Make the folder, and return for each rank the leader of those that share it: all 0 if all share it. Collective.

    Raises TrainingError on all ranks if one cannot write to its folder.
    """
    group, rank = dist.distributed_c10d._get_default_group(), dist.get_rank()
    token = gather_settings({"token": secrets.token_hex(8)}, group, device)[0]["token"]
    mark = out / f".rank-{token}-{rank}"

    def leave_mark() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise ValueError(f"--out {out}: cannot write: {error.strerror or error}") from error

    def lowest() -> int:
        return min(int(found.name.rpartition("-")[2]) for found in out.glob(f".rank-{token}-*"))

    try:
        together(leave_mark, device)
        led = together(lowest, device)
        return [int(str(of["led"])) for of in gather_settings({"led": led}, group, device)]
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)


def load_shared(source: Path, device: torch.device) -> dict[str, Any]:
    """Return the shared state in the newest checkpoint of `source`, as rank 0 sees it. Collective.

    Ranks that cannot see it get rank 0's file. Raises TrainingError on all ranks if rank 0 has none.
    """
    rank = dist.get_rank()
    state = together(lambda: checkpoint.load_shared(source) if rank == 0 else {}, device)
    step = torch.tensor([state.get("step", -1)], dtype=torch.int64, device=device)
    dist.broadcast(step, 0)
    own: dict[str, Any] | None = state if rank == 0 else None
    if own is None:
        with contextlib.suppress(ValueError, OSError):
            found = checkpoint.load_shared(source)
            own = found if found["step"] == step.item() else None
    lacking = torch.tensor([float(own is None)], dtype=torch.float32, device=device)
    dist.all_reduce(lacking)
    if not lacking.item():
        assert own is not None
        return own
    name, content = together(
        lambda: checkpoint.shared_file(source) if rank == 0 else (f"step-{int(step):08d}", b""), device
    )
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    data = torch.frombuffer(bytearray(content) if rank == 0 else bytearray(int(size)), dtype=torch.uint8).to(device)
    dist.broadcast(data, 0)
    return own if own is not None else checkpoint.load_shared_file(name, data.cpu().numpy().tobytes())
