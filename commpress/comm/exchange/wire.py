"""One process group as seen by an exchange: who is there, and messages between all pairs at once.

Point-to-point messages, not collectives, carry the payloads: any lengths, no copies, both directions of a link in use, and
under Gloo a third less time than all_gather for the same bytes. Each message has its own tag, so none is taken for another.

On CPU a header of 24 bytes goes along with every message, at the same time:

    rank 0 -> 1   [label | length | checksum]   tag t
                  [payload ................]    tag f(t, label, length)

The receiver compares the header with what it expects, and both ranks do; a payload that is not expected has no taker. Without
this Gloo ends the process of a rank that gets more than it has room for, and passes over less in silence. The report does not
count headers, nor what the backend itself puts before a message.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings, gather_settings, host_name
from commpress.comm.exchange.label import HALF, HEADER, Header, Label, wait_for
from commpress.comm.failure import FailureBoard, LostPeerError, is_lost
from commpress.comm.joining import sibling


@dataclass
class Transfer:
    """Messages that are on their way, with the rank that each comes from or goes to (None: all). `last` says that the bucket
    starts no further ones."""

    works: list[tuple[int | None, Any]]
    sent: int
    received: int
    last: bool
    decodes: bool = False
    """Whether its bucket is decoded behind it, although another one follows."""
    headers: list[Header] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list, repr=False)
    """Memory that is being sent."""

    def wait(self) -> None:
        """Return when all is received and the sent memory may be reused.

        Raises LostPeerError if a rank is gone or silent, OtherMessageError if one sends something else, DamagedMessageError
        if a payload is not what its checksum says, and what else the process group raises.
        """
        for header in self.headers:
            header.check()
        for peer, work in self.works:
            wait_for(peer, work)
        for header in self.headers:
            header.prove()


class Wire:
    """A group of our own on CPU, on an accelerator the user's; `rank` and `world_size` are this process's within it.

    Collective over the ranks of `group`.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.group: dist.ProcessGroup | None = group
        if device.type == "cpu":
            self.group, hosts = sibling(group)
        else:
            everyone = gather_settings({"host": host_name()}, group, device)
            hosts = tuple(str(other["host"]) for other in everyone)
        self.board = FailureBoard(self.open_group().group_name, self.rank, hosts)
        self._before = ""
        self._after: dict[str, str] = {}
        """Collectives of the group by the one before them, as all ranks had them the last time."""

    @property
    def peers(self) -> list[int]:
        """All other ranks, the next one first."""
        return [(self.rank + step) % self.world_size for step in range(1, self.world_size)]

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor], label: Label, last: bool) -> Transfer:
        """Start sending `sends[r]` (uint8) to every other rank r and receiving `receives[r]` from it; empty ones do not
        travel."""
        group = self.open_group()
        incoming = [r for r in reversed(self.peers) if receives[r].numel()]
        outgoing = [r for r in self.peers if sends[r].numel()]
        sent, received = (sum(t[r].nbytes for r in ranks) for t, ranks in ((sends, outgoing), (receives, incoming)))
        if self.device.type != "cpu":  # NCCL has no tags; it takes all messages as one operation instead
            operations = [dist.P2POp(dist.irecv, receives[r], group=group, group_peer=r) for r in incoming]
            operations += [dist.P2POp(dist.isend, sends[r], group=group, group_peer=r) for r in outgoing]
            batch = dist.batch_isend_irecv(operations) if operations else []
            return Transfer([(None, work) for work in batch], sent, received, last)
        transfer = self._headers(label, last, sends, receives)
        transfer.sent, transfer.received = sent, received
        for r in incoming:
            tag = label.payload_tag(receives[r].nbytes)
            transfer.works.append((r, self._start(dist.irecv, receives[r], tag, r)))
        for r in outgoing:
            transfer.works.append((r, self._start(dist.isend, sends[r], label.payload_tag(sends[r].nbytes), r)))
        return transfer

    def gather(self, settings: Settings, label: Label) -> list[Settings]:
        """Every rank's settings (JSON values), in the order of the ranks. Collective: it waits for all of them.

        A rank that does something else meanwhile is an error, here and there.
        """
        if self.device.type != "cpu":
            return gather_settings(settings, self.open_group(), self.device)
        own = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
        size = torch.tensor([own.numel()], dtype=torch.int64, device="cpu").view(torch.uint8)
        sizes = [torch.empty_like(size) for _ in range(self.world_size)]
        self.all_to_all([size] * self.world_size, sizes, label, last=False).wait()
        texts = [
            torch.empty(int(n.view(torch.int64)), dtype=torch.uint8, device="cpu") for n in self._with(size, sizes)
        ]
        self.all_to_all([own] * self.world_size, texts, label.second(), last=True).wait()
        return [json.loads(bytes(text.tolist())) for text in self._with(own, texts)]

    def _with(self, own: Tensor, others: list[Tensor]) -> list[Tensor]:
        return [*others[: self.rank], own, *others[self.rank + 1 :]]

    def _headers(
        self, label: Label, last: bool, sends: Sequence[Tensor], receives: Sequence[Tensor], nbytes: int | None = None
    ) -> Transfer:
        """Exchange the headers of `sends` and `receives`; of a collective over `nbytes`, which has no payloads."""
        transfer = Transfer([], 0, 0, last)
        for r in reversed(self.peers):
            buffer = torch.empty(HEADER.size, dtype=torch.uint8, device="cpu")
            work = self._start(dist.irecv, buffer, label.tag % HALF, r)
            expected = receives[r].nbytes if nbytes is None else nbytes
            transfer.headers.append(
                Header(r, work, buffer, label, expected, None if nbytes is not None else receives[r])
            )
        for r in self.peers:
            header = label.header(sends[r], sends[r].nbytes if nbytes is None else nbytes)
            transfer.kept.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
            transfer.works.append((r, self._start(dist.isend, transfer.kept[-1], label.tag % HALF, r)))
        return transfer

    def _start(self, operation: Callable[..., Any], x: Tensor, tag: int, peer: int) -> Any:
        try:
            if operation is dist.isend:
                return dist.isend(x, group=self.open_group(), tag=tag, group_dst=peer)
            return dist.irecv(x, group=self.open_group(), tag=tag, group_src=peer)
        except RuntimeError as error:
            if is_lost(error):
                raise LostPeerError(peer, str(error)) from None
            raise

    def collective(
        self, start: Callable[[dist.ProcessGroup], Any], nbytes: int, label: Label, sent: int, received: int
    ) -> Transfer:
        """Start one of the group's own collectives, over `nbytes` on each rank: it is the only transfer of its bucket.

        `start` takes the group and returns the work. One that comes as it came the last time starts at once, its headers
        beside it. Any other waits for them first, so no rank is ever in two different collectives, which Gloo does not
        survive: a rank that expected another one is told so by those who start at once.
        """
        if self.device.type != "cpu":
            return Transfer([(None, start(self.open_group()))], sent, received, last=True)
        label, text = replace(label, proven=False), _collective_text(nbytes, label)
        before, self._before = self._before, text
        none = [torch.empty(0, dtype=torch.uint8, device="cpu")] * self.world_size
        transfer = self._headers(label, True, none, none, nbytes)
        if self._after.get(before) != text:
            transfer.wait()
            self._after[before] = text
            transfer.headers, transfer.works = [], []
        transfer.sent, transfer.received = sent, received
        try:
            transfer.works.append((None, start(self.open_group())))
        except RuntimeError as error:
            if is_lost(error):
                raise LostPeerError(None, str(error)) from None
            raise
        return transfer

    def starts_at_once(self, nbytes: int, label: Label) -> bool:
        """Whether a collective would start now, without waiting for the headers of other ranks."""
        return self._after.get(self._before) == _collective_text(nbytes, label)

    def lost_peer(self) -> int | None:
        """The rank whose connection is broken, where a collective has failed that does not say; None if it is not just one."""
        lost = []
        for r in self.peers:
            try:
                self._start(dist.isend, torch.zeros(1, dtype=torch.uint8, device="cpu"), HALF - 1, r)
            except LostPeerError:
                lost.append(r)
            except RuntimeError:
                return None  # closed by ourselves
        return lost[0] if len(lost) == 1 else self.peers[0] if self.world_size == 2 else None

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
                dist.destroy_process_group(group)
            else:
                group._get_backend(self.device).abort()

    def all_reduce(self, x: Tensor, label: Label, op: Any = dist.ReduceOp.SUM) -> Transfer:
        """Start the group's own reduction of `x`, in place. A ring sends 2 (W - 1) / W of the tensor."""
        crossing = ring_bytes(x.nbytes, self.world_size)

        def start(group: dist.ProcessGroup) -> Any:
            return dist.all_reduce(x, op=op, group=group, async_op=True)

        return self.collective(start, x.nbytes, label, crossing, crossing)

    def broadcast(self, x: Tensor, source: int, label: Label) -> Transfer:
        """Start sending `x` ([n], contiguous) from the rank `source` of the group to all others, in a binomial tree."""
        children = tree_children(self.rank, source, self.world_size)

        def start(group: dist.ProcessGroup) -> Any:
            return dist.broadcast(x, group=group, group_src=source, async_op=True)

        return self.collective(start, x.nbytes, label, x.nbytes * children, x.nbytes * (self.rank != source))


def _collective_text(nbytes: int, label: Label) -> str:
    return f"{label.text}: {nbytes} bytes"


def tree_children(rank: int, source: int, world_size: int) -> int:
    """How many ranks this one sends to in Gloo's binomial tree."""
    place = (rank - source) % world_size
    steps = range((world_size - 1).bit_length())
    return sum(place % 2 ** (i + 1) == 0 and place + 2**i < world_size for i in steps)


def ring_bytes(nbytes: int, world_size: int) -> int:
    """Return what each rank sends when a tensor of `nbytes` is all-reduced in a ring: 2 (W - 1) / W of it."""
    return 2 * (world_size - 1) * nbytes // world_size
