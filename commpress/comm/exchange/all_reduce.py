"""all_reduce: the group's own sum, for codecs whose payloads can be summed (`none`, `bf16`, `fp16`).

    rank 0  x0/3 --\\
    rank 1  x1/3 ---+-- sum (ring) --> mean on every rank
    rank 2  x2/3 --/

Each rank sends 2 (W - 1) / W * nbytes(n). `none` sums the tensor's own dtype in place, divided beforehand as DDP does: the
bits are DDP's.
"""

from collections.abc import Iterator

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory


def all_reduce(x: Tensor, codec: Codec, memory: Memory, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Replace `x` ([n], any float dtype) by its mean over the ranks."""
    assert codec.sum_dtype is not None
    if not codec.lossy:
        if memory.residual is not None:  # what a lossy codec kept before: dense, all of it can go
            x.add_(memory.residual)
            memory.residual = None
        x.mul_(1.0 / wire.world_size)
        yield wire.all_reduce(x, label)
        return
    payload = memory.buffer("payload", codec.nbytes(x.numel()), x.device)
    memory.encode(codec, x, slice(None), out=payload)
    values = payload[: x.numel() * codec.sum_dtype.itemsize].view(codec.sum_dtype)
    values.mul_(1.0 / wire.world_size)
    yield wire.all_reduce(values, label)
    codec.decode(payload, x.numel(), out=x)
