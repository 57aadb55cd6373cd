"""Costs of an exchange before it runs: bytes, seconds, and the bandwidth above which compressing no longer pays.

    a transfer = bytes / bandwidth + rounds x latency        a codec = values x seconds a value, on one core

A step is simulated bucket by bucket: backward, the sequencer's two lines and the link run side by side, and
share the rank's cores. Pure functions: no process group, and nothing is measured here.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

from commpress.comm.plan import BucketPlan, Plan

BACKWARD = 2 / 3
"""Backward's share of a step without communication: a layer's backward computes twice as much as its forward."""
FRAME = 1514 / 1448
"""Bytes on an Ethernet link for each byte sent: TCP with time stamps, frames of 1500 bytes."""
SLOWEST, FASTEST = 1e3, 1e15
"""The range of the break-even bandwidth, in bytes a second."""
PRECISION = 0.01
"""The tolerance of the break-even bandwidth, as a share of it."""
MOST_BUCKETS = 100
"""The number of buckets that each try simulates: more change little, but take longer."""
EPSILON = 1e-12
"""Seconds of work that count as none: rounding errors."""
DENSE = Plan.of("none")


@dataclass(frozen=True)
class Speed:
    """Seconds a value of a codec on one core."""

    encode: float
    """With error feedback, if the codec needs it."""
    mean: tuple[float, float]
    """Seconds for one payload, and for each further one."""
    recode: tuple[float, float]
    """Seconds for one payload, and for each further one: the middle of `two_shot`."""
    add: float = 0.0
    """Adding two payloads of a linear codec, as in the group's all-reduce."""

    def scaled(self, factor: float) -> "Speed":
        """Return the speed on cores that take `factor` times as long."""
        mean, recode = ((one * factor, more * factor) for one, more in (self.mean, self.recode))
        return Speed(self.encode * factor, mean, recode, self.add * factor)


@dataclass(frozen=True)
class Cluster:
    """The ranks that exchange, and their links and cores."""

    world_size: int
    bandwidth: float
    """Bytes a second of a host's link, in each direction at once."""
    latency: float = 0.0
    """Seconds from host to host, one way."""
    ranks_per_host: int = 1
    cores: float = math.inf
    """Cores of one rank. Backward uses all of them, and other work takes its fair share. Infinite: backward runs
    on an accelerator, or cores are free, and nothing slows it down."""
    stack: float = 0.0
    """Core-seconds a byte of the operating system to send or receive."""
    lines: bool = True
    """Buckets overlap each other in the sequencer's two lines (CPU), or run one after another on a stream (accelerator)."""


@dataclass(frozen=True)
class Transfer:
    """One message of a bucket: the bytes that a rank sends and receives, and those on its host's link in one direction."""

    sent: int
    received: int
    crossing: float
    rounds: int


@dataclass(frozen=True)
class Step:
    """A predicted step: its seconds, the seconds that training waits after backward, and the bytes that a rank sends."""

    seconds: float
    exposed: float
    sent_bytes: int


# --- bytes -------------------------------------------------------------------------------------------------------


