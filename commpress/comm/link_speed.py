"""The speed of the links between hosts and inside them, measured by exchanges that load both directions at once.

    hosts [0 1] [2 3] [4 5]      between: 0 -> 2 -> 4 -> 0 beside 1 -> 3 -> 5 -> 1: each host's link, both ways
                                 inside:  0 <-> 1 beside 2 <-> 3 beside 4 <-> 5

    seconds of an exchange = latency + bytes / bandwidth

Latency is half the round trip of a small message. Bandwidth comes from the difference of two sizes, a message and a quarter of
it, so neither latency nor the unshaped bytes at the start count. Medians are taken per rank, then the slowest rank counts: in
an exchange all wait for it. All ranks repeat equally often, by the seconds of the slowest.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

SMALL = 8
"""Bytes of the message that measures latency."""
LEAST, MOST = 2**16, 2**26
"""Bytes of the first message that measures bandwidth, and of the last; each is four times the one before."""
GROWTH = 4
OVER_LATENCY = 4
"""How many times as long as a small message a large one must take, and which share of the time."""
ENOUGH = 1 / 20
LATENCY_SHARE = 0.2
"""Share of the time for small messages."""
FEWEST, MOST_REPEATS = 5, 100

Ring = Mapping[int, tuple[int, int]]
"""For each rank: the rank that it sends to, and the rank that it receives from. Other ranks take no part."""


@dataclass(frozen=True)
class LinkSpeed:
    """A link as an exchange finds it."""

    latency: float
    """Seconds, one way."""
    bandwidth: float
    """Bytes of payload a second, in each direction while both are loaded."""
    nbytes: int
    """Bytes of the message that measured it."""
    repeats: int
    """How often that message was sent."""


def by_host(names: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each host, from the hosts' names by rank; hosts in the order of their first ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        hosts.setdefault(name, []).append(rank)
    return list(hosts.values())


def ring_between(hosts: Sequence[Sequence[int]]) -> Ring:
    """Return a ring through all hosts for each of the ranks that every host has; empty if there is one host."""
    if len(hosts) == 1:
        return {}
    lanes = zip(*hosts, strict=False)  # as many as the smallest host has ranks
    return {rank: place for lane in lanes for rank, place in _ring(lane).items()}


def ring_inside(hosts: Sequence[Sequence[int]]) -> Ring:
    """Return a ring through the ranks of each host; empty if no host has two."""
    return {rank: place for ranks in hosts if len(ranks) > 1 for rank, place in _ring(ranks).items()}


def between_and_inside(
    hosts: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device, seconds: float, most: int
) -> tuple[LinkSpeed | None, LinkSpeed | None]:
    """Measure the link of a host to the others, and that of a rank to its neighbour on a host; None for a missing one.

    `hosts` has the ranks of `group` by host. Takes about `seconds`; on links where a few messages take
    longer, more. No message is larger than `most` bytes. Collective.
    """
    rings = ring_between(hosts), ring_inside(hosts)
    share = seconds / max(1, sum(map(bool, rings)))
    between, inside = (measure(ring, group, device, share, most) if ring else None for ring in rings)
    if between is not None:  # all lanes of a host go over its link
        between = replace(between, bandwidth=between.bandwidth * min(map(len, hosts)))
    return between, inside


def measure(ring: Ring, group: dist.ProcessGroup, device: torch.device, seconds: float, most: int) -> LinkSpeed:
    """Measure the messages of each rank to the next of the ring. Collective, also for ranks that are not in it."""
    exchange = _Exchange(ring.get(dist.get_rank(group)), group, device)
    once = largest(exchange.round_trips(2)[-1], group, device)  # the first connects
    trips = exchange.round_trips(1 + repeats(LATENCY_SHARE * seconds, once))[1:]
    latency = largest(statistics.median(trips), group, device) / 2

    nbytes = LEAST
    while True:
        exchange.forward(nbytes)  # the window of a connection grows
        once = largest(exchange.forward(nbytes), group, device)
        if nbytes >= most or once >= max(OVER_LATENCY * latency, ENOUGH * seconds):
            break
        nbytes *= GROWTH
    part = nbytes // GROWTH
    count = repeats((1 - LATENCY_SHARE) * seconds, once * (1 + 1 / GROWTH))
    times = [(exchange.forward(part), exchange.forward(nbytes)) for _ in range(count)]
    few, all_ = (largest(statistics.median(of), group, device) for of in zip(*times, strict=True))
    return LinkSpeed(latency, bandwidth(part, few, nbytes, all_), nbytes, count)


def bandwidth(part: int, few: float, nbytes: int, whole: float) -> float:
    """Return bytes a second, from the seconds of `part` bytes and of all `nbytes`.

    If the seconds differ by less than half as much as the sizes, something disturbed one of them: then all bytes
    and all seconds count.
    """
    expected = whole * (nbytes - part) / nbytes
    return (nbytes - part) / (whole - few) if whole - few > expected / 2 else nbytes / whole


def repeats(seconds: float, once: float, most: int = MOST_REPEATS) -> int:
    """Return how often to repeat something that takes `once` within `seconds`, FEWEST times at least."""
    return min(most, max(FEWEST, int(seconds / once)))


def largest(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the largest of the ranks' values. Collective."""
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return found.item()


