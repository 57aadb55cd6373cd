"""What a bucket holds: one segment a parameter, or a part of one, in the order in which they lie there."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from commpress.comm.parameters import real_numel


@dataclass(frozen=True)
class Segment:
    """`n` reals of the parameter `name` (a complex value is two), or of the part of one that the name tells.

    Name and n say which it is: memories are found by them. `shape` and `strides` are the tensor's, in its own values; empty
    for a part that is no tensor. All ranks must have the same, which the label of each message tells.
    """

    name: str
    n: int
    shape: tuple[int, ...] = field(default=(), compare=False)
    strides: tuple[int, ...] = field(default=(), compare=False)

    @classmethod
    def whole(cls, name: str, x: Tensor) -> "Segment":
        """All of a tensor."""
        return cls(name, real_numel(x), tuple(x.shape), x.stride())


Segments = tuple[Segment, ...]


def sizes(segments: Iterable[Segment]) -> list[int]:
    """Return how many reals each has."""
    return [segment.n for segment in segments]
