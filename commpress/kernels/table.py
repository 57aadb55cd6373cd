"""The table of kernels: op x codec x device. Without an entry the definition in plain torch runs, on any device.

A device is a folder with one file a family of codecs, and one line here for each op. The lines for CUDA are in
`triton/table.py`, which is imported on first use.

    encode        (codec, x, residual, prologue, payload)          payload <- code of x + residual; residual <- its error
    mean          (codec, payloads, count, out)                    out <- the mean of `count` payloads, contiguous in one tensor
    recode        (codec, payloads, n, count, residual, payload)   encode of the mean; without an entry `mean`, then `encode`
    clear         (codec, payload, values)                         values <- 0 at the positions in a sparse codec's payload

Here x and out are [n], residual is float32 [n] or None, payload uint8 [nbytes(n)], prologue one of `comm/prologue.py` or None.
With a prologue x is undefined afterwards. All are contiguous and on the device, and n is not 0. `commpress/comm/coding.py`
calls them.

    project, orthonormalize, project_back, expand                  of `powersgd`: `commpress/comm/factors.py`
    fingerprint   (words)                                          `commpress/comm/fingerprint.py`, on accelerators
    prologue      (x, prologue)                                    x <- what the prologue makes of it
    pack, unpack  (x, places, out)                                 `commpress/comm/masks_index.py`
    keep, count_pruned (x, kept)                                   `commpress/model/loops.py`
    apply_update, ..., add_scaled                                  `commpress/optim/loops.py`
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from commpress.kernels.cpu import (
    cast,
    float8,
    integer,
    low_rank,
    masks,
    model,
    optim,
    prologue,
    random_k,
    rotate,
    sign,
    topk,
    two_bit,
)
from commpress.kernels.cpu.arrays import READABLE


@dataclass(frozen=True)
class Kernel:
    """A function of the table, and the dtypes of x and out that it takes as they are; None for all dtypes.

    For other dtypes a codec's ops convert to float32 before the call and back after it; all other ops run their definition.
    """

    run: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] | None = (torch.float32,)

    def takes(self, *tensors: Tensor) -> bool:
        """Whether it takes tensors of these dtypes as they are."""
        return self.dtypes is None or all(x.dtype in self.dtypes for x in tensors)

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


KERNELS: dict[tuple[str, str | None, str], Kernel] = {
    ("encode", "bf16", "cpu"): Kernel(cast.encode, READABLE),
    ("encode", "fp16", "cpu"): Kernel(cast.encode, READABLE),
    ("encode", "fp8", "cpu"): Kernel(float8.encode, READABLE),
    ("encode", "int8", "cpu"): Kernel(integer.encode, READABLE),
    ("encode", "int4", "cpu"): Kernel(integer.encode, READABLE),
    ("encode", "int2", "cpu"): Kernel(two_bit.encode, READABLE),
    ("encode", "sign", "cpu"): Kernel(sign.encode, READABLE),
    ("encode", "topk", "cpu"): Kernel(topk.encode, READABLE),
    ("encode", "randomk", "cpu"): Kernel(random_k.encode, READABLE),
    ("encode", "rotate", "cpu"): Kernel(rotate.encode, READABLE),
    ("mean", "bf16", "cpu"): Kernel(cast.mean, READABLE),
    ("mean", "fp16", "cpu"): Kernel(cast.mean, READABLE),
    ("mean", "fp8", "cpu"): Kernel(float8.mean, READABLE),
    ("mean", "int8", "cpu"): Kernel(integer.mean, READABLE),
    ("mean", "int4", "cpu"): Kernel(integer.mean, READABLE),
    ("mean", "int2", "cpu"): Kernel(two_bit.mean, READABLE),
    ("mean", "sign", "cpu"): Kernel(sign.mean, READABLE),
    ("mean", "topk", "cpu"): Kernel(topk.mean),
    ("mean", "randomk", "cpu"): Kernel(random_k.mean),
    ("mean", "rotate", "cpu"): Kernel(rotate.mean),
    ("recode", "bf16", "cpu"): Kernel(cast.recode),
    ("recode", "fp16", "cpu"): Kernel(cast.recode),
    ("recode", "fp8", "cpu"): Kernel(float8.recode),
    ("recode", "int8", "cpu"): Kernel(integer.recode),
    ("recode", "int4", "cpu"): Kernel(integer.recode),
    ("recode", "int2", "cpu"): Kernel(two_bit.recode),
    ("recode", "sign", "cpu"): Kernel(sign.recode),
    ("recode", "randomk", "cpu"): Kernel(random_k.recode),
    ("recode", "rotate", "cpu"): Kernel(rotate.recode),
    ("clear", "topk", "cpu"): Kernel(topk.clear),
    ("clear", "randomk", "cpu"): Kernel(random_k.clear),
    ("project", "powersgd", "cpu"): Kernel(low_rank.project),
    ("orthonormalize", "powersgd", "cpu"): Kernel(low_rank.orthonormalize),
    ("project_back", "powersgd", "cpu"): Kernel(low_rank.project_back),
    ("expand", "powersgd", "cpu"): Kernel(low_rank.expand),
    ("prologue", None, "cpu"): Kernel(prologue.apply),
    ("pack", None, "cpu"): Kernel(masks.pack_kept, dtypes=None),
    ("unpack", None, "cpu"): Kernel(masks.unpack_kept, dtypes=None),
    ("keep", None, "cpu"): Kernel(model.keep, dtypes=None),
    ("count_pruned", None, "cpu"): Kernel(model.count_pruned, dtypes=None),
    **{(op, None, "cpu"): Kernel(partial(optim.run, op)) for op in optim.LOOPS},
}
"""Kernels by op, word of the codec (None for ops without a codec) and device type."""


def lookup(op: str, codec: str | None, device: str) -> Kernel | None:
    """Return the kernel for an op, a codec's word or None, and a device type; None if the definition must run."""
    if device == "cuda":
        _add_triton()
    return KERNELS.get((op, codec, device))


@cache
def _add_triton() -> None:
    """Add the kernels for CUDA. Warns if Triton, which comes with torch for CUDA, is missing."""
    try:
        from commpress.kernels.triton import table as triton_table
    except ImportError as error:
        text = f"commpress: no kernels for CUDA ({error}): codecs run in plain torch, in many passes. Install commpress[cuda]"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    else:
        KERNELS.update(triton_table.KERNELS)


def devices() -> list[str]:
    """Return the device types that have kernels and that this machine has."""
    if torch.cuda.is_available():
        _add_triton()
    known = dict.fromkeys(device for _, _, device in KERNELS)
    return [device for device in known if device == "cpu" or torch.get_device_module(device).is_available()]


def compiled_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes of gradients and parameters for which a session compiles kernels before it knows theirs.

    On CPU it is float32 alone: each of the other loops takes seconds to compile, and the hooks ask for those that they need.
    """
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)


def encodes_moves(device: torch.device) -> bool:
    """Return whether the loops that encode can move a momentum (`Ahead`): those of Numba do, those of Triton do not."""
    return device.type == "cpu"


def compiles_by_place(device: torch.device) -> bool:
    """Return whether kernels are compiled anew for tensors that begin elsewhere in memory: those of Triton are."""
    return device.type != "cpu"
