"""Masks at ZeRO 1 to 3: pruned gradients leave as 0, what is coded is packed, and recipes learn where values are stepped."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from commpress.comm.masks_index import MaskIndex, pack, unpack, zero_others
from commpress.comm.owned_slices import OwnedSlice

Part = tuple[Tensor, slice, slice]
"""(flat, at, values): `flat[at]` are the `values` of a parameter, which are counted row by row. As in `commpress.model.held`,
which an install without the extra `model` cannot import."""


@dataclass
class Holding:
    """Where this rank has the values of the parameters of a ZeRO optimizer (`commpress.model.held.Holding`)."""

    optimizer: Optimizer
    """The engine's own, which steps `parts`."""
    parts: Mapping[Tensor, Sequence[Part]]
    copies: Mapping[Tensor, Sequence[Part]] = field(default_factory=dict)
    """Under ZeRO 3 this rank's shard, from which parameters are gathered."""
    to_gather: Sequence[Any] = ()
    """Under ZeRO 3 all parameters of the module."""

    @property
    def gathers(self) -> bool:
        """Whether the module's parameters are whole in `whole` alone."""
        return bool(self.to_gather)

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which the module's parameters are whole. Collective."""
        return self._gathered() if self.gathers else contextlib.nullcontext()

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.to_gather)):
            yield


def zero_pruned(pieces: Sequence[OwnedSlice], tensors: Sequence[Tensor], masks: MaskIndex) -> None:
    """Set to 0 what is pruned of these pieces of `tensors` ([n] each), in which each piece has its place."""
    for piece in pieces:
        if (places := masks.places(piece.name)) is not None:
            zero_others(tensors[piece.place][piece.start : piece.stop], places)


def pack_piece(values: Tensor, piece: OwnedSlice, masks: MaskIndex, out: Tensor) -> None:
    """Copy what masks keep of a piece's values to `out`, float32."""
    if (places := masks.places(piece.name)) is None:
        out.copy_(values)
    else:
        pack(values.float(), places, out)


def unpacked(kept: Tensor, piece: OwnedSlice, masks: MaskIndex) -> Tensor:
    """Return all values of a piece, of which masks keep these; the others are 0."""
    if (places := masks.places(piece.name)) is None:
        return kept
    values = torch.empty(len(piece), dtype=kept.dtype, device=kept.device)
    unpack(kept, places, values)
    return values
