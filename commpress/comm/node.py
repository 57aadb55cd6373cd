"""The ranks of a node, and the uncompressed tensors that they exchange among themselves.

    rank 0   [a . ]  --> 1   rows, one of them each rank's own    [a b]
    rank 1   [. b ]  --> 0   nothing leaves the node              [a b]

A rank of L sends its row to L - 1 others.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.collectives import Collectives
from commpress.comm.exchange import NO_EXCHANGE, Transfer
from commpress.comm.exchange.hierarchical import count_on_nodes, inside
from commpress.comm.plan import DENSE, BucketPlan
from commpress.comm.traffic import Step
from commpress.comm.work import Work


class Node:
    """The ranks of this rank's node, by torchrun's environment.

    It is only this rank if the environment does not say, or if nodes have different numbers of ranks.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._traffic, rank = collectives.traffic, collectives.rank
        try:
            size = count_on_nodes(dist.get_process_group_ranks(collectives.group))
        except ValueError:
            size = 1
        self.ranks = range(rank // size * size, rank // size * size + size)
        self.me = rank % size
        """The place of this rank among the node's ranks."""

    def all_gather(self, rows: Sequence[Tensor], what: str) -> Work:
        """Fill `rows` (contiguous, one for each rank of the node): each rank of the node sends its own row. `what` names it.

        Collective over all ranks of the group; each node gathers by itself.
        """
        traffic, mine = self._traffic, rows[self.me]
        label = traffic.labels.next(what)

        def exchange() -> Iterator[Transfer]:
            wire = traffic.wire.part(self.ranks)
            yield inside(wire.all_gather([row.view(torch.uint8) for row in rows], label, last=True))

        plan = BucketPlan(DENSE, NO_EXCHANGE, False, "stays inside the node")
        named = ("updates", "all_gather", plan, mine.numel(), mine.dtype, mine)
        return traffic.submit(*named, 0, 0, exchange(), step=Step(traffic.meter.steps), reads=tuple(rows))
