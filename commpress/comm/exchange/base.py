"""The base of every exchange that makes one mean of the ranks' buckets: how it runs, and what it sends."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire


@dataclass(frozen=True)
class Message:
    """One transfer of a bucket: bytes that a rank sends and receives, and how often these wait for a network's latency.

    Around a `ring` they leave a host once, else they go to each of the other ranks.
    """

    sent: int
    received: int
    rounds: int = 1
    ring: bool = False


class Exchange(ABC):
    """Replaces each rank's bucket by the mean of all, the same bits on every rank."""

    name: ClassVar[str]
    linear: ClassVar[bool] = False
    """Whether it needs a codec whose payloads can be summed."""

    @abstractmethod
    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        """Replace `x` ([n], any float dtype) by its mean over the ranks."""

    @abstractmethod
    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        """Return the transfers of a bucket of `n` values of `itemsize` bytes, byte for byte those of `run`."""

    def chunk(self, n: int, codec: Codec, rank: int, world_size: int) -> tuple[int, int] | None:
        """Return the (start, stop) of the bucket that this rank encodes a second time; None if there is no second encoding."""
        return None

    def payloads(self, world_size: int) -> int:
        """Return how many payloads each value of the mean is decoded from."""
        return 1

    def among(self, world_size: int) -> "Exchange":
        """Return what stands in for this exchange among so many ranks, if nobody has asked for it by name."""
        return self
