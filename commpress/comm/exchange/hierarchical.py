"""hierarchical: dense inside a node, compressed between nodes. For nodes of several ranks on a network that is slower than the
links inside a node. With four ranks on two nodes:

             node: a slice each     nodes: its mean, compressed     node: all slices
    rank 0   [a0 b0] -> a0 + a1     a01 + a23 -> A   (0 and 2)      [A B]
    rank 1   [a1 b1] -> b0 + b1     b01 + b23 -> B   (1 and 3)      [A B]
    rank 2   [a2 b2] -> a2 + a3     a01 + a23 -> A   (0 and 2)      [A B]
    rank 3   [a3 b3] -> b2 + b3     b01 + b23 -> B   (1 and 3)      [A B]

With L ranks on each of N nodes a rank sends (L - 1) / L of the bucket twice inside its node, in the bucket's own dtype. To
other nodes it sends as much as `two_shot` (`one_shot` if that suits the codec, or between two nodes) sends for n / L values
among N ranks: a node sends each value once, not L times. The sum inside a node is in float32. A rank encodes the mean of its
node's slice, and its feedback covers only that slice. All ranks hold the same bits: the owners of a slice do, and the others
get copies.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.one_shot import OneShot
from commpress.comm.exchange.two_shot import TwoShot, chunk_bounds
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory, NodeSlice

LOCAL_RANKS = "LOCAL_WORLD_SIZE"
"""The variable in which torchrun says how many ranks a node has."""


@dataclass(frozen=True)
class Hierarchical(Exchange):
    """A dense reduce-scatter inside each node, a compressed mean of each slice between nodes, a dense all-gather inside."""

    name: ClassVar[str] = "hierarchical"
    encodes_bucket: ClassVar[bool] = False
    ranks_per_node: int = 0
    """The number of ranks on each node; 0 if it is not known yet."""

    def __str__(self) -> str:
        return f"{self.name}({self.ranks_per_node})" if self.ranks_per_node else self.name

    @classmethod
    def read(cls, text: str) -> "Hierarchical | None":
        """Return the exchange for the text `hierarchical`, or `hierarchical(L)` for nodes of L ranks; None for other text."""
        found = re.fullmatch(rf"{cls.name}(?:\(([1-9]\d*)\))?", text)
        return None if found is None else cls(int(found[1] or 0))

    def on(self, ranks: Sequence[int]) -> Exchange:
        if len(ranks) == 1:
            return replace(self, ranks_per_node=1)
        if not self.ranks_per_node:
            return replace(self, ranks_per_node=count_on_nodes(ranks))
        if len(ranks) % self.ranks_per_node:
            raise ValueError(
                f"exchange {str(self)!r}: {len(ranks)} ranks do not make nodes of {self.ranks_per_node}; all nodes must have "
                "the same number of ranks"
            )
        return self

    def join(self, wire: Wire) -> None:
        if not self.idle(wire.world_size):
            self._wires(wire)

    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        codec, memory = encoder.codec, encoder.memory
        node, nodes = self._wires(wire)
        me, L = node.rank, node.world_size
        cuts = chunk_bounds(x.numel(), L, codec.granularity)
        slices = [x[cuts[r] : cuts[r + 1]] for r in range(L)]
        encoder.add_residual(x)  # an earlier residual of the whole bucket: the dense sum can send all of it

        mine, nbytes = slices[me], [part.nbytes for part in slices]
        received = encoder.buffer("slices of the node", L * mine.nbytes, x.device)
        rows = received.view(x.dtype).split(mine.numel()) if mine.numel() else (mine,) * L
        if L > 1:
            if not node.by_message:
                rows[me].copy_(mine)
            yield inside(node.all_to_all(x.view(torch.uint8), nbytes, received, label, last=False))
        mean = mine
        if x.dtype != torch.float32:
            mean = encoder.buffer("slice", 4 * mine.numel(), x.device).view(torch.float32).copy_(mine)
        for r in node.peers:
            mean.add_(rows[r])
        if L > 1:
            mean.mul_(1 / L)

        kept = Memory(residual=memory.slice_residual, owner_residual=memory.owner_residual)
        inner = Encoder(codec, kept, encoder.scratch)
        between = self._between(codec, nodes.world_size).run(mean, inner, nodes, label)
        for transfer in between if mine.numel() else ():
            if L > 1:
                transfer.last, transfer.decodes = False, transfer.last
            yield transfer

        if mean is not mine:
            mine.copy_(mean)
        if L > 1:
            whole = x.view(torch.uint8) if len(set(nbytes)) == 1 else None
            places = [part.view(torch.uint8) for part in slices]
            yield inside(node.all_gather(places, label.second(), last=True, whole=whole))

    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        L = self.ranks_per_node
        node, me = divmod(rank, L)
        cuts = chunk_bounds(n, L, codec.granularity)
        mine = cuts[me + 1] - cuts[me]
        others, own = (n - mine) * itemsize, (L - 1) * mine * itemsize
        between = self._between(codec, world_size // L).messages(mine, 4, codec, world_size // L, node)
        between = tuple(replace(message, between_nodes=True) for message in between)
        if L == 1:
            return between
        return Message(others, own, between_nodes=False), *between, Message(own, others, between_nodes=False)

    def chunk(self, n: int, codec: Codec, rank: int, world_size: int) -> tuple[int, int] | None:
        mine, nodes = self.node_slice(n, codec, rank, world_size), world_size // self.ranks_per_node
        chunk = self._between(codec, nodes).chunk(mine.stop - mine.start, codec, rank // self.ranks_per_node, nodes)
        return None if chunk is None else (mine.start + chunk[0], mine.start + chunk[1])

    def node_slice(self, n: int, codec: Codec, rank: int, world_size: int) -> NodeSlice:
        cuts, me = chunk_bounds(n, self.ranks_per_node, codec.granularity), rank % self.ranks_per_node
        return NodeSlice(cuts[me], cuts[me + 1], self.ranks_per_node, n)

    def payloads(self, codec: Codec, world_size: int) -> int:
        nodes = world_size // self.ranks_per_node
        return self._between(codec, nodes).payloads(codec, nodes)

    def share(self) -> float:
        return 1 / self.ranks_per_node

    def idle(self, world_size: int) -> str:
        if not self.ranks_per_node:
            raise ValueError(f"exchange {self.name!r}: expected the number of ranks per node, as in '{self.name}(8)'")
        return "one node: nothing goes between nodes" if world_size == self.ranks_per_node else ""

    def _between(self, codec: Codec, nodes: int) -> Exchange:
        """Return the exchange of a slice between nodes."""
        return (OneShot() if codec.exchange == OneShot.name else TwoShot()).among(nodes)

    def _wires(self, wire: Wire) -> tuple[Wire, Wire]:
        """Return the wire of this rank's node, and that of the ranks that own the same slice on all nodes."""
        node, me = divmod(wire.rank, self.ranks_per_node)
        first = node * self.ranks_per_node
        inside = wire.part(range(first, first + self.ranks_per_node))
        return inside, wire.part(range(me, wire.world_size, self.ranks_per_node))


def inside(transfer: Transfer) -> Transfer:
    """Mark a transfer as one that does not leave the node, and return it."""
    transfer.inside = True
    return transfer


def count_on_nodes(ranks: Sequence[int]) -> int:
    """Return how many of these ranks of the default group each node has, by torchrun's environment.

    Raises ValueError if the environment does not say, or if the nodes differ.
    """
    text = os.environ.get(LOCAL_RANKS, "")
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(
            f"exchange 'hierarchical': {LOCAL_RANKS} is {text!r}, expected the number of ranks on a node, as torchrun sets "
            "it; or name it: 'hierarchical(8)'"
        )
    nodes = [(node, len(list(same))) for node, same in itertools.groupby(rank // int(text) for rank in ranks)]
    sizes = [size for _, size in nodes]
    if len(set(sizes)) > 1 or len(dict(nodes)) < len(nodes):
        raise ValueError(
            f"exchange 'hierarchical': with {LOCAL_RANKS} {text} the nodes have {', '.join(map(str, sizes))} of these ranks, "
            "one after another; all nodes must have the same number"
        )
    return sizes[0]
