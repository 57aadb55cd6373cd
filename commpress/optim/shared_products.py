"""Newton-Schulz of many matrices, divided among the ranks of a node: each rank computes some and gets the others' results.

    rank 0   a -> A, d -> D  --> 1   all_gather   [A D B C]
    rank 1   b -> B, c -> C  --> 0   in the node  [A D B C]

On a CPU this saves about a thousand multiply-adds a value for 4 bytes sent to a neighbour. Between nodes nothing is sent: each
node computes all matrices, by the same products. All ranks hold the same bits: the rank that computed a matrix, and the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from commpress.comm.collectives import Collectives
from commpress.comm.node import Node

FEWEST = 2**28
"""With fewer multiply-adds in a step every rank computes all matrices: a message takes a fraction of a millisecond."""
Shape = tuple[int, int]
"""Rows and columns."""


class SharedProducts:
    """Newton-Schulz of a step's matrices, of which each rank of the node computes a part."""

    def __init__(self, collectives: Collectives) -> None:
        self.node = Node(collectives)
        self._shares = collectives.device.type == "cpu" and len(self.node.ranks) > 1
        self._buffer = torch.empty(0, dtype=torch.float32, device=collectives.device)

    def owners(self, shapes: Sequence[Shape]) -> list[int]:
        """Return the rank of the node that computes each matrix; it is always this rank if there is too little work."""
        works = [multiply_adds(shape) for shape in shapes]
        if not self._shares or len(works) < 2 or sum(works) < FEWEST:
            return [self.node.me] * len(shapes)
        return shared_out(works, len(self.node.ranks))

    def gather(self, own: dict[int, Tensor], shapes: Sequence[Shape], owners: Sequence[int]) -> list[Tensor]:
        """Return the results for all matrices, of these shapes. `own` has this rank's results by the matrix's number.

        They are valid until the next call. Collective. Raises RuntimeError if a rank fails.
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
    """Return about how many multiply-adds Newton-Schulz takes: 5 steps of two products with the matrix and one square."""
    short, long = sorted(shape)
    return 5 * (2 * short * short * long + short**3)


def shared_out(works: Sequence[int], ranks: int) -> list[int]:
    """Return a rank for each piece of work, the largest assigned first, each to the rank with the least. Deterministic."""
    owners, loads = [0] * len(works), [0] * ranks
    for number in sorted(range(len(works)), key=lambda i: (-works[i], i)):
        owners[number] = least = loads.index(min(loads))
        loads[least] += works[number]
    return owners
