"""A word of the first rank for all others, as JSON: what arrives runs no code, as a pickle would.

What the first rank does may take longer than the group's timeout, so the others do not wait in an exchange of the group: they
look into the store, in short turns.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from commpress.notice import host_name
from commpress.store import own_store, with_timeout

PAUSE = 0.1
"""Seconds between two looks into the store, at the most: the first ones come sooner."""
SILENCE = 30.0
"""Seconds in which a store that is still there answers, on a host with much else to do."""
_asked = itertools.count()
"""Calls of `done_by_first_rank` in this process; the first rank's number counts, since others may have asked less often."""


class FirstRankError(RuntimeError):
    """An error of the first rank, raised on a rank that waited for it; its text is the first rank's sentence."""


class LostFirstRankError(RuntimeError):
    """The first rank is gone, or the store; the text names rank and host."""


def told_by_first_rank(value: Any, group: dist.ProcessGroup | None, device: torch.device) -> Any:
    """Return the first rank's `value`, which JSON can hold, on all ranks of `group` (None: the default one). Collective.

    Without a process group it is this process's own.
    """
    if not dist.is_available() or not dist.is_initialized():
        return value
    first = 0 if group is None else dist.get_global_rank(group, 0)
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([text.numel()], dtype=torch.int64, device=device)
    dist.broadcast(size, first, group)
    if dist.get_rank(group) != 0:
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(text, first, group)
    return json.loads(bytes(text.tolist()))


def done_by_first_rank(
    action: Callable[[], Any],
    group: dist.ProcessGroup | None,
    device: torch.device,
    in_turn: Callable[[], object] = lambda: None,
) -> Any:
    """Call `action` on the first rank of `group`, however long it takes; return on all ranks what it did, which JSON can hold.

    Collective; `action` must not be. The others call `in_turn` between two looks into the store; it may raise. `device` is one
    that the group sends. Without a process group `action` is called alone.

    Raises on the first rank what the action raises, or TypeError for what JSON cannot hold, and FirstRankError with that
    sentence on the others. These raise LostFirstRankError within half a minute if the first rank took the store with it. A
    launcher that keeps the store itself, as torchrun does, ends the others when it loses a rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return action()
    with contextlib.suppress(RuntimeError, TimeoutError):
        with_timeout(SILENCE, own_store)  # connects while the first rank is there: later it would try for long
    me = {"rank": dist.get_rank(), "host": host_name(), "asked": next(_asked)}
    first = told_by_first_rank(me, group, device)
    key = f"commpress/first rank/{first['rank']}/{first['asked']}"
    if dist.get_rank(group) == 0:
        said = _called(action, key, group, device)
    else:
        said = json.loads(_word(key, f"rank {first['rank']} ({first['host']})", in_turn))
    _meet(group, device)
    if "failed" in said:
        raise FirstRankError(said["failed"])
    return said["returned"]


def _called(
    action: Callable[[], Any], key: str, group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, Any]:
    """Do it, and leave a word on what came of it."""
    store = dist.distributed_c10d._get_default_store()
    try:
        said = {"returned": action()}
        text = json.dumps(said)
    except BaseException as error:  # the others wait for its word, whatever it met
        store.set(key, json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        with contextlib.suppress(RuntimeError):  # its own error counts, not that another rank is gone
            _meet(group, device)
        raise
    store.set(key, text)
    return said


def _word(key: str, first: str, in_turn: Callable[[], object]) -> str:
    """Wait for the word of the first rank."""

    def look() -> bytes | None:
        store = own_store()
        return store.get(key) if store.check([key]) else None

    pause = PAUSE / 100
    while True:
        try:
            found = with_timeout(SILENCE, look)
        except (RuntimeError, TimeoutError) as error:
            told = " ".join(str(error).split())
            raise LostFirstRankError(f"lost {first}, or the store, while it waited for it: {told}") from error
        if found is not None:
            return found.decode()
        in_turn()
        time.sleep(pause := min(2 * pause, PAUSE))


def _meet(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Wait until all ranks are here: the first one may hold the store, and stays until all have read it."""
    here = torch.zeros(1, dtype=torch.float32, device=device)
    dist.all_reduce(here, group=group)
    here.item()  # on an accelerator it waits only now
