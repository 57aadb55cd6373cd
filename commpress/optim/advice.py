"""A warning for gradients that are compressed to a bit or less a value under Adam."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commpress.comm.codecs import Codec
from commpress.notice import warn
from commpress.optim.base import CompressedOptimizer

FEW_BITS = 2.0
"""Bits a value; with fewer a codec is too coarse for gradients from which Adam computes its variance."""
MANY = 1 << 20
MEASURED = (
    "held-out loss of a GPT of 0.9 M parameters after 1,500 steps, above AdamW's: gradients by powersgd(4) 4.9 %, "
    "by topk(0.01)|int4 19.8 %, OneBitAdamW by sign 0.7 %"
)
"""Figures measured by benchmarks/convergence.py."""
ADAPTIVE = ("adam", "rmsprop", "adagrad", "adadelta", "adafactor", "lamb")
"""Parts of class names: an optimizer whose name contains one divides by a variance of the gradients that arrive."""


def advise(codec: Codec, parameters: set[Tensor], leads: bool) -> None:
    """Warn once, at the first step of an optimizer of these parameters, if it is adaptive and the codec is coarse.

    `leads`: this rank is the one that warns.
    """
    bits = 8 * codec.nbytes(MANY) / MANY if codec.flat else 0.0
    if bits >= FEW_BITS or not leads:
        return
    left = f"{bits:.2g} bits of a gradient's value" if codec.flat else "a few directions of a gradient"
    waiting = {
        id(p): weakref.ref(p) for p in parameters
    }  # weak references: the hook must not keep a model alive; an id alone may be reused

    def is_ours(p: Tensor) -> bool:
        known = waiting.get(id(p))
        return known is not None and known() is p

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(is_ours(p) for group in optimizer.param_groups for p in group["params"]):
            return
        waiting.clear()  # torch is iterating over its hooks now, so none may be removed
        name = type(optimizer).__name__
        if isinstance(optimizer, CompressedOptimizer) or not any(word in name.lower() for word in ADAPTIVE):
            return
        warn(
            f"commpress: {codec} leaves {left}, and {name} divides by the root of a variance "
            f"of what arrives, which undoes error feedback ({MEASURED}). Under Adam take int8 or int4, or send what Adam "
            "applies: opt = commpress.optim.OneBitAdamW(...), commpress.attach(model, spec, optimizer=opt)",
            leads,
        )

    register_optimizer_step_pre_hook(before)
