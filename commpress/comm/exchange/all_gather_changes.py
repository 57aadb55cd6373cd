"""all_gather_changes: each rank's shard, on every rank, as changes since the last gather (SDP4Bit, arXiv:2410.15526).

    each rank  has my shard changed since the last time?    yes / no / far  --> all
    all no     nothing is sent                                           v stays
    else       rank 0  a - v_a -> pa --> 1, 2                            v_a <- v_a + pa'      on all ranks, a's owner, too
               rank 1  b - v_b -> pb --> 0, 2                            v_b <- v_b + pb'
               rank 2  c - v_c -> pc --> 0, 1                            v_c <- v_c + pc'
    any far    a, b, c, in the two bytes of v                            v <- a b c

The error of a codec stays in a - v_a, and is sent the next time: no other memory is needed, and errors do not add up. Every
rank keeps `v` (`versions.py`) in two bytes a value, which plain FSDP does not need.

A shard is far if it differs from its version by more than half of its own norm, or if either is not finite, as after weights
were loaded. So no step has a larger error than one that codes the values themselves. Each rank sends W - 1 bytes as its answer,
and then nothing, (W - 1) * nbytes(m) or (W - 1) * 2 m. Values that do not change between two gathers are not sent again.

The host must know the answers, so this exchange is for the CPU. On an accelerator `all_gather_changes_unseen.py` keeps the
version as close in ordinary steps, without a wait.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from commpress.comm.encoder import Encoder
from commpress.comm.exchange.all_gather_changes_unseen import all_gather_changes_unseen
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.fingerprint import fingerprint_on_device
from commpress.comm.versions import Version
from commpress.kernels.cpu.fingerprint import fingerprint

SAME, CHANGED, FAR = 0, 1, 2
FARTHEST = 0.5
"""A share of a shard's norm: a shard that is farther from its version is sent whole."""


def all_gather_changes(
    shard: Tensor,
    out: Tensor,
    version: Version,
    encoder: Encoder,
    buffer: Tensor,
    wire: Wire,
    told: Label,
    label: Label,
) -> Iterator[Transfer]:
    """Fill `out` ([W * m]) with the version of the ranks' `shard` ([m], which may be this rank's part of `out`).

    Any float dtype. `buffer` is uint8 [all_gather_changes_bytes(m, codec, W)]; `told` is the label of the ranks' answers.
    """
    me, W, m = wire.rank, wire.world_size, shard.numel()
    mark: int | Tensor = fingerprint(shard) if wire.by_message else fingerprint_on_device(shard)
    if version.values is None:
        values = version.room(W, shard)
        if version.own is None:
            version.mark = mark
        yield from _whole(shard if version.own is None else version.own, values, wire, told.second())
        version.values, version.own = values, None
    if isinstance(mark, Tensor):
        yield from all_gather_changes_unseen(shard, mark, out, version, encoder, buffer, wire, label)
        return
    nbytes = encoder.codec.nbytes(m)
    parts, rows = version.values.split(m), buffer[: W * nbytes].split(nbytes)
    step = torch.empty(m, dtype=torch.float32, device=shard.device)

    mine = SAME
    if version.mark != mark:
        step.copy_(shard).sub_(parts[me])
        near = bool(step.norm() <= FARTHEST * shard.float().norm())  # not, if either is NaN
        mine = CHANGED if near else FAR
    flags = torch.full((W,), mine, dtype=torch.uint8, device=shard.device)
    transfer = wire.all_gather(flags.split(1), told, last=False)
    if mine == CHANGED:
        encoder.encode(step, slice(None), out=rows[me])  # while it is on its way
    yield transfer

    most = int(flags.max())
    if most == SAME:
        out.copy_(version.values)
        return
    version.mark = mark
    if most == FAR:
        yield from _whole(shard, version.values, wire, label)
        out.copy_(version.values)
        return
    if mine == SAME:
        encoder.encode(step.zero_(), slice(None), out=rows[me])
    yield wire.all_gather(rows, label, last=True)
    for r, part in enumerate(parts):
        encoder.decode(rows[r], m, out=step)
        part.copy_(step.add_(part))
    out.copy_(version.values)


def _whole(shard: Tensor, values: Tensor, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Fill `values` ([W * m]) with all ranks' shards, in the dtype of `values`."""
    m = shard.numel()
    values.split(m)[wire.rank].copy_(shard)
    whole = values.view(torch.uint8)
    yield wire.all_gather(whole.split(m * values.element_size()), label, last=False, whole=whole)
