"""Where a rank holds the values of a parameter: in the module, as a part of it, or in flat tensors beside it.

one rank, DDP    p                 the optimizer steps p
FSDP2            p, a DTensor      the optimizer steps this rank's part of p
ZeRO 1 to 3      p and flat[at]    the optimizer steps flat[at], a part of p; forward computes with p, which may be empty
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

Part = tuple[Tensor, slice, slice]
"""(flat, at, values): `flat[at]` are the `values` of a parameter, which are counted row by row."""


class Holding(Protocol):
    """The part of a session of sharded parameters that are stepped in flat tensors."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that steps the flat tensors."""

    @property
    def parts(self) -> Mapping[Tensor, Sequence[Part]]:
        """Return the parts of each parameter that this rank's optimizer steps; an empty sequence if it steps none."""

    @property
    def copies(self) -> Mapping[Tensor, Sequence[Part]]:
        """Return the parts of each parameter that are on this rank besides the module's and those that are stepped."""

    @property
    def gathers(self) -> bool:
        """Whether the module's parameters are whole in `whole` alone."""

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which the module's parameters are whole. Collective."""


class Held:
    """A parameter, and the tensors on this rank that have values of it. Make it where the parameter is whole."""

    def __init__(self, p: nn.Parameter, holding: Holding | None = None) -> None:
        self.p = p
        self.is_flat = holding is not None and p in holding.parts
        """Whether the optimizer steps flat tensors beside it."""
        self._parts: Sequence[Part] = ()
        self._copies: Sequence[Part] = ()
        if holding is not None and self.is_flat:
            self._parts, self._copies = holding.parts[p], holding.copies.get(p, ())
        self._like = p if isinstance(p, DTensor) else torch.empty_like(p, device="meta", requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole parameter."""
        return self._like.shape

    def ordered(self, mask: Tensor) -> Tensor:
        """Return a mask of the whole parameter in its order of memory."""
        if isinstance(self.p, DTensor):
            return mask.to(self.p.device).contiguous()
        return torch.empty_like(self._like, dtype=torch.bool, device=self.p.device).copy_(mask)

    def values(self) -> list[Tensor]:
        """The tensors with values of it, without gradients: first those that the optimizer steps."""
        if not self.is_flat:
            return [local(self.p).detach()]
        found = [flat.detach()[at] for flat, at, _ in (*self._parts, *self._copies)]
        return [*found, self.p.detach()] if self.p.shape == self.shape else found

    def cut(self, x: Tensor) -> list[Tensor]:
        """Return the part of `x`, a tensor of the whole parameter's shape on every rank, for each tensor of `values`."""
        if not self.is_flat:
            return [part_like(x, self.p)]
        row = x.reshape(-1)
        return [*(row[values] for _, _, values in (*self._parts, *self._copies)), x]

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the values that the optimizer steps, in the order of `values`."""
        if not self.is_flat:
            return [self.p.grad]
        return [None if flat.grad is None else flat.grad[at] for flat, at, _ in self._parts]

    def remembered(self, optimizer: Optimizer) -> list[list[Tensor]]:
        """Return the optimizer's state of the values that it steps, in the order of `values`: tensors of their shape.

        `inverse` of the compressed optimizers is not among them: it is a scale, not a memory.
        """
        if not self.is_flat:
            return [[local(x) for x in _of_shape(self.p, optimizer)]]
        return [[x[at] for x in _of_shape(flat, optimizer)] for flat, at, _ in self._parts]

    def nothing(self) -> Tensor:
        """Return float32 zeros of the whole shape."""
        return torch.zeros(self.shape, dtype=torch.float32, device=self.p.device)

    def placed(self, parts: Iterable[Tensor]) -> Tensor:
        """Return float32 of the whole shape: what belongs to `values` that the optimizer steps, and 0 elsewhere."""
        whole = self.nothing()
        for x, (_, _, values) in zip(parts, self._parts, strict=True):
            whole.view(-1)[values] = x.float()
        return whole

    def moved_by(self, parameters: Iterable[Tensor]) -> bool:
        """Whether an optimizer of these parameters moves values of it on this rank."""
        own = {id(x) for x in parameters}
        return id(self.p) in own or any(id(flat) in own for flat, _, _ in self._parts)


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


def _of_shape(p: Tensor, optimizer: Optimizer) -> list[Tensor]:
    state = optimizer.state.get(p, {})
    return [x for key, x in state.items() if isinstance(x, Tensor) and x.shape == p.shape and key != "inverse"]
