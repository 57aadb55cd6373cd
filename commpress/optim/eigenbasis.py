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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from commpress.comm.codecs import Codec

BASIS = "basis_vectors", "basis_sizes"
"""The names, in a matrix's state, of the coordinates in which its momentum is coded."""
FINE = 8
"""Bits a value from which on the error of a code is too small to need other coordinates."""
WHOLE = 2**16
"""Values of whose payload the bits are counted."""
FIRST, EVERY = 10, 25
"""The coordinates are chosen behind the update of this number, when an estimate says something, and then every so many."""
LONG = 128
"""A matrix needs directions of so many values: in a block of 256, as most codecs have, there are then no more than two."""
FLOOR = 1e-3
"""Share of the mean eigenvalue that is added to each, so that no direction is enlarged without bound."""


@dataclass(frozen=True)
class Basis:
    """Coordinates along the shorter side of a matrix, the rows of one that is square. `vectors` [k, k], `sizes` [k].

    Coordinates are [k, m], where m is the longer side.
    """

    vectors: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, estimate: Tensor) -> "Basis | None":
        """Return those of an estimate ([rows, columns]); None for one that is too small, 0, or not finite."""
        wide = _wide(estimate)
        if wide.shape[1] < LONG:
            return None
        products = wide @ wide.mT
        mean = products.diagonal().mean()
        if not (torch.isfinite(products).all() and mean > 0):
            return None
        values, vectors = torch.linalg.eigh(products)
        return cls(vectors, values.clamp(min=0).add_(FLOOR * mean).sqrt_())

    @classmethod
    def kept_in(cls, state: Mapping[str, Tensor]) -> "Basis | None":
        """Return those that a matrix's state has; None if the matrix is in its own."""
        return cls(*(state[key] for key in BASIS)) if BASIS[0] in state else None

    def enter(self, x: Tensor) -> Tensor:
        """Return the coordinates of a matrix ([rows, columns])."""
        return (self.vectors.mT @ _wide(x)).div_(self.sizes[:, None])

    def leave(self, y: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the matrix of this shape that has these coordinates, however they are viewed."""
        k = len(self.sizes)
        wide = self.vectors @ (y.reshape(k, -1) * self.sizes[:, None])
        return wide if wide.shape == shape else wide.mT


def is_coarse(codec: Codec) -> bool:
    """Whether a codec has so few bits a value that its error must be a like share of each direction."""
    return codec.lossy and 8 * codec.nbytes(WHOLE) < FINE * WHOLE


def is_due(step: int) -> bool:
    """Whether coordinates are chosen behind update number `step`, counted from 1."""
    return step == FIRST or step % EVERY == 0


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[0] > x.shape[1] else x
