"""One process group as seen by an exchange: who is there, and messages between all pairs at once.

Point-to-point messages, not collectives, carry the payloads: any lengths, no copies, both directions of a link in use, and
under Gloo a third less time than all_gather for the same bytes. Each message has its own tag, so none is taken for another.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_closed: "weakref.WeakKeyDictionary[dist.ProcessGroup, list[str]]" = weakref.WeakKeyDictionary()
"""By default group: the names of groups of ours that were closed, whose addresses are still in its store."""


@dataclass
class Transfer:
    """Messages that are on their way. `last` says that the bucket starts no further ones."""

    works: list[Any]
    sent: int
    received: int
    last: bool

    def wait(self) -> None:
        """Return when all is received and the sent memory may be reused; raises what the process group raises."""
        for work in self.works:
            work.wait()


@dataclass
class Wire:
    """A process group; `rank` and `world_size` are this process's within it."""

    group: dist.ProcessGroup | None
    device: torch.device
    rank: int = field(init=False)
    world_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)

    def swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor], tag: int, last: bool) -> Transfer:
        """Start sending `sends[r]` to every other rank r and receiving `receives[r]` from it; empty ones do not travel."""
        group = self.open_group()
        peers = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]
        incoming = [r for r in reversed(peers) if receives[r].numel()]
        outgoing = [r for r in peers if sends[r].numel()]
        if self.device.type != "cpu":  # NCCL has no tags; it takes all messages as one operation instead
            operations = [dist.P2POp(dist.irecv, receives[r], group=group, group_peer=r) for r in incoming]
            operations += [dist.P2POp(dist.isend, sends[r], group=group, group_peer=r) for r in outgoing]
            works: list[Any] = dist.batch_isend_irecv(operations) if operations else []
        else:
            works = [dist.irecv(receives[r], group=group, tag=tag, group_src=r) for r in incoming]
            works += [dist.isend(sends[r], group=group, tag=tag, group_dst=r) for r in outgoing]
        sent, received = (sum(t[r].nbytes for r in ranks) for t, ranks in ((sends, outgoing), (receives, incoming)))
        return Transfer(works, sent, received, last)

    def open_group(self) -> dist.ProcessGroup:
        """The group. Once closed it is None, which torch would take for the default group, the user's own."""
        if (group := self.group) is None:
            raise RuntimeError("the connections are closed")
        return group

    def close(self) -> None:
        """Close the connections, so that peers fail at once instead of waiting for the group's timeout.

        Gloo's `abort` leaves its sockets open; they close with the last reference to the group and to work in flight.
        """
        group, self.group = self.open_group(), None
        with contextlib.suppress(Exception):  # what cannot be closed fails by its timeout
            if self.device.type == "cpu":
                name = group.group_name
                dist.destroy_process_group(group)
                _closed.setdefault(dist.distributed_c10d._get_default_group(), []).append(name)
            else:
                group._get_backend(self.device).abort()

    def all_reduce(self, x: Tensor) -> Transfer:
        """Start the group's own sum of `x`, in place. A ring sends 2 (W - 1) / W of the tensor."""
        work = dist.all_reduce(x, group=self.open_group(), async_op=True)
        crossing = ring_bytes(x.nbytes, self.world_size)
        return Transfer([work], crossing, crossing, last=True)

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        """Start sending `x` ([n], contiguous) from the rank `source` of the group to all others, in a binomial tree."""
        work = dist.broadcast(x, group=self.open_group(), group_src=source, async_op=True)
        return Transfer(
            [work],
            x.nbytes * tree_children(self.rank, source, self.world_size),
            x.nbytes * (self.rank != source),
            last=True,
        )


def sibling(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A new group of the same ranks and timeout. Collective over those ranks only."""
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", None)
    ranks = dist.get_process_group_ranks(group)
    with _closed_names_taken():
        group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True, group_desc="commpress")
    assert isinstance(group, dist.ProcessGroup)
    # a rank that fails at once closes its connections, while others may still be making theirs
    dist.barrier(group=group)
    return group


@contextlib.contextmanager
def _closed_names_taken() -> Iterator[None]:
    """Have torch, which names a group by its ranks and how many groups there are, use no name twice in one store.

    A second group of that name would meet the addresses of the first. The names are as if none had been closed, so it does not
    matter which ranks know already that one was.
    """
    names = dist.distributed_c10d._world.pg_names
    standing: dict[Any, str] = {object(): name for name in _closed.get(dist.distributed_c10d._get_default_group(), ())}
    names.update(standing)
    try:
        yield
    finally:
        for key in standing:
            del names[key]


def tree_children(rank: int, source: int, world_size: int) -> int:
    """How many ranks this one sends to in Gloo's binomial tree."""
    place = (rank - source) % world_size
    steps = range((world_size - 1).bit_length())
    return sum(place % 2 ** (i + 1) == 0 and place + 2**i < world_size for i in steps)


def ring_bytes(nbytes: int, world_size: int) -> int:
    """What each rank sends when a tensor of `nbytes` is all-reduced in a ring: 2 (W - 1) / W of it."""
    return 2 * (world_size - 1) * nbytes // world_size
