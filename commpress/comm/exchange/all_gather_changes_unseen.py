"""all_gather_changes on an accelerator: the host does not read values, so it cannot know what has changed, and all ranks send.

    each rank  has my shard changed since the last time?    and is it nearer to v or to 0?
    rank 0     a - v_a, or a -> pa | yes, no or far --> 1, 2       v_a <- v_a + pa', or pa', or v_a       on all ranks
    rank 1     b - v_b, or b -> pb | ...            --> 0, 2       v_b <- ...

A shard is far from its version if it is nearer to 0, or if one of them is not finite, as after weights were loaded. Then the
values themselves are coded, and the next gather sends the error of that code. If a shard has not changed, its version keeps its
bits, as if nothing had been sent.

Each rank sends (W - 1) (nbytes(m) + 4) bytes; the first time, which all ranks know, it sends 2 m bytes to each other rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.versions import Version

SAME, CHANGED, FAR = 0, 1, 2
FLAG = 4
"""Bytes after a payload; the first is the answer of a rank."""


def all_gather_changes_bytes(m: int, codec: Codec, world_size: int) -> int:
    """Return the bytes of the buffer that an exchange of changes needs for shards of m values."""
    return world_size * (codec.nbytes(m) + FLAG)


def all_gather_changes_unseen(
    shard: Tensor,
    mark: Tensor,
    out: Tensor,
    version: Version,
    encoder: Encoder,
    buffer: Tensor,
    wire: Wire,
    label: Label,
) -> Iterator[Transfer]:
    """Fill `out` ([W * m]) with the new version, which must exist, of the ranks' `shard` ([m], whose hash is `mark`).

    `buffer` is uint8 [all_gather_changes_bytes(m, codec, W)].
    """
    assert version.values is not None
    m, nbytes = shard.numel(), encoder.codec.nbytes(shard.numel())
    table = buffer.view(wire.world_size, nbytes + FLAG)
    parts, own = version.values.split(m), table[wire.rank]

    values = shard.to(torch.float32)
    step = values - version.values.view(wire.world_size, m)[wire.rank]
    far = ~(step.norm() <= values.norm())  # also if either is NaN
    changed = mark != known_mark(version, shard.device)
    encoder.encode(torch.where(far, values, step), slice(None), out=own[:nbytes])
    own[nbytes:] = torch.where(far, FAR, CHANGED) * changed
    yield wire.all_gather(table.unbind(), label, last=True, whole=buffer)
    version.mark = torch.where(far & changed, ~mark, mark)  # the next gather then sends what this one misses

    for row, part in zip(table, parts, strict=True):
        encoder.decode(row[:nbytes], m, out=step)
        flag = row[nbytes]
        step.add_(torch.where(flag == FAR, 0.0, part.to(torch.float32)))
        part.copy_(torch.where(flag == SAME, part, step.to(part.dtype)))
    out.copy_(version.values)


def known_mark(version: Version, device: torch.device) -> Tensor:
    """Return the hash of this rank's shard as it was in the version: int64 []."""
    if isinstance(version.mark, Tensor):
        return version.mark
    return torch.full((), (version.mark + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
