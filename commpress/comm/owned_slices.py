"""Parameters that ZeRO 1 and 2 cut into W partitions: each rank owns parts of any length, across buckets."""

from dataclasses import dataclass

from torch import Tensor

from commpress.comm.segments import Segments


@dataclass(frozen=True)
class OwnedSlice:
    """A part of a parameter that one rank owns: its values `start` to `stop`, which begin at `at` in group `group`."""

    name: str
    owner: int
    place: int
    """The parameter's place in its bucket."""
    start: int
    stop: int
    group: int
    at: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class OwnedBucket:
    """A bucket in the order of its owners: x[cuts[r] : cuts[r + 1]] is rank r's; `x` is float32 [cuts[W]].

    It holds the values that masks keep.
    """

    index: int
    pieces: list[OwnedSlice]
    segments: Segments
    cuts: list[int]
    x: Tensor
    whole: list[int]
    """The cuts with all values."""
    kept: list[int]
    """How many values of each piece masks keep."""
