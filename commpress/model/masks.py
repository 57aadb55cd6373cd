"""Masks: which weights of a parameter are left (Han et al., arXiv:1506.02626): w <- m * w, m in {0, 1}.

A mask is a boolean tensor of the whole parameter's shape, True where a weight stays. All ranks hold the same ones, also of
parameters that FSDP2 shards; a checkpoint has a bit a weight. Where a weight is pruned its gradient is 0, and so is what the
optimizer remembers of it: nothing moves it again.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from commpress.model.loops import keep_


class Masks:
    """The masks of some of a model's parameters, by name; a parameter without one is whole.

    `parameters` are all that may get one, as `model.named_parameters()` has them, DTensors of FSDP2 among them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._local: dict[str, Tensor] = {}  # this rank's parts
        self.of: dict[str, Tensor] = {}
        """The masks, in the parameters' order of memory."""
        self.sparsity = 0.0
        """The share of the masked parameters' weights that is pruned; 0 without masks."""

    def ordered(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These masks in the parameters' order of memory, as sessions want them.

        Raises KeyError for a name that is no parameter, ValueError for a mask that is not bool or of another shape.
        """
        for name, mask in masks.items():
            if name not in self._parameters:
                raise KeyError(f"mask of {name!r}: no such parameter, known: {', '.join(self._parameters)}")
            p = self._parameters[name]
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"mask of {name!r}: expected bool {tuple(p.shape)}, got "
                    f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
                )
        return {name: _in_order_of(self._parameters[name], mask) for name, mask in masks.items()}

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Take these masks for those that there were; weights that they prune become 0. Raises as `ordered` does."""
        self.of = self.ordered(masks)
        self._local = {name: part_like(mask, self._parameters[name]) for name, mask in self.of.items()}
        total = sum(mask.numel() for mask in self.of.values())
        self.sparsity = 1 - sum(int(mask.sum()) for mask in self.of.values()) / total if total else 0.0
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set pruned weights to 0."""
        for name, mask in self._local.items():
            keep_(local(self._parameters[name]), mask)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of pruned weights to 0."""
        for name, mask in self._local.items():
            if (gradient := self._parameters[name].grad) is not None:
                keep_(local(gradient), mask)

    @torch.no_grad()
    def clean(self, optimizer: torch.optim.Optimizer) -> None:
        """Set to 0 what an optimizer remembers of pruned weights: every tensor of a parameter's shape in its state.

        `inverse` of the compressed optimizers stays: it is a scale, not a memory, and a weight that grows again needs it.
        """
        for name, mask in self._local.items():
            p = self._parameters[name]
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape and key != "inverse":
                    keep_(local(value), mask)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Each mask as its shape and a uint8 tensor with a bit a weight, the first in the lowest bit."""
        return {name: {"shape": list(mask.shape), "bits": to_bits(mask)} for name, mask in self.of.items()}


def from_state(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The masks that `Masks.state_dict` returned. Raises ValueError if a size does not fit."""
    return {name: from_bits(saved["bits"], saved["shape"]) for name, saved in state.items()}


def to_bits(mask: Tensor) -> Tensor:
    """A bool tensor as uint8 [ceil(n / 8)], the first value in the lowest bit, in row-major order."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1), bitorder="little"))


def from_bits(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of a shape that `to_bits` packed. Raises ValueError if the number of bytes is another one."""
    size = torch.Size(shape)
    if bits.numel() != -(-size.numel() // 8):
        raise ValueError(f"a mask of shape {tuple(size)} has {-(-size.numel() // 8)} bytes, got {bits.numel()}")
    values = np.unpackbits(bits.cpu().numpy(), count=size.numel(), bitorder="little")
    return torch.from_numpy(values.astype(np.bool_)).view(size)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of it, unless it is sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, detached; collective if it is sharded."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_like(x: Tensor, p: Tensor) -> Tensor:
    """The part of `x`, which every rank holds as a whole, that belongs to this rank's part of `p`."""
    if not isinstance(p, DTensor):
        return x
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None).to_local()


def _in_order_of(p: Tensor, mask: Tensor) -> Tensor:
    if isinstance(p, DTensor):
        return mask.to(p.device).contiguous()
    return torch.empty_like(p, dtype=torch.bool, requires_grad=False).copy_(mask)
