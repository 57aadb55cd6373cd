"""The part of the table of kernels that is for CUDA; `commpress/kernels/table.py` says what its lines mean."""

from commpress.kernels.table import Kernel
from commpress.kernels.triton import cast, float8, integer, sign, topk, two_bit
from commpress.kernels.triton.launch import READABLE

KERNELS: dict[tuple[str, str | None, str], Kernel] = {
    ("encode", "bf16", "cuda"): Kernel(cast.encode, READABLE),
    ("encode", "fp16", "cuda"): Kernel(cast.encode, READABLE),
    ("encode", "fp8", "cuda"): Kernel(float8.encode, READABLE),
    ("encode", "int8", "cuda"): Kernel(integer.encode, READABLE),
    ("encode", "int4", "cuda"): Kernel(integer.encode, READABLE),
    ("encode", "int2", "cuda"): Kernel(two_bit.encode, READABLE),
    ("encode", "sign", "cuda"): Kernel(sign.encode, READABLE),
    ("encode", "topk", "cuda"): Kernel(topk.encode, READABLE),
    ("mean", "bf16", "cuda"): Kernel(cast.mean, READABLE),
    ("mean", "fp16", "cuda"): Kernel(cast.mean, READABLE),
    ("mean", "fp8", "cuda"): Kernel(float8.mean, READABLE),
    ("mean", "int8", "cuda"): Kernel(integer.mean, READABLE),
    ("mean", "int4", "cuda"): Kernel(integer.mean, READABLE),
    ("mean", "int2", "cuda"): Kernel(two_bit.mean, READABLE),
    ("mean", "sign", "cuda"): Kernel(sign.mean, READABLE),
    ("mean", "topk", "cuda"): Kernel(topk.mean),
    ("recode", "fp8", "cuda"): Kernel(float8.recode),
    ("recode", "int8", "cuda"): Kernel(integer.recode),
    ("recode", "int4", "cuda"): Kernel(integer.recode),
    ("recode", "int2", "cuda"): Kernel(two_bit.recode),
    ("recode", "sign", "cuda"): Kernel(sign.recode),
    ("clear", "topk", "cuda"): Kernel(topk.clear),
}
