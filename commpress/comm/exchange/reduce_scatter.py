"""reduce_scatter: each rank gets only the mean of its own chunk. For the gradients of sharded parameters.

             encode in W chunks      own chunk of all: mean
    rank 0   [a0 b0 c0]  \\           [a0 a1 a2] -> a
    rank 1   [a1 b1 c1]   > to all   [b0 b1 b2] -> b
    rank 2   [a2 b2 c2]  /           [c0 c1 c2] -> c

Each rank sends (W - 1) * nbytes(n / W) if the chunks are of one length; ZeRO's partitions need not be. It is the first half of
two_shot: no other rank holds the mean of a chunk, so it need not be encoded again.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire

Op = dist.ReduceOp | dist.ReduceOp.RedOpType


def reduce_scatter(
    full: Tensor,
    cuts: Sequence[int],
    out: Tensor,
    op: Op,
    encoder: Encoder,
    buffer: Tensor,
    wire: Wire,
    label: Label,
) -> Iterator[Transfer]:
    """Fill `out` with the reduction by `op` of the ranks' full[cuts[rank] : cuts[rank + 1]], all of one float dtype.

    `out` may be that part of `full` ([cuts[W]]). The memory has a residual of cuts[W] values, or none; `buffer` is uint8
    [reduce_scatter_bytes(...)].
    """
    me, W = wire.rank, wire.world_size
    sizes = _sizes(cuts, encoder.codec)
    received, outgoing = buffer.split([W * sizes[me], sum(sizes)])
    own, payloads = received[me * sizes[me] : (me + 1) * sizes[me]], outgoing.split(sizes)
    for r in (*range(me + 1, W), *range(me)):
        if sizes[r]:
            encoder.encode(full, slice(cuts[r], cuts[r + 1]), out=payloads[r])
    if sizes[me] and not wire.by_message:  # a collective carries it, too
        encoder.encode(full, slice(cuts[me], cuts[me + 1]), out=payloads[me])
    transfer = wire.all_to_all(outgoing, sizes, received, label, last=True)
    if sizes[me] and wire.by_message:
        encoder.encode(full, slice(cuts[me], cuts[me + 1]), out=own)  # while the others are on their way
    yield transfer
    if sizes[me]:
        encoder.mean(received, cuts[me + 1] - cuts[me], W, out=out)
        if (times := over_mean(op, W)) != 1:
            out.mul_(times)


def reduce_scatter_bytes(cuts: Sequence[int], codec: Codec, rank: int) -> int:
    """Return the bytes of all payloads that a rank sends and receives, its own among both."""
    sizes = _sizes(cuts, codec)
    return sum(sizes) + len(sizes) * sizes[rank]


def _sizes(cuts: Sequence[int], codec: Codec) -> list[int]:
    return [codec.nbytes(stop - start) if stop > start else 0 for start, stop in itertools.pairwise(cuts)]


def native_reduce_scatter(
    full: Tensor, out: Tensor, op: Op, encoder: Encoder, wire: Wire, label: Label
) -> Iterator[Transfer]:
    """Run the group's own reduce-scatter. Without an earlier residual the bits are those of the plain collective."""
    encoder.add_residual(full)  # of a lossy codec before: a dense exchange can send all of it
    crossing = native_bytes(out, wire.world_size)

    def start(group: dist.ProcessGroup) -> Any:
        return dist.reduce_scatter_single(out, full, op=op, group=group, async_op=True)

    yield wire.collective(start, full.nbytes, label, crossing, crossing)


def needed_bytes(out: Tensor, world_size: int) -> int:
    """Return the bytes that each rank must send in a reduce-scatter to `out` ([m]): W - 1 times m values, as in NCCL's ring."""
    return (world_size - 1) * out.nbytes


def native_bytes(out: Tensor, world_size: int) -> int:
    """Return the bytes that each rank sends in the group's own reduce-scatter to `out` ([m])."""
    return needed_bytes(out, world_size) * native_times(out.device)


def native_times(device: torch.device) -> int:
    """Return how many times the needed bytes the group's own reduce-scatter sends.

    Gloo, on CPU, all-reduces and keeps one chunk: twice the needed bytes, by the kernel's counters with 2, 3 and 4 ranks.
    """
    return 2 if device.type == "cpu" else 1


def over_mean(op: Op, world_size: int) -> float:
    """Return the factor by which the result of `op` is larger than the mean: 1 for AVG, W for SUM, W f for PREMUL_SUM(f).

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
