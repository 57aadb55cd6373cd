"""Parameters of which each rank owns a part of any length, across buckets: ZeRO 1 and 2 cut them into W partitions."""

from dataclasses import dataclass

from torch import Tensor

from commpress.comm.segments import Segments


@dataclass(frozen=True)
class OwnedSlice:
    """A part of a parameter that belongs to one owner: values `start` to `stop` of it, which are at `at` in group `group`."""

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
    """A bucket in the order of its owners: x[cuts[r] : cuts[r + 1]] is rank r's; `x` is float32 [cuts[W]]."""

    index: int
    pieces: list[OwnedSlice]
    segments: Segments
    cuts: list[int]
    x: Tensor
