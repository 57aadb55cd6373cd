"""The content of a bucket: one segment per parameter, or part of one, in their order in the bucket."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from commpress.comm.parameters import real_numel


@dataclass(frozen=True)
class Segment:
    """`n` reals of the parameter `name` (a complex value is two), or of a part of it that the name gives.

    Name and n identify it: memories are found by them. `shape` and `strides` are the tensor's, in its own values; empty
    for a part that is no tensor. All ranks must have the same, which the label of each message shows.
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
