"""The version of sharded parameters that all ranks have: the result of the last gather. The next gather sends only changes.

    owner of shard r    x_r (exact, stepped by the optimizer)
    every rank          v_0 v_1 .. v_(W-1), two bytes a value, the same bits everywhere

A version is a copy of all gathered values, on every rank: 2 W m bytes for shards of m values. The owner has x_r and sends the
difference x_r - v_r. A saved state has only each rank's own v_r. If a version is missing nothing is lost: it is sent again.
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
    """The copy that all ranks have of shards that are gathered together; empty until the first gather."""

    values: Tensor | None = None
    """All ranks' shards, [W * m], in two bytes a value; None if no rank has the others' shards."""
    own: Tensor | None = None
    """This rank's part, [m], if a saved state holds no more."""
    mark: int | Tensor = 0
    """The hash of this rank's shard at that gather; int64 [] on its device if the host does not read it."""

    @torch.inference_mode(False)  # it outlives a caller's inference mode
    def room(self, world_size: int, shard: Tensor) -> Tensor:
        """Return memory for the values of all ranks: [W * m]."""
        dtype = shard.dtype if shard.element_size() == 2 else torch.bfloat16
        return torch.empty(world_size * shard.numel(), dtype=dtype, device=shard.device)


class Versions:
    """The versions of one group of ranks, by the segments that are gathered together: rank 0's, then rank 1's, and so on."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._of: dict[Segments, Version] = {}

    def of(self, segments: Segments) -> Version:
        """Return the version of these parameters; a new, empty one if there is none."""
        return self._of.setdefault(segments, Version())

    def clear(self) -> None:
        """Drop all versions: the next gathers send whole values. Call it on all ranks or on none."""
        self._of.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return this rank's part of each version, a copy."""
        return [
            {"segments": [[part.name, part.n] for part in segments], "own": own.clone(), "mark": int(version.mark)}
            for segments, version in self._of.items()
            if (own := self._own(version)) is not None
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]], masks: MaskIndex, device: torch.device) -> None:
        """Restore what `state_dict` saved; drop a version if masks now keep another number of values. Call it on all ranks."""
        self.clear()
        for saved in state:
            segments = tuple(Segment(bare_name(name), int(n)) for name, n in saved["segments"])
            if saved["own"].numel() * self._world_size == masks.total(segments):
                self._of[segments] = Version(own=saved["own"].to(device).clone(), mark=int(saved["mark"]))

    def _own(self, version: Version) -> Tensor | None:
        if version.values is None:
            return version.own
        return version.values.view(self._world_size, -1)[self._rank]
