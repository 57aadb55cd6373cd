"""What the buckets of the plain steps of `auto` send, and when backward has them ready.

    backward   [..... bucket 0: a b c d e][.. bucket 1: f g h][ bucket 2: i ]
    ready                                0                   t1            t2     seconds, the median of the steps
    sent       int4 by a rule: a b, by the codec that `auto` finds: c d e         a part of the bucket for each codec

All ranks wait for the slowest, so its times count. When backward began is not known, and does not matter: nothing is sent
before the first bucket is ready.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from commpress.comm.codecs import Codec
from commpress.comm.cost import MOST_BUCKETS
from commpress.comm.segments import Segments

KEPT = 16
"""The number of steps, the last ones, whose median counts."""
TOLD = 6
"""The number of buckets of which each is told."""


@dataclass(frozen=True)
class Part:
    """A part of a bucket that is sent by one codec."""

    segments: Segments
    values: int
    """The values that are sent: those that masks keep."""
    itemsize: int
    """The bytes of a value."""
    codec: Codec | None
    """The codec of a rule; None where `auto` decides."""


class PlainSteps:
    """The buckets of the last plain steps, in the order in which they are sent."""

    def __init__(self) -> None:
        self._buckets: list[tuple[Part, ...]] = []
        self._seconds: deque[list[float]] = deque(maxlen=KEPT)
        """The seconds from the first bucket to each, of each step that has these buckets."""
        self._now: list[tuple[tuple[Part, ...], float]] = []
        """The buckets of the present step so far, and when each was ready."""

    def __len__(self) -> int:
        return len(self._buckets)

    def clear(self) -> None:
        """Forget all steps so far."""
        self._buckets = []
        self._seconds.clear()

    def begin_step(self) -> None:
        """Begin a step; the one before counts only if it was ended."""
        self._now = []

    def note(self, parts: Sequence[Part]) -> None:
        """Note that a bucket with these parts is ready and sent now; parts without values are not sent."""
        self._now.append((tuple(part for part in parts if part.values), perf_counter()))

    def end_step(self) -> None:
        """End a step that counts; one of which nothing was noted, since its values were sent exactly, does not."""
        if not self._now:
            return
        buckets = [parts for parts, _ in self._now]
        if buckets != self._buckets:
            self.clear()
            self._buckets = buckets
        self._seconds.append([at - self._now[0][1] for _, at in self._now])

    def parts(self) -> list[tuple[int, Part]]:
        """Return all parts of a step, each with the number of its bucket."""
        return [(i, part) for i, bucket in enumerate(self._buckets) for part in bucket]

    def ready(self) -> list[float]:
        """Return the seconds from the first bucket to each; of very many buckets to the last of each group of them."""
        medians = [statistics.median(of) for of in zip(*self._seconds, strict=True)]
        each = _each(len(medians))
        return [round(max(medians[i : i + each]), 6) for i in range(0, len(medians), each)]


def slowest_ready(everyone: Sequence[Sequence[float]], buckets: int, most: float) -> list[float]:
    """Return when each of so many buckets is ready on the slowest rank, at most `most`, from what all ranks call `ready`; an
    empty list if they do not know it."""
    if any(len(of) != -(-buckets // _each(buckets)) for of in everyone):
        return []
    slowest = [min(max(of), most) for of in zip(*everyone, strict=True)]
    return [slowest[i // _each(buckets)] for i in range(buckets)]


def told(ready: Sequence[float]) -> str:
    """Return a line that says when buckets are ready; nothing if that is not known."""
    if len(ready) < 2:
        return ""
    times = ", ".join(f"{at * 1e3:.3g}" for at in (ready if len(ready) <= TOLD else ready[-1:]))
    which = "ready" if len(ready) <= TOLD else "the last one ready"
    return f"buckets: {len(ready)}, {which} {times} ms after the first one in the plain steps\n"


def _each(buckets: int) -> int:
    """Return the number of buckets in a group: all figures of a rank must fit into one message."""
    return max(1, -(-buckets // MOST_BUCKETS))
