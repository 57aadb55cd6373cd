"""The places of the values that masks keep. Pruned values are not sent.

    bucket    [a . . b | c . d .]        .: pruned, the same on all ranks
    packed    [a b c d]                  the kept values, from the places 0 3 4 6, are sent; the places are not

All ranks have the same masks (they compare hashes), so each rank knows where a value belongs.
"""

import hashlib
from collections.abc import Mapping
from itertools import product

import numpy as np
import torch
from torch import Tensor

from commpress.comm.agreement import Settings
from commpress.comm.segments import Segments, sizes
from commpress.kernels.table import compiled_dtypes, compiles_by_place, lookup


class MaskIndex:
    """The places of the kept values in each parameter. `masks` are bool [n] by name, in the memory order of the buckets.

    A parameter without a mask is sent whole. `chunks` lists the names of chunks that must have one length, one a rank: shorter
    ones are padded with zeros to the longest.
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
                self._in[name] = torch.nn.functional.pad(
                    self._in[name], (0, short), value=-1
                )  # -1 is no place: a padding zero
        for places in list(self._in.values())[:1]:
            warm_up(places.device)

    def __contains__(self, name: str) -> bool:
        return name in self._in

    def places(self, name: str) -> Tensor | None:
        """Return the places of a parameter's kept values in its memory: int32 [k]; None if all of it is sent."""
        return self._in.get(name)

    def count(self, name: str, n: int) -> int:
        """Return how many values are sent of a parameter that has `n`."""
        return self._in[name].numel() if name in self._in else n

    def total(self, segments: Segments) -> int:
        """Return how many values are sent of a bucket."""
        return sum(self.count(segment.name, segment.n) for segment in segments)

    def kept_index(self, segments: Segments) -> Tensor | None:
        """Return the places of the kept values in a bucket of these parameters: int32 [k]; None if all values are sent.

        A place of -1 stands for a padding zero.
        """
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
        """Return `values`, which the masks of `before` kept of a bucket ([k]), as these masks keep them; new places get 0."""
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


def warm_up(device: torch.device) -> None:
    """Compile the loops now, not in the middle of a step: for tensors that begin anywhere, where that makes a difference."""
    first = torch.zeros(1, dtype=torch.int32, device=device)
    places = list(product((0, 1), repeat=2)) if compiles_by_place(device) else [(0, 0)]
    for dtype, (x_at, out_at) in product(compiled_dtypes(device), places):
        x, out = (torch.zeros(2, dtype=dtype, device=device)[at:][:1] for at in (x_at, out_at))
        pack(x, first, out)
        unpack(x, first, out)


def zero_others(x: Tensor, places: Tensor) -> None:
    """Set `x` (any shape, memory without gaps) to 0 everywhere in its memory except at `places` (int32 [k])."""
    flat = in_memory_order(x)
    kept = torch.empty(places.numel(), dtype=x.dtype, device=x.device)
    pack(flat, places, kept)
    unpack(kept, places, flat)


def require_shapes(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for a mask whose name is not a parameter's, or whose shape is not the parameter's."""
    for name, mask in masks.items():
        if (shape := shapes.get(name)) != mask.shape:
            expected = "no such parameter" if shape is None else tuple(shape)
            raise ValueError(f"mask of {name!r}: shape {tuple(mask.shape)}, the model has {expected}")


def described(masks: Mapping[str, Tensor], refusal: str | None = None) -> Settings:
    """Return the summary of masks that ranks compare: a count and a hash by name. `refusal`: the error of this rank's masks."""
    if refusal is not None:
        return {"error": refusal}
    told: Settings = {"masks of": ", ".join(masks)}
    for name, mask in masks.items():
        bits = np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1))
        hashed = hashlib.blake2b(bits.tobytes(), digest_size=8).hexdigest()
        told[f"mask of {name}"] = f"{int(mask.sum())} of {mask.numel()} kept, hash {hashed}"
    return told


def in_memory_order(x: Tensor) -> Tensor:
    """Return a tensor as [n] in the order of its memory, as DDP puts it into a bucket. A view, if the memory has no gaps."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,), x.storage_offset())


def of_pairs(mask: Tensor) -> Tensor:
    """Return the mask of a complex parameter's values ([n]) as a mask of their real numbers ([2 n])."""
    return mask.repeat_interleave(2)
