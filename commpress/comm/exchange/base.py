"""The base of every exchange that makes one mean of the ranks' buckets: how it runs, and which bytes it sends."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import NodeSlice
from commpress.comm.segments import Segments


@dataclass(frozen=True)
class Message:
    """One transfer of a bucket: the bytes that a rank sends and receives, and the rounds that each wait for a latency.

    In a `ring` one link leaves each host; otherwise the bytes go to every other rank. `between_nodes` limits them to ranks of
    other nodes (True) or of the own node (False).
    """

    sent: int
    received: int
    rounds: int = 1
    ring: bool = False
    between_nodes: bool | None = None


class Exchange(ABC):
    """Replaces each rank's bucket by the mean of all, the same bits on every rank."""

    name: ClassVar[str]
    linear: ClassVar[bool] = False
    """Whether it needs a codec whose payloads can be summed."""
    flat: ClassVar[bool] = True
    """Whether it carries payloads of n values; if not, it needs a codec of matrices, and their shapes."""

    def __str__(self) -> str:
        """Return its name, as a user gives it; it must be the same on all ranks."""
        return self.name

    def on(self, ranks: Sequence[int]) -> "Exchange":
        """Return it for a group of these ranks of the default group. Raises ValueError if it does not fit them."""
        return self

    def join(self, wire: Wire) -> None:  # noqa: B027
        """Make the groups of some of the wire's ranks that it needs. Collective."""

    encodes_bucket: ClassVar[bool] = True
    """Whether the encoder that it is given encodes the values of the bucket, and so can run a prologue on them."""

    @abstractmethod
    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        """Replace `x` ([n], any float dtype) by its mean over the ranks."""

    @abstractmethod
    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        """Return the transfers of a bucket of `n` values of `itemsize` bytes, byte for byte those of `run`."""

    def laid_out(self, n: int, segments: Segments, codec: Codec) -> "Exchange":
        """Return it for a bucket of n values, of these segments if they are known."""
        return self

    def nbytes(self, n: int, codec: Codec) -> int:
        """Return the bytes that a rank makes of a bucket of n values."""
        return codec.nbytes(n)

    def chunk(self, n: int, codec: Codec, rank: int, world_size: int) -> tuple[int, int] | None:
        """Return the (start, stop) of the bucket that this rank encodes a second time; None if there is no second encoding."""
        return None

    def node_slice(self, n: int, codec: Codec, rank: int, world_size: int) -> NodeSlice | None:
        """Return the slice of the bucket that this rank encodes for all ranks of its node; None if each encodes its bucket."""
        return None

    def share(self) -> float:
        """Return the share of a bucket that a rank encodes and decodes."""
        return 1.0

    def payloads(self, codec: Codec, world_size: int) -> int:
        """Return how many payloads each value of the mean is decoded from."""
        return 1

    def idle(self, world_size: int) -> str:
        """Return the reason why it compresses nothing among `world_size` ranks; "" if it compresses."""
        return ""

    def among(self, world_size: int) -> "Exchange":
        """Return the exchange that replaces this one among `world_size` ranks, unless a user has named it."""
        return self
