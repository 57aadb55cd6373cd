"""One process group for an exchange: its ranks, and the transfers between all pairs at once.

On an accelerator one collective carries a transfer: `all_to_all_single` or `all_gather_single` over one flat buffer, which both
NCCL and Gloo have. On CPU point-to-point messages carry it. They have any lengths, need no copies, use both directions of a
link, and take a third less time than Gloo's all_gather for the same bytes. Each message has its own tag, so that none is
mistaken for another.

A header of 24 bytes is sent with every message, at the same time:

    rank 0 -> 1   [label | length | checksum]   tag t
                  [payload ................]    tag f(t, label, length)

Each receiver compares the header with the one that it expects; an unexpected payload is not received. Without this check Gloo
ends the process of a rank that gets more bytes than it has room for, and silently accepts fewer. The report counts neither
headers nor the backend's own bytes before a message.

A collective of the group that comes as it came before has no headers, since they would cost more than its own start. A rank
that waits for it longer than `HELD_SECONDS` (more if ranks are only slow) then sends them (`held.py`).
"""

import contextlib
import copy
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings, gather_settings
from commpress.comm.exchange.held import Waits
from commpress.comm.exchange.label import HALF, HEADER, Header, Label, wait_for
from commpress.comm.failure import SILENT_PEER, FailureBoard, LostPeerError, is_lost
from commpress.comm.joining import part_of, sibling
from commpress.notice import host_name


@dataclass
class Transfer:
    """Messages under way, each with the rank that it comes from or goes to (None: all). `last`: the bucket's last transfer."""

    works: list[tuple[int | None, Any]]
    sent: int
    received: int
    last: bool
    decodes: bool = False
    """Whether its bucket is decoded after it, although another transfer follows."""
    inside: bool = False
    """Whether it stays inside a node."""
    headers: list[Header] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list, repr=False)
    """Memory that is being sent."""
    arrived: Callable[[], None] | None = field(default=None, repr=False)
    """Copies the received bytes to their place, if they arrived elsewhere."""
    wait_for: Callable[[Any], None] | None = field(default=None, repr=False)
    """Waits for a collective that has no headers."""

    def wait(self) -> None:
        """Wait until everything is received and the sent memory may be reused.

        Raises LostPeerError if a rank is gone or silent, OtherMessageError if one sends something else, DamagedMessageError if
        a payload does not fit its checksum, and other errors of the process group.
        """
        for header in self.headers:
            header.check()
        for peer, work in self.works:
            wait_for(peer, work) if self.wait_for is None else self.wait_for(work)
        for header in self.headers:
            header.prove()
        if self.arrived is not None:
            self.arrived()


