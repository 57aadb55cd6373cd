"""What every codec is: tensor -> bytes -> tensor, pure, with a payload whose length depends on the length alone.

A family states its *definition* in plain torch (`define_encode`, `define_decode`: any device, the oracle of the tests)
and, for CPU memory, its loops (`loop_encode`, `loop_mean`, `loop_recode`), which give the same bytes at memory speed.
A family without loops runs on its definition.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from commpress.comm.codecs.blend import AS_IT_IS, Blend, Floats, Source
from commpress.comm.kernels import cpu

Bytes = npt.NDArray[np.uint8]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_FLOATS: Floats = np.empty(0, np.float32)
WARM_UP_VALUES = 3000
"""Enough for full blocks and a tail of every codec."""


class Codec(ABC):
    """Encodes a 1-D float tensor of n values into one 1-D `uint8` payload of `nbytes(n)` bytes, and back.

    Values are coded in float32, whatever their dtype. A block that holds NaN or Inf decodes to NaN or Inf.
    """

    word: ClassVar[str]
    """The spec word, as in `topk(0.01)`."""
    exchange: ClassVar[str] = "two_shot"
    """The exchange that suits this codec if the plan names none."""
    lossy: ClassVar[bool] = True
    granularity: ClassVar[int] = 1
    """Where two_shot cuts: at multiples of the block, so that no block is cut in two."""
    sum_dtype: ClassVar[torch.dtype | None] = None
    """For a linear codec the dtype in which payloads may be summed; else None."""

    @property
    def spec(self) -> str:
        """The canonical spec: `parse(codec.spec) == codec`."""
        return self.word

    def __str__(self) -> str:
        return self.spec

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """Length in bytes of the payload of n values; a multiple of 4."""

    @abstractmethod
    def define_encode(self, x: Tensor) -> Tensor:
        """The definition in plain torch: float32 [n] -> uint8 [nbytes(n)]."""

    @abstractmethod
    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        """The definition in plain torch: uint8 [nbytes(n)] -> float32 [n]."""

    def encode(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, blend: Blend | None = None
    ) -> Tensor:
        """Encode `x` ([n], any float dtype), or `x + residual` with error feedback.

        `residual` (float32 [n]) becomes what the payload misses, and stays as it was where the payload decodes to NaN or
        Inf, so that one bad gradient cannot poison it. `out` takes the payload (uint8 [nbytes(n)]). With `blend` it is what
        that makes of x which is encoded, and x is undefined afterwards.
        Raises TypeError for a dtype that is not a float, ValueError for a wrong shape.
        """
        _check_values(x, "x")
        n = x.numel()
        if residual is not None:
            _check_values(residual, "residual", n, torch.float32)
        if blend is not None:
            _check_values(blend.inverse, "blend.inverse", n, torch.float32)
            _check_values(blend.average, "blend.average", n, torch.float32)
        payload = torch.empty(self.nbytes(n), dtype=torch.uint8, device=x.device) if out is None else out
        _check_payload(payload, self, n)
        if n == 0:
            return payload
        values = x.detach().to(torch.float32)
        if x.device.type == "cpu":
            payload[-4:].zero_()
            source = AS_IT_IS if blend is None else blend.source
            memory = NO_FLOATS if residual is None else residual.numpy()
            self.loop_encode(values.numpy(), source, memory, payload.numpy())
        else:
            if blend is not None:
                blend.apply(values)
            self._defined_encode(values, residual, payload)
        return payload

    def decode(self, payload: Tensor, n: int, out: Tensor | None = None) -> Tensor:
        """Decode the payload of n values, into `out` ([n], any float dtype) if given, else as new float32."""
        return self.mean(payload, n, 1, out)

    def mean(self, payloads: Tensor, n: int, count: int, out: Tensor | None = None) -> Tensor:
        """The mean of `count` payloads that stand one behind the other: the sum over r of decode(payload r) / count.

        The order of the sum is fixed, so the bytes of the mean depend on the payloads alone.
        """
        _check_payload(payloads, self, n, count)
        result = torch.empty(n, dtype=torch.float32, device=payloads.device) if out is None else out
        _check_values(result, "out", n)
        if n == 0:
            return result
        if payloads.device.type == "cpu":
            direct = result.dtype == torch.float32
            values = result if direct else torch.empty(n, dtype=torch.float32, device=payloads.device)
            self.loop_mean(payloads.numpy(), count, values.numpy())
            if not direct:
                result.copy_(values)
        else:
            result.copy_(self._defined_mean(payloads, n, count))
        return result

    def recode(
        self, payloads: Tensor, n: int, count: int, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """`encode(mean(payloads, n, count), residual, out)` in one step: what stands in the middle of `two_shot`."""
        _check_payload(payloads, self, n, count)
        if residual is not None:
            _check_values(residual, "residual", n, torch.float32)
        payload = torch.empty(self.nbytes(n), dtype=torch.uint8, device=payloads.device) if out is None else out
        _check_payload(payload, self, n)
        if n == 0:
            return payload
        if payloads.device.type == "cpu":
            payload[-4:].zero_()
            before = NO_FLOATS if residual is None else residual.numpy()
            self.loop_recode(payloads.numpy(), count, n, before, payload.numpy())
        else:
            self._defined_encode(self._defined_mean(payloads, n, count), residual, payload)
        return payload

    def clear(self, payload: Tensor, values: Tensor) -> None:
        """Set `values` (float32 [n]) to 0 at the places that the payload of n values names.

        A codec that names none, since it sends all values, leaves them alone.
        """
        return

    # The loops, on CPU memory. A family with loops of its own overrides these three.

    def loop_encode(self, x: Floats, source: Source, residual: Floats, payload: Bytes) -> None:
        """`encode` on CPU memory; an empty residual means no feedback."""
        cpu.blend(x, source)
        memory = torch.from_numpy(residual) if residual.size else None
        self._defined_encode(torch.from_numpy(x), memory, torch.from_numpy(payload))

    def loop_mean(self, payloads: Bytes, count: int, out: Floats) -> None:
        """`mean` on CPU memory."""
        torch.from_numpy(out).copy_(self._defined_mean(torch.from_numpy(payloads), out.size, count))

    def loop_recode(self, payloads: Bytes, count: int, n: int, residual: Floats, payload: Bytes) -> None:
        """`recode` on CPU memory; an empty residual means no feedback."""
        mean = np.empty(n, np.float32)
        self.loop_mean(payloads, count, mean)
        self.loop_encode(mean, AS_IT_IS, residual, payload)

    # What the three mean, in terms of the definition.

    def _defined_encode(self, x: Tensor, residual: Tensor | None, payload: Tensor) -> None:
        total = x if residual is None else x + residual
        payload.copy_(self.define_encode(total))
        if residual is not None:
            lost = total - self.define_decode(payload, x.numel())
            residual.copy_(torch.where(lost.isfinite(), lost, residual))

    def _defined_mean(self, payloads: Tensor, n: int, count: int) -> Tensor:
        size, share = self.nbytes(n), 1.0 / count
        mean = self.define_decode(payloads[:size], n) * share
        for r in range(1, count):
            mean += self.define_decode(payloads[r * size : (r + 1) * size], n) * share
        return mean


def warm_up(codec: Codec, device: torch.device) -> None:
    """Compile a codec's loops now, not in the middle of the first step."""
    x = torch.linspace(-1, 1, WARM_UP_VALUES, dtype=torch.float32, device=device)
    residual = torch.zeros_like(x)
    payload = codec.encode(x)
    codec.encode(x, residual)
    Blend(x, x, 1.0, 0.5, 0.5).apply(residual)
    codec.recode(payload.repeat(2), WARM_UP_VALUES, 2, residual)
    codec.recode(payload.repeat(2), WARM_UP_VALUES, 2)
    codec.mean(payload.repeat(2), WARM_UP_VALUES, 2)


