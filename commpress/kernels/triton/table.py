"""The part of the table of kernels that is for CUDA; `commpress/kernels/table.py` says what its lines mean."""

from functools import partial

from commpress.kernels.table import Kernel
from commpress.kernels.triton import (
    cast,
    float8,
    integer,
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
    ("encode", "randomk", "cuda"): Kernel(random_k.encode, READABLE),
    ("encode", "rotate", "cuda"): Kernel(rotate.encode, READABLE),
    ("mean", "bf16", "cuda"): Kernel(cast.mean, READABLE),
    ("mean", "fp16", "cuda"): Kernel(cast.mean, READABLE),
    ("mean", "fp8", "cuda"): Kernel(float8.mean, READABLE),
    ("mean", "int8", "cuda"): Kernel(integer.mean, READABLE),
    ("mean", "int4", "cuda"): Kernel(integer.mean, READABLE),
    ("mean", "int2", "cuda"): Kernel(two_bit.mean, READABLE),
    ("mean", "sign", "cuda"): Kernel(sign.mean, READABLE),
    ("mean", "topk", "cuda"): Kernel(topk.mean),
    ("mean", "randomk", "cuda"): Kernel(random_k.mean, READABLE),
    ("mean", "rotate", "cuda"): Kernel(rotate.mean, READABLE),
    ("recode", "fp8", "cuda"): Kernel(float8.recode),
    ("recode", "int8", "cuda"): Kernel(integer.recode),
    ("recode", "int4", "cuda"): Kernel(integer.recode),
    ("recode", "int2", "cuda"): Kernel(two_bit.recode),
    ("recode", "sign", "cuda"): Kernel(sign.recode),
    ("clear", "topk", "cuda"): Kernel(topk.clear),
    ("clear", "randomk", "cuda"): Kernel(random_k.clear),
    ("prologue", None, "cuda"): Kernel(prologue.apply),
    ("pack", None, "cuda"): Kernel(masks.pack, dtypes=None),
    ("unpack", None, "cuda"): Kernel(masks.unpack, dtypes=None),
    ("keep", None, "cuda"): Kernel(model.keep, dtypes=None),
    ("count_pruned", None, "cuda"): Kernel(model.count_pruned, dtypes=None),
    **{(op, None, "cuda"): Kernel(partial(optim.run, op)) for op in optim.FORMULAS},
}