class Wire:
    """The connections of one process group: on CPU commpress's own group, on an accelerator the user's.

    `rank` and `world_size` are this process's in the group. Collective over the ranks of `group`.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.by_message = device.type == "cpu"
        """Whether point-to-point messages carry a transfer; if not, collectives do."""
        if device.type == "cpu":
            group, hosts = sibling(group)
            self._name = str(group.group_name)
        else:
            everyone = gather_settings({"host": host_name(), "name": uuid.uuid4().hex}, group, device)
            hosts = tuple(str(other["host"]) for other in everyone)
            self._name = f"commpress {everyone[0]['name']}"
        self._open = [group]
        """The group; empty once it is closed."""
        self.members: tuple[int, ...] = tuple(range(self.world_size))
        """The ranks, in that group, that this wire connects."""
        self._parts: dict[tuple[int, ...], Wire] = {}
        self.board = FailureBoard(group.group_name, self.rank, hosts)
        self._waits = Waits(self.board)
        ranks = dist.get_process_group_ranks(group)
        self._keeper = ranks.index(0) if 0 in ranks else None
        """The rank that keeps the default group's store; None if it is not in this group."""
        self._before = ""
        self._after: dict[str, str] = {}
        """The last collective that followed each collective, the same on all ranks."""

    def part(self, ranks: Sequence[int]) -> "Wire":
        """Return the wire between some of the ranks, this rank included. It closes with this wire, and its errors name ranks
        as this wire's do.

        On CPU it uses the same group. On an accelerator it has a group of its own; the first call is then collective over
        `ranks`.
        """
        members = tuple(ranks)
        if (part := self._parts.get(members)) is None:
            part = self._parts[members] = copy.copy(self)
            part.rank, part.world_size, part.members = members.index(self.rank), len(members), members
            part._parts = {}
            if not self.by_message and members != self.members:
                part._open = [part_of(self.open_group(), members, f"{self._name} {members}", self.device)]
        return part

    @property
    def peers(self) -> list[int]:
        """All other ranks, the next one first."""
        return [(self.rank + step) % self.world_size for step in range(1, self.world_size)]

    def all_to_all(
        self,
        outgoing: Tensor,
        sizes: Sequence[int],
        incoming: Tensor,
        label: Label,
        last: bool,
        arriving: Sequence[int] | None = None,
    ) -> Transfer:
        """Start sending part r of `outgoing` (uint8, `sizes[r]` bytes) to rank r, and receiving the parts that are for this
        rank from all, one behind the other, in `incoming` (uint8, `arriving[r]` bytes from rank r). By default all ranks have
        the same sizes, so that `sizes[rank]` come from each.

        The caller copies a rank's part for itself to `incoming`. Unless `by_message` it must also be in `outgoing`, since a
        collective carries it, too.
        """
        me, W = self.rank, self.world_size
        sent, received = list(sizes), [sizes[me]] * W if arriving is None else list(arriving)
        if self.by_message:
            return self._messages(outgoing.split(sent), incoming.split(received), label, last)
        transfer = Transfer([], sum(sent) - sent[me], sum(received) - received[me], last)
        if sum(sent) or arriving is not None:  # where sizes differ, others may have something to send
            work = dist.all_to_all_single(incoming, outgoing, received, sent, group=self.open_group(), async_op=True)
            transfer.works.append((None, work))
        return transfer

    def all_gather(self, rows: Sequence[Tensor], label: Label, last: bool, whole: Tensor | None = None) -> Transfer:
        """Start sending this rank's row (uint8) to all, and receiving their rows in the other `rows`.

        `whole` is the memory of the rows if row r begins at r times the longest length: one collective can fill it. Without
        `whole` the rows are copied to such memory and back, unless `by_message`.
        """
        me, W = self.rank, self.world_size
        if self.by_message:
            return self._messages([rows[me]] * W, rows, label, last)
        size = max(row.numel() for row in rows)
        transfer = Transfer([], (W - 1) * rows[me].nbytes, sum(row.nbytes for row in rows) - rows[me].nbytes, last)
        if not size:
            return transfer
        found = torch.empty(W * size, dtype=torch.uint8, device=self.device) if whole is None else whole
        places = found.split(size)
        if whole is None:
            places[me][: rows[me].numel()].copy_(rows[me])

            def arrived() -> None:
                for r in self.peers:
                    rows[r].copy_(places[r][: rows[r].numel()])

            transfer.arrived = arrived
        work = dist.all_gather_single(found, places[me], group=self.open_group(), async_op=True)
        transfer.works.append((None, work))
        return transfer

    def _messages(self, sends: Sequence[Tensor], receives: Sequence[Tensor], label: Label, last: bool) -> Transfer:
        """Start sending `sends[r]` to every other rank r and receiving `receives[r]` from it; empty ones are not sent."""
        incoming = [r for r in reversed(self.peers) if receives[r].numel()]
        outgoing = [r for r in self.peers if sends[r].numel()]
        transfer = self._headers(label, last, sends, receives)
        transfer.sent = sum(sends[r].nbytes for r in outgoing)
        transfer.received = sum(receives[r].nbytes for r in incoming)
        for r in incoming:
            tag = label.payload_tag(receives[r].nbytes)
            transfer.works.append((self.members[r], self._start(dist.irecv, receives[r], tag, r)))
        for r in outgoing:
            tag = label.payload_tag(sends[r].nbytes)
            transfer.works.append((self.members[r], self._start(dist.isend, sends[r], tag, r)))
        return transfer

    def gather(self, settings: Settings, label: Label) -> list[Settings]:
        """Return every rank's settings (JSON values), in the order of the ranks. Collective: it waits for all ranks.

        If a rank does something else meanwhile, it and the others raise an error.
        """
        if not self.by_message:
            return gather_settings(settings, self.open_group(), self.device)
        own = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
        size = torch.tensor([own.numel()], dtype=torch.int64, device="cpu").view(torch.uint8)
        sizes = [torch.empty_like(size) for _ in range(self.world_size)]
        self._messages([size] * self.world_size, sizes, label, last=False).wait()
        texts = [
            torch.empty(int(n.view(torch.int64)), dtype=torch.uint8, device="cpu") for n in self._with(size, sizes)
        ]
        self._messages([own] * self.world_size, texts, label.second(), last=True).wait()
        return [json.loads(bytes(text.tolist())) for text in self._with(own, texts)]

    def _with(self, own: Tensor, others: list[Tensor]) -> list[Tensor]:
        return [*others[: self.rank], own, *others[self.rank + 1 :]]

    def _headers(
        self, label: Label, last: bool, sends: Sequence[Tensor], receives: Sequence[Tensor], nbytes: int | None = None
    ) -> Transfer:
        """Exchange the headers of `sends` and `receives`, or those of a collective over `nbytes`, which has no payloads."""
        transfer = Transfer([], 0, 0, last)
        for r in reversed(self.peers):
            buffer = torch.empty(HEADER.size, dtype=torch.uint8, device="cpu")
            work = self._start(dist.irecv, buffer, label.tag % HALF, r)
            expected = receives[r].nbytes if nbytes is None else nbytes
            payload = None if nbytes is not None else receives[r]
            transfer.headers.append(Header(self.members[r], work, buffer, label, expected, payload))
        for r in self.peers:
            transfer.kept.append(label.header(sends[r], sends[r].nbytes if nbytes is None else nbytes))
            work = self._start(dist.isend, transfer.kept[-1], label.tag % HALF, r)
            transfer.works.append((self.members[r], work))
        return transfer

    def _send_header(self, label: Label, nbytes: int) -> tuple[Tensor, list[Any]]:
        """Send all ranks the header of a collective over `nbytes`. Returns the objects to keep alive until that has ended."""
        header = label.header(torch.empty(0, dtype=torch.uint8, device="cpu"), nbytes)
        return header, [self._start(dist.isend, header, label.tag % HALF, r) for r in self.peers]

    def _start(self, operation: Callable[..., Any], x: Tensor, tag: int, peer: int) -> Any:
        member = self.members[peer]
        try:
            if operation is dist.isend:
                return dist.isend(x, group=self.open_group(), tag=tag, group_dst=member)
            return dist.irecv(x, group=self.open_group(), tag=tag, group_src=member)
        except RuntimeError as error:
            if is_lost(error):
                raise LostPeerError(member, str(error)) from None
            raise

    def collective(
        self,
        start: Callable[[dist.ProcessGroup], Any],
        nbytes: int,
        label: Label,
        sent: int,
        received: int,
        ends_together: bool = True,
    ) -> Transfer:
        """Start one of the group's own collectives, over `nbytes` on each rank: it is the only transfer of its bucket.

        `start` takes the group and returns the work. A collective that follows the same one as last time starts at once. Any
        other waits for its headers first, so that two ranks are never in different collectives, which Gloo does not survive.
        Ranks that have started at once send their headers when they are held up, and so tell a rank that expected another
        collective. This works only if the collective `ends_together`: it ends on no rank before all have started it. If it does
        not, or if the ranks must have drawn by one number, the headers are sent beside it.
        """
        if not self.by_message:
            return Transfer([(None, start(self.open_group()))], sent, received, last=True)
        label, text = replace(label, proven=False), _collective_text(nbytes, label)
        before, self._before = self._before, text
        known, transfer = self._after.get(before) == text, Transfer([], 0, 0, last=True)
        if not known or label.draw or not ends_together:
            none = [torch.empty(0, dtype=torch.uint8, device="cpu")] * self.world_size
            transfer = self._headers(label, True, none, none, nbytes)
        else:
            send = partial(self._send_header, label, nbytes)
            transfer.wait_for = partial(self._waits.wait_for, text=text, send=send)
        if not known:
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

    def lost_peer(self, text: str) -> LostPeerError:
        """Return the error for a failed collective with this text. It names the rank that is to blame, if that can be found."""
        if self.world_size == 2:
            return LostPeerError(self.peers[0], text)
        try:
            silent = self.board.silent()
        except TimeoutError as error:  # with the rank that keeps the store
            return LostPeerError(self._keeper, f"Wait timeout of the store ({error}): {text}")
        except RuntimeError:
            return LostPeerError(self._keeper, text)
        lost = self._lost_connections()
        if silent is not None and (len(lost) != 1 or SILENT_PEER.search(text)):
            return LostPeerError(silent, text)
        if self._keeper in lost and not self.board.answers():  # the other ranks closed their connections because of it
            lost = [self._keeper]
        return LostPeerError(lost[0] if len(lost) == 1 else None, text)

    def _lost_connections(self) -> list[int]:
        """Return the ranks whose connections are broken; none if this rank has closed them."""
        lost = []
        for r in self.peers:
            try:
                self._start(dist.isend, torch.zeros(1, dtype=torch.uint8, device="cpu"), HALF - 1, r)
            except LostPeerError:
                lost.append(r)
            except RuntimeError:
                return []  # this rank closed them
        return lost

    def open_group(self) -> dist.ProcessGroup:
        """Return the group. Raises RuntimeError once it is closed: torch would take None for the user's default group."""
        if not self._open:
            raise RuntimeError("the connections are closed")
        return self._open[0]

    def close(self) -> None:
        """Close the connections, so that peers fail at once instead of waiting for the group's timeout.

        Gloo's `abort` leaves its sockets open; they close with the last reference to the group and to work in flight.
        """
        self.open_group()
        for wire in (self, *self._parts.values()):
            if not wire._open:
                continue  # the same group
            group = wire._open.pop()
            with contextlib.suppress(Exception):  # a group that cannot be closed fails at its timeout
                if self.device.type == "cpu":
                    dist.destroy_process_group(group)
                else:
                    group._get_backend(self.device).abort()
            del group

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

        sent, received = x.nbytes * children, x.nbytes * (self.rank != source)
        return self.collective(start, x.nbytes, label, sent, received, ends_together=False)


def _collective_text(nbytes: int, label: Label) -> str:
    return f"{label.text}: {nbytes} bytes"


def tree_children(rank: int, source: int, world_size: int) -> int:
    """Return the number of ranks to which this one sends in Gloo's binomial tree."""
    place = (rank - source) % world_size
    steps = range((world_size - 1).bit_length())
    return sum(place % 2 ** (i + 1) == 0 and place + 2**i < world_size for i in steps)


def ring_bytes(nbytes: int, world_size: int) -> int:
    """Return the bytes that each rank sends to all-reduce a tensor of `nbytes` in a ring: 2 (W - 1) / W of it."""
    return 2 * (world_size - 1) * nbytes // world_size