def padded(nbytes: int) -> int:
    """The next multiple of 4, at which the float32 words of a following section are aligned."""
    return (nbytes + 3) // 4 * 4


def _check_values(x: Tensor, name: str, n: int | None = None, dtype: torch.dtype | None = None) -> None:
    if x.dtype not in FLOAT_DTYPES or (dtype is not None and x.dtype != dtype):
        wanted = dtype or "one of " + ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} has dtype {x.dtype}, expected {wanted}")
    if x.dim() != 1 or not x.is_contiguous() or (n is not None and x.numel() != n):
        wanted = "a contiguous 1-D tensor" + ("" if n is None else f" of {n} values")
        raise ValueError(f"{name} has shape {tuple(x.shape)} and stride {x.stride()}, expected {wanted}")


def _check_payload(payload: Tensor, codec: Codec, n: int, count: int = 1) -> None:
    if n < 0:
        raise ValueError(f"{codec}: the number of values must not be negative, got {n}")
    if count < 1:
        raise ValueError(f"{codec}: the number of payloads must be at least 1, got {count}")
    size = count * codec.nbytes(n)
    if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != size or not payload.is_contiguous():
        raise ValueError(
            f"{codec}: {count} payload(s) of {n} values are a contiguous 1-D uint8 tensor of {size} bytes, "
            f"got {payload.dtype} of shape {tuple(payload.shape)}"
        )
