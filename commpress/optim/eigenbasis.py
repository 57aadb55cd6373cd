"""The coordinates in which a coarse code of a matrix's momentum does little harm: all directions of it have one length there.

Newton-Schulz makes all directions of a matrix as long as the longest one. The error of a code is about the same in all
directions, so it outweighs the short ones, and comes out as large as they do. In the coordinates

    y = W^-1 U^T x        U W^2 U^T = E E^T, along the shorter side; E is the estimate that all ranks hold

each direction of E is as long as any other, and the error of a code of y is a like share of each. It is Shampoo's
preconditioner (arXiv:1802.09568) around a code in place of a step. The map is linear, so error feedback and sums over the ranks
stay what they are. All ranks make it of the same bits of E, so none of it is sent.

A direction's values lie one behind the other, so that the blocks of a codec hold those of one direction, or of few: a direction
that E does not know yet is long in y, and would set the scale for all others in its block.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.optim.newton_schulz import product_dtype

BASIS = "basis_vectors", "basis_sizes"
"""The names, in a matrix's state, of the coordinates in which its momentum is coded."""
FINE = 8
"""Bits a value from which on the error of a code is too small to need other coordinates."""
WHOLE = 2**16
"""Values of whose payload the bits are counted."""
FIRST, EVERY = 10, 5
"""Matrix 0 chooses coordinates after the update of this number, when an estimate says something, matrix 1 after the next; each
chooses again every so many updates: later, the estimate's directions are others."""
SIDE = 64
"""A matrix of k directions chooses again only every k / SIDE updates, if that is later: the work grows with the cube of k."""
LONG = 128
"""A matrix needs directions of so many values: in a block of 256, as most codecs have, there are then no more than two."""
FLOOR = 1e-3
"""Share of the mean eigenvalue that is added to each, so that no direction is enlarged without bound."""
IN_SINGLE = 1024
"""Directions up to which float32 is used: its error is a share of the largest eigenvalue, which may be k times the mean, so
with more directions it would come near to what FLOOR adds."""
LEAST = 1e-30
"""An estimate whose mean eigenvalue is smaller, as of a matrix that is not trained, keeps the coordinates it has."""


@dataclass(frozen=True)
class Basis:
    """Coordinates along the shorter side of a matrix, the rows of one that is square. `vectors` [k, k], `sizes` [k].

    Coordinates are [k, m], where m is the longer side.
    """

    vectors: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, estimate: Tensor) -> "Basis | None":
        """Return those of an estimate ([rows, columns]); None for one that is too small, 0, or not finite.

        What is kept moves by whatever vectors are found, so they need not be exact: their error must only stay below FLOOR.
        """
        wide = _wide(estimate)
        wide = wide.to(torch.float32 if len(wide) <= IN_SINGLE else torch.float64)
        if wide.shape[1] < LONG:
            return None
        with _exactly(wide):
            products = wide @ wide.mT
        mean = products.diagonal().mean()
        if not (torch.isfinite(products).all() and mean > LEAST):
            return None
        try:
            values, vectors = torch.linalg.eigh(products)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # on all ranks alike: they have the same bits
            return None
        sizes = values.clamp(min=0).add_(FLOOR * mean).sqrt_()
        return cls(vectors.contiguous().float(), sizes.float())

    @classmethod
    def kept_in(cls, state: Mapping[str, Tensor]) -> "Basis | None":
        """Return those that a matrix's state has; None if the matrix is in its own."""
        return cls(*(state[key] for key in BASIS)) if BASIS[0] in state else None

    def enter(self, x: Tensor) -> Tensor:
        """Return the coordinates of a matrix ([rows, columns]), in its dtype."""
        return _product(self.vectors.mT, _wide(x)).div_(self.sizes[:, None])

    def leave(self, y: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the matrix of this shape that has these coordinates, however they are viewed, in their dtype."""
        wide = _product(self.vectors, y.reshape(len(self.sizes), -1) * self.sizes[:, None])
        return wide if wide.shape == shape else wide.mT


def in_own(values: Tensor, shape: tuple[int, int], basis: Basis | None) -> Tensor:
    """Return the matrix of this shape, in float64, whose coordinates are `values`; None are its own.

    What is kept changes its coordinates in float64: an error in an estimate, to which only moves are added, would stay.
    """
    exact = values.double()
    return exact.view(shape) if basis is None else basis.leave(exact, shape)


def move(tensors: Iterable[Tensor], shape: tuple[int, int], old: Basis | None, new: Basis | None) -> None:
    """Move flat tensors, each of them a matrix of this shape in the coordinates `old`, to the coordinates `new`, in place."""
    for values in tensors:
        own = in_own(values, shape, old)
        values.copy_((own if new is None else new.enter(own)).reshape(-1))


def keep(state: dict[str, Any], basis: Basis | None) -> None:
    """Keep coordinates in a matrix's state, in place of those that it had; None are its own."""
    for key in BASIS:
        state.pop(key, None)
    if basis is not None:
        state.update(zip(BASIS, (basis.vectors, basis.sizes), strict=True))


def is_coarse(codec: Codec) -> bool:
    """Whether a codec has so few bits a value that its error must be a like share of each direction."""
    return codec.lossy and 8 * codec.nbytes(WHOLE) < FINE * WHOLE


def is_due(step: int, number: int, directions: int) -> bool:
    """Whether matrix `number` gets new coordinates after update `step`, counted from 1; all in one step would make it long."""
    return step >= FIRST and (step - FIRST - number) % max(EVERY, directions // SIDE) == 0


def _product(vectors: Tensor, x: Tensor) -> Tensor:
    """Return a product in the dtype of `x`.

    A gradient that enters and a direction that leaves, for Newton-Schulz, are float32 and are multiplied as Newton-Schulz
    multiplies: the error is that of a gradient in bfloat16. What is kept is float64, and multiplied so: its error would stay.
    """
    dtype = product_dtype(x.device) if x.dtype == torch.float32 else x.dtype
    with _exactly(x):
        return (vectors.to(dtype) @ x.to(dtype)).to(x.dtype)


def _exactly(x: Tensor) -> torch.autocast:
    """A context in which products have the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False)


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[0] > x.shape[1] else x
