"""Newton-Schulz of many matrices, shared out over the ranks of a node: each rank makes its own, and gets those of the others.

    rank 0   a -> A, d -> D  --> 1   all_gather   [A D B C]
    rank 1   b -> B, c -> C  --> 0   in the node  [A D B C]

On a CPU that is some thousand multiply-adds a value against the 4 bytes that it takes to a neighbour. Between nodes nothing is
sent: each makes all matrices, by the same products. All ranks hold the same bits, the owner of a matrix and those who got it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from commpress.comm.collectives import Collectives
from commpress.comm.node import Node

FEWEST = 2**28
"""Multiply-adds of a step below which every rank makes all matrices: a message costs a fraction of a millisecond, too."""
Shape = tuple[int, int]
"""Rows and columns."""


class SharedProducts:
    """Newton-Schulz of a step's matrices, of which each rank of the node makes a part."""

    def __init__(self, collectives: Collectives) -> None:
        self.node = Node(collectives)
        self._shares = collectives.device.type == "cpu" and len(self.node.ranks) > 1
        self._buffer = torch.empty(0, dtype=torch.float32, device=collectives.device)

    def owners(self, shapes: Sequence[Shape]) -> list[int]:
        """Return which rank of the node makes each matrix; this one makes all if there is too little to share out."""
        works = [multiply_adds(shape) for shape in shapes]
        if not self._shares or len(works) < 2 or sum(works) < FEWEST:
            return [self.node.me] * len(shapes)
        return shared_out(works, len(self.node.ranks))

    def gather(self, own: dict[int, Tensor], shapes: Sequence[Shape], owners: Sequence[int]) -> list[Tensor]:
        """Return what has come out of all matrices, of these shapes: this rank's `own`, by number, and those of the others.

        They are good until the next call. Collective. Raises RuntimeError if a rank fails.
        """
        sizes: list[list[int]] = [[] for _ in self.node.ranks]
        for (rows, columns), owner in zip(shapes, owners, strict=True):
            sizes[owner].append(rows * columns)
        totals = [sum(each) for each in sizes]
        if self._buffer.numel() < sum(totals):
            self._buffer = self._buffer.new_empty(sum(totals))
        parts = self._buffer[: sum(totals)].split(totals)
        places = [iter(part.split(each)) for part, each in zip(parts, sizes, strict=True)]
        found = [next(places[owner]).view(shape) for owner, shape in zip(owners, shapes, strict=True)]
        for number, values in own.items():
            found[number].copy_(values)
        self.node.all_gather(parts, "updates of matrices").wait()
        return found


def multiply_adds(shape: Shape) -> int:
    """Return about how many multiply-adds Newton-Schulz takes: five times two products with the matrix, one of squares."""
    short, long = sorted(shape)
    return 5 * (2 * short * short * long + short**3)


def shared_out(works: Sequence[int], ranks: int) -> list[int]:
    """Return an owner for each, the largest first, each to the rank that has least; the same wherever it is asked."""
    owners, loads = [0] * len(works), [0] * ranks
    for number in sorted(range(len(works)), key=lambda i: (-works[i], i)):
        owners[number] = least = loads.index(min(loads))
        loads[least] += works[number]
    return owners
