"""A word of the first rank for all others, as JSON: what arrives runs no code, as a pickle would."""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

PAUSE = 0.1
"""Seconds between two looks into the store."""
STAYS = 60.0
"""Seconds in which all have read the first rank's word, if they live."""
_calls: dict[str, "itertools.count[int]"] = defaultdict(itertools.count)
"""Calls of `done_by_first_rank` by the name of a group, which all its ranks make in the same order."""


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


def done_by_first_rank(action: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """Call `action` on the first rank of `group`, however long it takes; return on all ranks what it did, which JSON can hold.

    Collective. The others wait by the store, since an exchange of the group has a deadline, which may be a minute. What the
    action raises is a RuntimeError with its sentence on the others. Without a process group it is called alone.
    """
    if not dist.is_available() or not dist.is_initialized():
        return action()
    group = dist.distributed_c10d._get_default_group() if group is None else group
    store = dist.distributed_c10d._get_default_store()
    key = f"commpress/first rank/{group.group_name}/{next(_calls[group.group_name])}"
    if dist.get_rank(group) != 0:
        while not store.check([key]):
            time.sleep(PAUSE)
        said = json.loads(store.get(key))
        store.add(f"{key}/read", 1)
        if "failed" in said:
            raise RuntimeError(said["failed"])
        return said["returned"]
    try:
        said = {"returned": action()}
        text = json.dumps(said)
    except BaseException as error:  # the others wait for its word, whatever it met
        store.set(key, json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        raise
    store.set(key, text)
    until = time.monotonic() + STAYS  # it may hold the store
    while store.add(f"{key}/read", 0) < dist.get_world_size(group) - 1 and time.monotonic() < until:
        time.sleep(PAUSE)
    return said["returned"]
