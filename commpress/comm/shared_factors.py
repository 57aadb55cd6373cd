"""The factors of `powersgd(r)` for ranks that continue without a state of their own: rank 0 sends them."""

import json
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.resize import Memories


def share_factors(memories: list[Memories], group: dist.ProcessGroup, device: torch.device) -> None:
    """Send rank 0's factors, which all saved ranks share, to the ranks that have no state. Collective.

    Names and shapes are sent as JSON, values as float32, so that reading them runs no code.
    """
    send = partial(_from_first, group=group)
    kept = [[one.get("factors", ()) for one in buckets] for buckets in memories]
    layout = json.dumps([[[[name, list(q.shape)] for name, q in of] for of in buckets] for buckets in kept]).encode()
    length = send(torch.tensor([len(layout)], dtype=torch.int64, device=device), 1)
    text = send(torch.tensor(list(layout), dtype=torch.uint8, device=device), int(length))
    shapes = json.loads(bytes(text.tolist()))
    values = [q.reshape(-1).to(device) for buckets in kept for of in buckets for _, q in of]
    n = sum(prod(shape) for buckets in shapes for of in buckets for _, shape in of)
    flat, at = send(torch.cat([torch.empty(0, dtype=torch.float32, device=device), *values]), n), 0
    for buckets, found in zip(memories, shapes, strict=True):
        for bucket, of in zip(buckets, found, strict=True):
            bucket["factors"] = []
            for name, shape in of:
                bucket["factors"].append([name, flat[at : at + prod(shape)].view(shape).cpu()])
                at += prod(shape)


def _from_first(x: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
    """Return the `n` values of x on the first rank of a group: [n]. Collective."""
    found = x if dist.get_rank(group) == 0 else torch.empty(n, dtype=x.dtype, device=x.device)
    if n:
        dist.broadcast(found, dist.get_global_rank(group, 0), group=group)
    return found
