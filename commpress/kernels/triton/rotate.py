"""Kernels of `rotate`: a program has one block of 1024 values, whose transform runs through registers and shared memory.

What is left at the end is one program more. Its blocks are powers of two, the largest first, so each starts at a multiple of
its size: value o of m lies in the block of 2^i values whose i is the highest bit of o ^ m, and takes the steps below 2^i.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.comm.codecs.rotate import signs
from commpress.kernels.triton.blocks import is_finite, keep_lost, nan_like, read, remembered, total, write
from commpress.kernels.triton.launch import counting, launch, steps

SIZE: tl.constexpr = tl.constexpr(1024)
COLUMNS: tl.constexpr = tl.constexpr(16)
ROWS: tl.constexpr = tl.constexpr(64)


@triton.jit
def _step(x, STEP: tl.constexpr):
    """A step of the transform: a + b and a - b of values that are STEP apart."""
    pairs = tl.permute(tl.reshape(x, [SIZE // (2 * STEP), 2, STEP]), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [SIZE])


@triton.jit
def _steps(x, rest, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT steps, each twice as long as the one before; in the last `rest` values those that the blocks have."""
    for k in tl.static_range(COUNT):
        turned = _step(x, FIRST << k)
        x = turned if rest is None else tl.where(tl.arange(0, SIZE) ^ rest >= 2 * FIRST << k, turned, x)
    return x


@triton.jit
def _factors(signs, rest):
    """Return the factors of a block's values: their sign and the root of 1 / size."""
    o = tl.arange(0, SIZE)
    if rest is None:
        return tl.load(signs + o) * 2.0**-5
    else:
        block, scale = tl.full([SIZE], 1, tl.int32), tl.full([SIZE], 1.0, tl.float32)
        for i in tl.static_range(1, 10):
            block = tl.where((o ^ rest) >= 1 << i, 1 << i, block)
            scale = tl.where((o ^ rest) >= 1 << i, 2.0 ** (-0.5 * i), scale)
        return tl.where(block > 1, tl.load(signs + (o & (block - 1))) * scale, scale)


@triton.jit
def _with_one_nan(value, before, rest):
    """Finite values, and the one NaN for others; a value that is left alone at the end is what it was before."""
    value = tl.where(is_finite(value), value, nan_like(value))
    if rest is None:
        return value
    else:
        return tl.where((tl.arange(0, SIZE) ^ rest) == 1, before, value)


@triton.jit
def _turned(value, signs, rest):
    """Rotate a block."""
    turned = value * _factors(signs, rest)
    if rest is None:
        turned = _steps(_steps(turned, rest, COLUMNS, 6), rest, 1, 4)
        turned = tl.reshape(tl.permute(tl.reshape(turned, [ROWS, COLUMNS]), (1, 0)), [SIZE])
    else:
        turned = _steps(turned, rest, 1, 9)
    return _with_one_nan(turned, value, rest)


@triton.jit
def _turned_back(value, signs, rest):
    """Rotate a block back."""
    if rest is None:
        turned = tl.reshape(tl.permute(tl.reshape(value, [COLUMNS, ROWS]), (1, 0)), [SIZE])
        turned = _steps(_steps(turned, rest, 4, 2), rest, 1, 2)
        turned = _steps(turned, rest, COLUMNS, 6)
    else:
        turned = _steps(value, rest, 1, 9)
    return _with_one_nan(turned * _factors(signs, rest), value, rest)


@triton.jit
def _forth_block(x, prologue, residual, signs, out, at, inside, rest):
    write(out + at, _turned(total(x, prologue, residual, at, inside), signs, rest), inside)


@counting
def _forth(x, prologue, residual, signs, out, n):
    """Write to `out` the rotation of x as it is coded."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _forth_block(x, prologue, residual, signs, out, at, None, None)
    else:
        _forth_block(x, prologue, residual, signs, out, at, at < n, (n - first).to(tl.int32))


@triton.jit
def _back_block(z, signs, x, prologue, residual, out, at, inside, rest):
    turned = _turned_back(read(z + at, inside), signs, rest)
    if out is not None:
        write(out + at, turned, inside)
    else:
        keep_lost(residual, at, total(x, prologue, residual, at, inside) - turned, inside)


@counting
def _back(z, signs, x, prologue, residual, out, n):
    """Rotate z back, into `out`, which may be z, or without it leave in the residual what z misses of x."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _back_block(z, signs, x, prologue, residual, out, at, None, None)
    else:
        _back_block(z, signs, x, prologue, residual, out, at, at < n, (n - first).to(tl.int32))


@triton.jit
def _again_block(z, signs, residual, mean, at, inside, rest):
    back = _turned_back(read(z + at, inside), signs, rest)
    if mean is not None:
        write(mean + at, back, inside)
    write(z + at, _turned(remembered(back, residual, at, inside), signs, rest), inside)


@counting
def _again(z, signs, residual, mean, n):
    """Rotate z back to `mean`, and again with the residual to z, as it is coded."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _again_block(z, signs, residual, mean, at, None, None)
    else:
        _again_block(z, signs, residual, mean, at, at < n, (n - first).to(tl.int32))


@cache
def _signs(device: torch.device) -> Tensor:
    """The signs of a block on a device; the copy is waited for, so any stream may read them."""
    return signs(torch.device("cpu")).to(device)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    n, source = x.numel(), (x, steps(prologue), residual)
    z = torch.empty(n, dtype=torch.float32, device=x.device)
    launch(_forth, triton.cdiv(n, SIZE), *source, _signs(x.device), z, n)
    _code(codec, z, payload, *source)


def _code(codec: Any, z: Tensor, payload: Tensor, x: Tensor | None, prologue: Any, residual: Tensor | None) -> None:
    """Have the inner codec encode rotated values, and leave in the residual what their code misses of x."""
    codec.values.encode(z, payload)
    if residual is not None:
        n = z.numel()
        codec.values.decode(payload, n, z)
        launch(_back, triton.cdiv(n, SIZE), z, _signs(z.device), x, prologue, residual, None, n)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table: rotated back once."""
    n = out.numel()
    z = out if out.dtype == torch.float32 else torch.empty(n, dtype=torch.float32, device=out.device)
    codec.values.mean(payloads, n, count, z)
    launch(_back, triton.cdiv(n, SIZE), z, _signs(out.device), None, None, None, out, n)


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table. The mean is stored only where a residual needs it."""
    z = torch.empty(n, dtype=torch.float32, device=payloads.device)
    back = None if residual is None else torch.empty_like(z)
    codec.values.mean(payloads, n, count, z)
    launch(_again, triton.cdiv(n, SIZE), z, _signs(z.device), residual, back, n)
    _code(codec, z, payload, back, None, residual)
