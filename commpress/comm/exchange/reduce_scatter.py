"""reduce_scatter: each rank gets the mean of its own chunk and of no other. For the gradients of sharded parameters.

             encode in W chunks      own chunk of all: mean
    rank 0   [a0 b0 c0]  \\           [a0 a1 a2] -> a
    rank 1   [a1 b1 c1]   > swap     [b0 b1 b2] -> b
    rank 2   [a2 b2 c2]  /           [c0 c1 c2] -> c

Each rank sends (W - 1) * nbytes(n / W). It is the first half of two_shot: nobody else holds the
mean of a chunk, so it need not be encoded again.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory

Op = dist.ReduceOp | dist.ReduceOp.RedOpType


def reduce_scatter(
    full: Tensor, out: Tensor, op: Op, codec: Codec, memory: Memory, buffer: Tensor, wire: Wire, label: Label
) -> Iterator[Transfer]:
    """Fill `out` ([m]) with what `op` makes of the ranks' chunks of `full` ([W * m]); any float dtype.

    `memory` has a residual of W * m values, or none; `buffer` is uint8 [(2 * W - 1) * nbytes(m)].
    """
    me, W, m = wire.rank, wire.world_size, out.numel()
    payloads = buffer.split(codec.nbytes(m))
    rows, outgoing = payloads[:W], [*payloads[W : W + me], payloads[me], *payloads[W + me :]]
    chunks = [slice(r * m, (r + 1) * m) for r in range(W)]
    for r in (*range(me + 1, W), *range(me)):
        memory.encode(codec, full, chunks[r], out=outgoing[r])
    transfer = wire.swap(outgoing, rows, label, last=True)
    memory.encode(codec, full, chunks[me], out=rows[me])  # while the others are on their way
    yield transfer
    codec.mean(buffer[: W * codec.nbytes(m)], m, W, out=out)
    if (times := over_mean(op, W)) != 1:
        out.mul_(times)


def native_reduce_scatter(full: Tensor, out: Tensor, op: Op, wire: Wire, label: Label) -> Iterator[Transfer]:
    """The group's own reduce-scatter: the bits are those that it has without us."""
    crossing = native_bytes(out, wire.world_size)

    def start(group: dist.ProcessGroup) -> Any:
        return dist.reduce_scatter_single(out, full, op=op, group=group, async_op=True)

    yield wire.collective(start, full.nbytes, label, crossing, crossing)


def needed_bytes(out: Tensor, world_size: int) -> int:
    """Return what each rank must send in a reduce-scatter to `out` ([m]): W - 1 times m values, as in NCCL's ring."""
    return (world_size - 1) * out.nbytes


def native_bytes(out: Tensor, world_size: int) -> int:
    """Return what each rank sends in the group's own reduce-scatter to `out` ([m]).

    Gloo, on CPU, all-reduces and keeps one chunk: twice what it must, by the kernel's counters with 2, 3 and 4 ranks.
    """
    return needed_bytes(out, world_size) * (2 if out.device.type == "cpu" else 1)


def over_mean(op: Op, world_size: int) -> float:
    """By which factor the result of `op` is larger than the mean: 1 for AVG, W for SUM, W f for PREMUL_SUM(f).

    Raises ValueError for other ops.
    """
    if op == dist.ReduceOp.AVG:
        return 1.0
    if op == dist.ReduceOp.SUM:
        return float(world_size)
    if op == dist.ReduceOp.PREMUL_SUM:
        state: Any = op.__getstate__()  # (op, factor): pickling is the one public way to it
        return world_size * float(state[1])
    raise ValueError(f"op {op}: expected ReduceOp.AVG, SUM or PREMUL_SUM")
