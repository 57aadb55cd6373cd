"""Masks of whole parameters as FSDP2's traffic has them: the part of each rank's shard, for shards and for replicas."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from commpress.comm.masks_index import MaskIndex
from commpress.hooks.fsdp.units import Unit, ranks


def require_fit(masks: Mapping[str, Tensor], held: list[Unit]) -> None:
    """Raise ValueError for a mask of no parameter, or of another shape."""
    shapes = {name: shape for unit in held for name, shape in unit.shapes().items()}
    for name, mask in masks.items():
        if (shape := shapes.get(name)) != mask.shape:
            expected = "no such parameter" if shape is None else tuple(shape)
            raise ValueError(f"mask of {name!r}: shape {tuple(mask.shape)}, the model has {expected}")


def of_shards(who: tuple[int, ...], held: list[Unit], masks: Mapping[str, Tensor]) -> MaskIndex:
    """Return what masks keep of the traffic among the ranks `who`, which share parameters: a part a rank, all of one length."""
    parts: dict[str, Tensor] = {}
    together = []
    for unit in held:
        for name in unit.names if ranks(unit.shard_groups[0]) == who else ():
            if name in masks:
                own = {f"{name}[{r}]": chunk for r, chunk in enumerate(unit.chunks(name, masks[name]))}
                parts |= own
                together.append(list(own))
    return MaskIndex(parts, together)


def of_replicas(who: tuple[int, ...], held: list[Unit], masks: Mapping[str, Tensor]) -> MaskIndex:
    """Return what masks keep of the traffic among the ranks `who`, which own the same shard."""
    return MaskIndex(
        {
            name: unit.chunks(name, masks[name])[dist.get_rank(unit.shard_groups[0])]
            for unit in held
            if unit.replica_group is not None and ranks(unit.replica_group) == who
            for name in unit.names
            if name in masks
        }
    )
