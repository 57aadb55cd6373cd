"""Pruned values are not sent: the places of the kept values.

    bucket    [a . . b | c . d .]        .: pruned, the same on all ranks
    packed    [a b c d]                  these are sent, from the places 0 3 4 6; the places are not

All ranks have the same masks (they are compared by hash), so no rank needs to be told where a value belongs.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from commpress.comm.agreement import Settings
from commpress.comm.segments import Segments, sizes
from commpress.kernels.table import lookup


class MaskIndex:
    """The places of the kept values in each parameter. `masks` are bool [n], by name, in the order in which buckets hold them.

    A parameter without a mask is sent whole. Chunks of one parameter that must be of one length (`chunks`: its names, one a
    rank) are filled up with zeros to the longest.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, chunks: list[list[str]] | None = None) -> None:
        self._in: dict[str, Tensor] = {}
        self._of: dict[Segments, Tensor | None] = {}
        for name, mask in (masks or {}).items():
            self._in[name] = mask.flatten().nonzero().flatten().to(torch.int32)
        for names in chunks or ():
            longest = max(self._in[name].numel() for name in names)
            for name in names:
                short = longest - self._in[name].numel()
                self._in[name] = torch.nn.functional.pad(self._in[name], (0, short), value=-1)  # no place: a zero
        for places in list(self._in.values())[:1]:  # compiles the loops now, not in the middle of a step
            one = torch.zeros(1, dtype=torch.float32, device=places.device)
            pack(one, torch.zeros(1, dtype=torch.int32, device=places.device), one.clone())
            unpack(one, torch.zeros(1, dtype=torch.int32, device=places.device), one.clone())

    def __contains__(self, name: str) -> bool:
        return name in self._in

    def places(self, name: str) -> Tensor | None:
        """Where the values of a parameter lie in its memory that travel: int32 [k]; None if all of it does."""
        return self._in.get(name)

    def count(self, name: str, n: int) -> int:
        """How many values travel for a parameter of `n`."""
        return self._in[name].numel() if name in self._in else n

    def total(self, segments: Segments) -> int:
        """How many travel for a bucket."""
        return sum(self.count(segment.name, segment.n) for segment in segments)

    def kept_index(self, segments: Segments) -> Tensor | None:
        """Where they lie in a bucket of these parameters: int32 [k], -1 for a filling zero; None if all values travel."""
        if not any(segment.name in self._in for segment in segments):
            return None
        if segments not in self._of:
            parts, at = [], 0
            for segment in segments:
                inside = self._in.get(segment.name)
                if inside is None:
                    device = next(iter(self._in.values())).device
                    parts.append(torch.arange(at, at + segment.n, dtype=torch.int32, device=device))
                else:
                    parts.append(torch.where(inside < 0, inside, inside + at))
                at += segment.n
            self._of[segments] = torch.cat(parts)
        return self._of[segments]

    def repacked(self, values: Tensor, segments: Segments, before: "MaskIndex") -> Tensor:
        """Return what the masks of `before` kept of a bucket ([k]) as these masks keep it: 0 where nothing was kept before."""
        old, new = before.kept_index(segments), self.kept_index(segments)
        if old is None and new is None:
            return values
        bucket = values
        if old is not None:
            bucket = torch.empty(sum(sizes(segments)), dtype=values.dtype, device=values.device)
            unpack(values, old, bucket)
        if new is None:
            return bucket
        packed = torch.empty(new.numel(), dtype=values.dtype, device=values.device)
        pack(bucket, new, packed)
        return packed


def pack(x: Tensor, places: Tensor, out: Tensor) -> None:
    """out[i] <- x[places[i]], 0 where the place is -1. `x` [n] and `out` [k] of one dtype, `places` int32 [k]."""
    if kernel := lookup("pack", None, x.device.type):
        kernel(x, places, out)
    else:
        torch.index_select(x, 0, places.clamp(min=0), out=out)
        out.masked_fill_(places < 0, 0)


def unpack(packed: Tensor, places: Tensor, out: Tensor) -> None:
    """out <- 0, then out[places[i]] <- packed[i] where the place is not -1."""
    if kernel := lookup("unpack", None, out.device.type):
        kernel(packed, places, out)
    else:
        there = places >= 0
        out.zero_().index_copy_(0, places[there].long(), packed[there])


def zero_others(x: Tensor, places: Tensor) -> None:
    """Set to 0 what of `x` (any shape, memory without gaps) lies elsewhere in its memory than at `places` (int32 [k])."""
    flat = in_memory_order(x)
    kept = torch.empty(places.numel(), dtype=x.dtype, device=x.device)
    pack(flat, places, kept)
    unpack(kept, places, flat)


def described(masks: Mapping[str, Tensor], refusal: str | None = None) -> Settings:
    """Return what ranks compare of their masks: a count and a hash by name. `refusal` says what is wrong with this rank's."""
    if refusal is not None:
        return {"error": refusal}
    told: Settings = {"masks of": ", ".join(masks)}
    for name, mask in masks.items():
        bits = np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1))
        hashed = hashlib.blake2b(bits.tobytes(), digest_size=8).hexdigest()
        told[f"mask of {name}"] = f"{int(mask.sum())} of {mask.numel()} kept, hash {hashed}"
    return told


def in_memory_order(x: Tensor) -> Tensor:
    """A tensor as [n], as DDP lays it into a bucket: in the order of its memory. A view, if that has no gaps."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,), x.storage_offset())


def of_pairs(mask: Tensor) -> Tensor:
    """The mask of a complex parameter's values ([n]) as one of their reals ([2 n])."""
    return mask.repeat_interleave(2)
