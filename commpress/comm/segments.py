"""The content of a bucket: one segment per parameter, or part of one, in their order in the bucket."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from commpress.comm.parameters import real_numel


@dataclass(frozen=True)
class Segment:
    """`n` real values of the parameter `name`, or of a part of it that the name gives; a complex value is two real ones.

    Memories are found by name and n. `shape` and `strides` are those of the tensor, in its own values; they are empty for a
    part that is no tensor. All ranks must have the same segments; the label of each message contains them.
    """

    name: str
    n: int
    shape: tuple[int, ...] = field(default=(), compare=False)
    strides: tuple[int, ...] = field(default=(), compare=False)

    @classmethod
    def whole(cls, name: str, x: Tensor) -> "Segment":
        """Return the segment of a whole tensor."""
        return cls(name, real_numel(x), tuple(x.shape), x.stride())


Segments = tuple[Segment, ...]


def sizes(segments: Iterable[Segment]) -> list[int]:
    """Return the number of real values of each segment."""
    return [segment.n for segment in segments]
