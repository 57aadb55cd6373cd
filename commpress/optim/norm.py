"""The norm of all gradients of a rank, the same bits in whatever buckets they are, as in the first step of a resumed run."""

from collections.abc import Iterable

import torch
from torch import Tensor

from commpress.comm.segments import Segments, sizes

ALIGNED = 16
"""Bytes: a GPU sums the values before a multiple of it apart."""


def norm_of(buckets: Iterable[tuple[Tensor, Segments]]) -> float:
    """Return the norm, in float32, of the parameters' norms in the order of their names. `buckets` are flat, of any dtype."""
    norms: dict[str, Tensor] = {}
    for bucket, segments in buckets:
        for one, part in zip(segments, bucket.split(sizes(segments)), strict=True):
            norms[one.name] = torch.linalg.vector_norm(_aligned(part.float()))
    return float(torch.linalg.vector_norm(torch.stack([norms[name] for name in sorted(norms)])))


def _aligned(part: Tensor) -> Tensor:
    """Return a part of a bucket, or a copy if it begins where a GPU would sum its first values apart: the bits of a sum must
    not depend on what lies before it."""
    return part if part.data_ptr() % ALIGNED == 0 else part.clone()
