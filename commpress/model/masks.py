"""Masks: which weights of a parameter are left (Han et al., arXiv:1506.02626): w <- m * w, m in {0, 1}.

A mask is a boolean tensor of the whole parameter's shape, True where a weight stays. All ranks hold the same ones, also of
sharded parameters; a checkpoint has a bit a weight. Where a weight is pruned its gradient is 0, and so is what the
optimizer remembers of it: nothing moves it again.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from commpress.model.held import Held, Holding, local
from commpress.model.loops import count_pruned, keep_


class Masks:
    """The masks of some of a model's parameters, by name; a parameter without one is whole.

    `parameters` are all that may get one, as `model.named_parameters()` has them, DTensors of FSDP2 among them. `holding` says
    where they are stepped if that is elsewhere; they must be whole where masks are made.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], holding: Holding | None = None) -> None:
        self.held = {name: Held(p, holding) for name, p in parameters.items()}
        """Where this rank has the values of each parameter."""
        self._cut: dict[str, list[Tensor]] = {}  # what of the masks belongs to each tensor
        self.of: dict[str, Tensor] = {}
        """The masks, in the parameters' order of memory."""

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' weights that is pruned and 0; 0 without masks.

        It looks at the weights: one that was pruned and has moved does not count (of sharded ones, this rank's part).
        """
        total = sum(mask.numel() for mask in self.of.values())
        left = sum(int(mask.sum()) for mask in self.of.values()) + sum(self.moved().values())
        return 1 - left / total if total else 0.0

    @torch.no_grad()
    def moved(self) -> dict[str, int]:
        """How many pruned weights are not 0, by the parameter; on this rank, and only where there are any."""
        found = {}
        for name, cut in self._cut.items():
            counts = [count_pruned(x, mask) for x, mask in zip(self.held[name].values(), cut, strict=False)]
            found[name] = max(counts, default=0)
        return {name: count for name, count in found.items() if count}

    def ordered(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return these masks in the parameters' order of memory, as sessions want them.

        Raises KeyError for a name that is no parameter, ValueError for a mask that is not bool or of another shape.
        """
        for name, mask in masks.items():
            if name not in self.held:
                raise KeyError(f"mask of {name!r}: no such parameter, known: {', '.join(self.held)}")
            shape = self.held[name].shape
            if mask.dtype != torch.bool or mask.shape != shape:
                raise ValueError(
                    f"mask of {name!r}: expected bool {tuple(shape)}, got "
                    f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
                )
        return {name: self.held[name].ordered(mask) for name, mask in masks.items()}

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Take these masks for those that there were; weights that they prune become 0. Raises as `ordered` does."""
        self.of = self.ordered(masks)
        self._cut = {name: self.held[name].cut(mask) for name, mask in self.of.items()}
        self.apply()

    @torch.no_grad()
    def apply(self, only: Container[str] | None = None) -> None:
        """Set pruned weights to 0; of the parameters `only`, or of all."""
        for name, cut in self._cut.items():
            if only is None or name in only:
                for x, mask in zip(self.held[name].values(), cut, strict=False):
                    keep_(x, mask)

    @torch.no_grad()
    def apply_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Set to 0 what is pruned in tensors by the parameters' names, of this rank's parts of them."""
        for name, cut in self._cut.items():
            if name in tensors:
                keep_(tensors[name], cut[-1])

    @torch.no_grad()
    def apply_to_gradients(self, only: Container[str] | None = None) -> None:
        """Set the gradients of pruned weights to 0; of the parameters `only`, or of all."""
        for name, cut in self._cut.items():
            if only is None or name in only:
                for gradient, mask in zip(self.held[name].gradients(), cut, strict=False):
                    if gradient is not None:
                        _keep_gradient(gradient, mask)

    @torch.no_grad()
    def pruned_gradient(self, name: str) -> Tensor | None:
        """A copy of the gradients of a parameter's pruned weights, 0 at the others; None if it has none, or no mask.

        Where flat parts are stepped it is of the whole shape, and 0 at the values of other ranks, too.
        """
        held, cut = self.held[name], self._cut.get(name, [])
        found = [
            (g.to_dense() if g.is_sparse else g.detach().clone(), mask)
            for g, mask in zip(held.gradients(), cut, strict=False)
            if g is not None
        ]
        if not found:
            return None
        for gradient, mask in found:
            keep_(local(gradient), ~mask)
        return held.placed(gradient for gradient, _ in found) if held.is_flat else found[0][0]

    @torch.no_grad()
    def clean(self, optimizer: torch.optim.Optimizer) -> None:
        """Set to 0 what an optimizer remembers of pruned weights: every tensor of a parameter's shape in its state.

        `inverse` of the compressed optimizers stays: it is a scale, not a memory, and a weight that grows again needs it.
        LBFGS, whose directions mix all weights, starts its history anew where that holds any of a pruned one.
        """
        for name, cut in self._cut.items():
            for remembered, mask in zip(self.held[name].remembered(optimizer), cut, strict=False):
                for x in remembered:
                    keep_(x, mask)
        if isinstance(optimizer, torch.optim.LBFGS):
            self._clean_history(optimizer)

    def _clean_history(self, optimizer: torch.optim.LBFGS) -> None:
        """LBFGS keeps vectors of all its parameters one after another, with its first parameter."""
        names = {id(held.p): name for name, held in self.held.items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = []
        for p in parameters:
            cut = self._cut.get(names.get(id(p), ""))
            mask = torch.ones(p.shape, dtype=torch.bool, device=p.device) if cut is None else cut[0]
            kept.append(mask.reshape(-1).repeat_interleave(2 if p.is_complex() else 1))
        flat = torch.cat(kept)
        for state in optimizer.state.values():
            values = [x for each in state.values() for x in (each if isinstance(each, list) else [each])]
            vectors = [x for x in values if isinstance(x, Tensor) and x.numel() == flat.numel()]
            if any(count_pruned(x.reshape(-1), flat) for x in vectors):
                state.clear()

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


def _keep_gradient(gradient: Tensor, mask: Tensor) -> None:
    if gradient.is_sparse:  # of an embedding, rows that repeat among them
        values = gradient._values()
        values.masked_fill_(~mask[tuple(gradient._indices())], 0)
    else:
        keep_(local(gradient), mask)
