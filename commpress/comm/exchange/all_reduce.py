"""all_reduce: the group's own sum, for codecs whose payloads can be summed (`none`, `bf16`, `fp16`, `randomk(r)`).

    rank 0  x0/3 --\\
    rank 1  x1/3 ---+-- sum (ring) --> mean on every rank
    rank 2  x2/3 --/

Each rank sends 2 (W - 1) / W * nbytes(n). `none` divides by W first and sums the tensor's own dtype in place, as DDP does, so
it has DDP's bits. With a random codec all ranks must have drawn by the same number. On CPU the headers of the sum contain it;
on an accelerator there are none, and ranks compare it only when they restore a state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire, ring_bytes


@dataclass(frozen=True)
class AllReduce(Exchange):
    """The group's own sum of payloads."""

    name: ClassVar[str] = "all_reduce"
    linear: ClassVar[bool] = True

    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        codec = encoder.codec
        assert codec.sum_dtype is not None
        if not codec.lossy:
            encoder.add_residual(x)  # of a lossy codec before: a dense exchange can send all of it
            x.mul_(1.0 / wire.world_size)
            yield wire.all_reduce(x, label)
            return
        payload = encoder.buffer("payload", codec.nbytes(x.numel()), x.device)
        encoder.encode(x, slice(None), out=payload)
        values = payload[codec.summed(x.numel())].view(codec.sum_dtype)
        values.mul_(1.0 / wire.world_size)
        yield wire.all_reduce(values, replace(label, draw=codec.draw))
        encoder.decode(payload, x.numel(), out=x)

    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        part = codec.summed(n)
        size = ring_bytes(part.stop - part.start if codec.lossy else n * itemsize, world_size)
        return (Message(size, size, rounds=2 * (world_size - 1), ring=True),)


def native_all_reduce(x: Tensor, op: Any, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Run the group's own reduction. Without an earlier residual the bits are those of the plain collective."""
    encoder.add_residual(x)
    yield wire.all_reduce(x, label, op)
