"""What the buckets of the plain steps of `auto` send.

bucket 0   [a b | c d e]      a part for each codec: that of `auto` (None), and those of rules
bucket 1   [f g h]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from commpress.comm.codecs import Codec
from commpress.comm.segments import Segments


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
    """The buckets of the last plain step, in the order in which they are sent."""

    def __init__(self) -> None:
        self._buckets: list[tuple[Part, ...]] = []
        self._now: list[tuple[Part, ...]] = []
        """The buckets of the present step so far."""

    def clear(self) -> None:
        """Forget all steps so far."""
        self._buckets = []

    def begin_step(self) -> None:
        """Begin a step; the one before counts only if it was ended."""
        self._now = []

    def note(self, parts: Sequence[Part]) -> None:
        """Note that a bucket with these parts is sent now; parts without values are not sent."""
        self._now.append(tuple(part for part in parts if part.values))

    def end_step(self) -> None:
        """End a step that counts."""
        self._buckets = self._now

    def parts(self) -> list[Part]:
        """Return all parts of a step."""
        return [part for bucket in self._buckets for part in bucket]