def layout(values: int, bucket_bytes: float, itemsize: int = 4) -> list[int]:
    """Return the values of each bucket in the order of backward, all full but the last. Raises ValueError."""
    size = int(bucket_bytes // itemsize)
    if values < 1 or size < 1:
        raise ValueError(f"{values} values in buckets of {bucket_bytes} bytes: expected at least one value in each")
    return [size] * (values // size) + [values % size] * (values % size > 0)


@lru_cache(maxsize=4096)
def transfers(
    choice: BucketPlan, n: int, itemsize: int, world_size: int, rank: int = 0, ranks_per_host: int = 1
) -> tuple[Transfer, ...]:
    """Return the transfers of one bucket of n values on one rank; their bytes are exactly those of the exchange."""
    W = world_size
    if W == 1:
        return ()
    abroad = ranks_per_host * max(0, W - ranks_per_host) / (W - 1)
    found = []
    for message in choice.exchange.messages(n, itemsize, choice.codec, W, rank):
        # a ring in the order of the ranks has one link that leaves a host
        crossing = message.sent * float(ranks_per_host < W)
        if not message.ring:
            leave = {None: abroad, True: ranks_per_host, False: 0}[message.between_nodes]
            crossing = max(message.sent, message.received) * float(leave)
        found.append(Transfer(message.sent, message.received, crossing, message.rounds))
    return tuple(found)


def sent_bytes(plan: Plan, buckets: Sequence[int], world_size: int, rank: int = 0, itemsize: int = 4) -> int:
    """Return the bytes that a rank sends in one step."""
    choices = ((plan.choose(n, itemsize, world_size), n) for n in buckets)
    return sum(m.sent for choice, n in choices for m in transfers(choice, n, itemsize, world_size, rank))


def feedback_bytes(plan: Plan, buckets: Sequence[int], world_size: int, itemsize: int = 4) -> int:
    """Return the bytes of memory that error feedback keeps on a rank."""
    kept = 0
    for n in buckets:
        choice = plan.choose(n, itemsize, world_size)
        again = choice.exchange.chunk(n, choice.codec, 0, world_size) is not None
        chunk = -(-n // world_size) if again else 0
        kept += 4 * (math.ceil(n * choice.exchange.share()) + chunk) * choice.feedback
    return kept


# --- seconds -----------------------------------------------------------------------------------------------------


def step(
    plan: Plan,
    buckets: Sequence[int],
    speed: Speed,
    cluster: Cluster,
    compute: float = 0.0,
    itemsize: int = 4,
    ready: Sequence[float] = (),
) -> Step:
    """Predict a step whose computation takes `compute` seconds; with 0 only the communication, all buckets ready at once.

    `buckets` are the numbers of values in each. A plan of `none` is plain DDP. `ready` are the seconds at which each bucket is
    ready, from any moment of backward on, if they were measured; else backward takes `BACKWARD` of the computation, and each
    bucket its share of the values.
    """
    W = cluster.world_size
    if W == 1:
        return Step(compute, 0.0, 0)
    if ready:
        backward, fills = ready[-1], [after - before for before, after in itertools.pairwise((0.0, *ready))]
    else:
        backward, total = BACKWARD * compute, sum(buckets)
        fills = [backward * n / total for n in buckets]
    jobs = [
        _job(plan.choose(n, itemsize, W), n, itemsize, speed, cluster, fill)
        for n, fill in zip(buckets, fills, strict=True)
    ]
    end = _Simulation(jobs, cluster).run()
    filled = jobs[-1].fill.finished
    assert filled is not None
    return Step(compute - backward + end, end - filled, sent_bytes(plan, buckets, W, 0, itemsize))


def joined(
    buckets: Sequence[int], cluster: Cluster, ready: Sequence[float] = ()
) -> tuple[list[int], Cluster, list[float]]:
    """Return at most MOST_BUCKETS buckets, each several of these if they are more, the cluster with their latencies, and when
    each is ready, if `ready` has that."""
    each = max(1, -(-len(buckets) // MOST_BUCKETS))
    together = [sum(buckets[i : i + each]) for i in range(0, len(buckets), each)]
    ends = [max(ready[i : i + each]) for i in range(0, len(ready), each)]
    return together, replace(cluster, latency=cluster.latency * each), ends


def slowest(median: float, upper_quartile: float, world_size: int) -> float:
    """Return the median of the slowest of W ranks, for which all wait: the 0.5^(1/W) quantile of one rank's seconds.

    Between the known quantiles, and beyond, those of a normal distribution are used.
    """
    normal = NormalDist()
    spread = normal.inv_cdf(0.5 ** (1 / world_size)) / normal.inv_cdf(0.75)
    return median + max(0.0, upper_quartile - median) * spread


def break_even(
    plan: Plan,
    buckets: Sequence[int],
    speed: Speed,
    dense: Speed,
    cluster: Cluster,
    compute: float = 0.0,
    itemsize: int = 4,
) -> float | None:
    """Return the bytes a second at which a dense step takes as long as one of this plan; on faster links dense is faster.

    Infinite if no link is fast enough for that, None if the plan is faster on none. `cluster.bandwidth` does not matter.
    With very many buckets, several are simulated as one, with their latencies.
    """
    buckets, cluster, _ = joined(buckets, cluster)

    def gain(bandwidth: float) -> float:
        there = replace(cluster, bandwidth=bandwidth)
        plain = step(DENSE, buckets, dense, there, compute, itemsize)
        return plain.seconds - step(plan, buckets, speed, there, compute, itemsize).seconds

    return end_of(gain)


def end_of(gain: Callable[[float], float]) -> float | None:
    """Return the bandwidth at which a gain, in seconds by bandwidth, falls to 0: infinite if it never does, None if there is
    no gain on the slowest link."""
    low, high = SLOWEST, FASTEST
    if gain(high) >= 0:
        return math.inf
    if gain(low) <= 0:
        return None
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


@dataclass(eq=False)
class _Work:
    """A piece of work that takes `seconds` once it is started, if each of its threads gets the share `need` of a core."""

    seconds: float
    need: float = 1.0
    threads: float = 1.0
    latency: float = 0.0
    """Seconds from the end of a transfer on the link until its last byte arrives."""
    finished: float | None = None
    """The time at which it ended; None before."""


@dataclass
class _Job:
    """One bucket: backward fills it, the codec and the link work on it in this order."""

    fill: _Work
    encode: _Work
    transfers: list[_Work]
    recode: _Work
    decode: _Work


def _job(choice: BucketPlan, n: int, itemsize: int, speed: Speed, cluster: Cluster, fill: float) -> _Job:
    W, summed = cluster.world_size, choice.exchange.linear
    sends = []
    for message in transfers(choice, n, itemsize, W, 0, cluster.ranks_per_host):
        busy = cluster.stack * (message.sent + message.received) + summed * speed.add * n * (W - 1) / W
        seconds = max(message.crossing * FRAME / cluster.bandwidth, busy)
        latency = message.rounds * cluster.latency if message.crossing else 0.0
        sends.append(_Work(seconds, busy / seconds if seconds else 0.0, latency=latency))
    (one, more), payloads = speed.mean, choice.exchange.payloads(choice.codec, W)
    coded = n * choice.exchange.share()  # by one rank; all ranks of a host do the same:
    alike = round(W * choice.exchange.share())
    decode = coded * (one + (payloads - 1) * more) if choice.codec.lossy or not summed else 0.0
    recode = -(-n // W) * (speed.recode[0] + (alike - 1) * speed.recode[1])
    threads = max(1.0, cluster.cores) if cluster.cores < math.inf else 1.0
    return _Job(_Work(fill, threads=threads), _Work(coded * speed.encode), sends, _Work(recode), _Work(decode))


class _Simulation:
    """Backward, the lines of `sequencer.py` and the link. A line is a generator of the works that it waits for."""

    def __init__(self, jobs: Sequence[_Job], cluster: Cluster) -> None:
        self.jobs, self.cluster = jobs, cluster
        self.now = 0.0
        self.going: list[_Work] = []
        self.link: deque[_Work] = deque()

    def run(self) -> float:
        """Return the time at which the last mean is ready."""
        lines = [self.backward(), *([self.encoder(), self.wire()] if self.cluster.lines else [self.stream()])]
        waiting = {line: next(line) for line in lines}
        while waiting:
            self.go_on()
            for line in list(waiting):
                while line in waiting and waiting[line].finished is not None:
                    following = next(line, None)
                    if following is None:
                        del waiting[line]
                    else:
                        waiting[line] = following
        return self.now

    def backward(self) -> Iterator[_Work]:
        for job in self.jobs:
            yield self.start(job.fill)

    def encoder(self) -> Iterator[_Work]:
        for job in self.jobs:
            yield job.fill
            yield self.start(job.encode)
            self.link.append(job.transfers[0])

    def wire(self) -> Iterator[_Work]:
        landing: list[_Job] = []  # at most one
        for job in self.jobs:
            if job.encode.finished is None:
                yield from self.land(landing)
            yield job.encode
            yield from self.land(landing)
            for before, transfer in itertools.pairwise(job.transfers):
                yield from self.arrival(before)
                yield self.start(job.recode)
                self.link.append(transfer)
            landing.append(job)
        yield from self.land(landing)

    def stream(self) -> Iterator[_Work]:
        for job in self.jobs:
            yield job.fill
            yield self.start(job.encode)
            for i, transfer in enumerate(job.transfers):
                if i:
                    yield self.start(job.recode)
                self.link.append(transfer)
                yield from self.arrival(transfer)
            yield self.start(job.decode)

    def land(self, landing: list[_Job]) -> Iterator[_Work]:
        while landing:
            job = landing.pop()
            yield from self.arrival(job.transfers[-1])
            yield self.start(job.decode)

    def arrival(self, transfer: _Work) -> Iterator[_Work]:
        yield transfer
        assert transfer.finished is not None
        yield self.start(_Work(max(0.0, transfer.finished + transfer.latency - self.now), need=0.0))

    def start(self, work: _Work) -> _Work:
        self.going.append(work)
        return work

    def go_on(self) -> None:
        """Advance time until the first running task is done; the link carries one transfer after another."""
        works = [*self.going, *itertools.islice(self.link, 1)]
        level = _level(works, self.cluster.cores)
        speeds = [min(1.0, level / work.need) if work.need else 1.0 for work in works]
        passed = min(work.seconds / speed for work, speed in zip(works, speeds, strict=True))
        self.now += passed
        for work, speed in zip(works, speeds, strict=True):
            work.seconds -= passed * speed
            if work.seconds <= EPSILON:
                work.finished = self.now
                if self.link and work is self.link[0]:
                    self.link.popleft()
                else:
                    self.going.remove(work)


def _level(works: Sequence[_Work], cores: float) -> float:
    """Return the largest share of a core that one thread gets, if threads that need less get all they need."""
    left, threads = cores, sum(work.threads for work in works)
    for work in sorted(works, key=lambda w: w.need):
        if work.need * threads > left:
            return left / threads
        left -= work.need * work.threads
        threads -= work.threads
    return 1.0
