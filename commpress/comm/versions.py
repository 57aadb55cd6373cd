"""The version of sharded parameters that all ranks have: the result of the last gather, to which only changes are sent.

    owner of shard r    x_r (exact, stepped by the optimizer)
    every rank          v_0 v_1 .. v_(W-1), two bytes a value, the same bits everywhere

A version is a copy of all gathered values, on every rank: 2 W m bytes for shards of m values. The owner has x_r, so x_r - v_r
is all that is missing. A state has only each rank's own v_r; without a version nothing is lost, it is sent again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commpress.comm.masks_index import MaskIndex
from commpress.comm.parameters import bare_name
from commpress.comm.segments import Segment, Segments


@dataclass
class Version:
    """The copy that all ranks have of shards that are gathered together; empty as long as none was sent."""

    values: Tensor | None = None
    """All ranks' shards, [W * m], in two bytes a value; None if no rank has those of others."""
    own: Tensor | None = None
    """This rank's part of it, [m], if that is all there is: it comes from a saved state."""
    mark: int | Tensor = 0
    """The hash of this rank's shard as it was then; int64 [] on its device where the host does not look at it."""

    @torch.inference_mode(False)  # it outlives the mode in which a model is looked at
    def room(self, world_size: int, shard: Tensor) -> Tensor:
        """Memory for the values of so many ranks: [W * m]."""
        dtype = shard.dtype if shard.element_size() == 2 else torch.bfloat16
        return torch.empty(world_size * shard.numel(), dtype=dtype, device=shard.device)


class Versions:
    """The versions of what one group of ranks gathers, by the parts of what comes together: those of rank 0, of rank 1, ..."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._of: dict[Segments, Version] = {}

    def of(self, segments: Segments) -> Version:
        """The version of these parameters."""
        return self._of.setdefault(segments, Version())

    def clear(self) -> None:
        """Forget all: what comes next is sent as a whole. On all ranks, or on none."""
        self._of.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return this rank's part of each version, a copy."""
        return [
            {"segments": [[part.name, part.n] for part in segments], "own": own.clone(), "mark": int(version.mark)}
            for segments, version in self._of.items()
            if (own := self._own(version)) is not None
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]], masks: MaskIndex, device: torch.device) -> None:
        """Restore what `state_dict` saved, if as many values travel now; else forget it. On all ranks."""
        self.clear()
        for saved in state:
            segments = tuple(Segment(bare_name(name), int(n)) for name, n in saved["segments"])
            if saved["own"].numel() * self._world_size == masks.total(segments):
                self._of[segments] = Version(own=saved["own"].to(device).clone(), mark=int(saved["mark"]))

    def _own(self, version: Version) -> Tensor | None:
        if version.values is None:
            return version.own
        return version.values.view(self._world_size, -1)[self._rank]
