"""Warnings for the user: one rank gives them for all ranks, at the line of the user's own code; and who this rank is."""

import os
import socket
import sys
import warnings

import torch.distributed as dist

OURS = ("commpress", "torch")
"""Packages whose lines a warning does not point at."""


def global_rank() -> int:
    """Return this process's rank: in the default group, or, before there is one, as its launcher says, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    said = os.environ.get("RANK", "0")
    return int(said) if said.isdecimal() else 0


def host_name() -> str:
    """Return this rank's host name in errors: COMMPRESS_HOST if it is set, as in the network lab, else the system's name."""
    return os.environ.get("COMMPRESS_HOST") or socket.gethostname()


def speaks(*groups: dist.ProcessGroup) -> bool:
    """Return whether this rank warns: it is the first in each of these groups, or, if none is given, of all ranks."""
    return all(dist.get_rank(group) == 0 for group in groups) if groups else global_rank() == 0


def warn(text: str, leads: bool | None = None) -> None:
    """Warn on the rank that leads (None: the first of all ranks); do nothing on the others."""
    if speaks() if leads is None else leads:
        warnings.warn(text, stacklevel=_outside())


def _outside() -> int:
    """Return the `stacklevel` at which a warning names the first line outside the packages of `OURS`, or the outermost line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    return level
