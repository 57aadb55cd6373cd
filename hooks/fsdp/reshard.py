"""Error feedback that was saved by another number of ranks, cut anew as FSDP2 cuts the parameters now."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.parameters import bare_name
from commpress.comm.resize import Memories
from commpress.hooks.fsdp.units import Unit


def resharded(held: list[Unit], memories: list[Memories], old: int) -> list[Memories]:
    """Return the residuals of gradients that were cut for `old` ranks, cut as the gradients are now.

    Raises ValueError for parameters that are cut along another dimension than the first, and for masked ones.
    """
    units = {name: unit for unit in held for name in unit.names}
    (buckets,) = memories
    return [[_recut(bucket, units, old) for bucket in buckets]]


def _recut(bucket: dict[str, Any], units: dict[str, Unit], old: int) -> dict[str, Any]:
    segments = [(str(name), int(n)) for name, n in bucket["segments"]]
    residual, sizes = bucket["residual"], [n for _, n in segments]
    names = [name.removesuffix("[0]") for name, _ in segments[: len(segments) // old]]
    if residual is not None and residual.numel() != sum(sizes):
        raise ValueError(
            f"cannot restore: feedback of {names[0]!r} and others was saved under masks by {old} ranks; expected as many now"
        )
    parts = None if residual is None else dict(zip((name for name, _ in segments), residual.split(sizes), strict=True))
    chunks: dict[str, list[Tensor]] = {}
    lengths: dict[str, int] = {}
    W = 0
    for name in names:
        unit = units[bare_name(name)]
        W = dist.get_world_size(unit.shard_groups[0])
        cut = unit.cut(bare_name(name))
        if cut.dim != 0:
            raise ValueError(
                f"cannot restore: {name!r} is cut along dimension {cut.dim}, which was saved by {old} ranks; "
                "expected as many now"
            )
        lengths[name] = cut.length
        if parts is not None:
            whole = torch.cat([parts[f"{name}[{r}]"] for r in range(old)])[: cut.values]  # the rest is padding
            chunks[name] = list(torch.nn.functional.pad(whole, (0, W * cut.length - cut.values)).split(cut.length))
    return {
        "segments": [[f"{name}[{r}]", lengths[name]] for r in range(W) for name in names],
        "owner_start": 0,
        "draws": bucket.get("draws", 0),
        "owner_residual": None,
        "momentum": None,
        "residual": None if parts is None else torch.cat([chunks[name][r] for r in range(W) for name in names]),
    }
