"""A word of the first rank for all others, as JSON: what arrives runs no code, as a pickle would."""

import json
from typing import Any

import torch
import torch.distributed as dist


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