class _Exchange:
    """Messages to the next rank of a ring and from the rank before; a rank that is in no ring has 0 s."""

    def __init__(self, place: tuple[int, int] | None, group: dist.ProcessGroup, device: torch.device) -> None:
        self._peers = None if place is None else tuple(dist.get_global_rank(group, rank) for rank in place)
        self._group, self._device = group, device
        self._out, self._into = (torch.zeros(LEAST, dtype=torch.uint8, device=device) for _ in range(2))

    def round_trips(self, count: int) -> list[float]:
        """Return `count` times the seconds until a small message has come back; each rank returns its neighbour's at once."""
        if self._peers is None:
            return [0.0] * count
        return (self._ready_trips if self._device.type == "cpu" else self._swapped_trips)(count, *self._peers)

    def _swapped_trips(self, count: int, next_: int, before: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._swap(SMALL, next_, before)
            self._swap(SMALL, before, next_)
            times.append(time.perf_counter() - start)
        return times

    def _ready_trips(self, count: int, next_: int, before: int) -> list[float]:
        # Gloo sends once it hears that the other is ready to receive: if all are at first, the link is crossed once each way
        there, back = 1, 2  # tags
        buffers = torch.zeros(2, count, SMALL, dtype=torch.uint8, device=self._device)
        coming = [dist.irecv(into, before, self._group, there) for into in buffers[0]]
        returning = [dist.irecv(into, next_, self._group, back) for into in buffers[1]]
        own, sent, times = self._out[:SMALL], [], []
        for arrival, echo in zip(coming, returning, strict=True):
            start = time.perf_counter()
            sent.append(dist.isend(own, next_, self._group, there))
            _wait(arrival)
            sent.append(dist.isend(own, before, self._group, back))
            _wait(echo)
            times.append(time.perf_counter() - start)
        for message in sent:
            _wait(message)
        return times

    def forward(self, nbytes: int) -> float:
        """Return the seconds to send so many bytes and to receive as many."""
        if nbytes > self._out.numel():
            self._out, self._into = (torch.zeros(nbytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        return self._timed(lambda next_, before: self._swap(nbytes, next_, before))

    def _timed(self, call: Callable[[int, int], object]) -> float:
        if self._peers is None:
            return 0.0
        start = time.perf_counter()
        call(*self._peers)
        return time.perf_counter() - start

    def _swap(self, nbytes: int, to: int, source: int) -> None:
        # that we are ready to receive must not wait behind our own message: a Gloo rank sends once it hears that
        ops = [
            dist.P2POp(dist.irecv, self._into[:nbytes], source, self._group),
            dist.P2POp(dist.isend, self._out[:nbytes], to, self._group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _wait(work: dist.Work | None) -> None:
    assert work is not None  # this rank is in the group
    work.wait()


def _ring(ranks: Sequence[int]) -> Ring:
    return {rank: (ranks[(i + 1) % len(ranks)], ranks[i - 1]) for i, rank in enumerate(ranks)}
