"""Masks of whole parameters, cut as FSDP2 cuts the parameters: one part for each rank's shard."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from commpress.comm.masks_index import MaskIndex
from commpress.hooks.fsdp.units import Unit, ranks


def of_shards(who: tuple[int, ...], held: list[Unit], masks: Mapping[str, Tensor]) -> MaskIndex:
    """Return the index of the values that masks keep in the traffic among the ranks `who`, which share parameters.

    Each rank has one part; all parts have one length.
    """
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
    """Return the index of the values that masks keep in the traffic among the ranks `who`, which hold the same shard."""
    return MaskIndex(
        {
            name: unit.chunks(name, masks[name])[dist.get_rank(unit.shard_groups[0])]
            for unit in held
            if unit.replica_group is not None and ranks(unit.replica_group) == who
            for name in unit.names
            if name in masks
        }
    )
