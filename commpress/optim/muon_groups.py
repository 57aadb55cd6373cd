"""The parameters of a model that Muon steps, those that it leaves to AdamW, and the codecs for the gradients of these."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from commpress.comm.codecs import Codec, parse
from commpress.comm.codecs.rotate import Rotate
from commpress.comm.parameters import bare_name

GENTLE = ("none", "bf16", "fp16", "fp8", "int8", "int4")
"""Codecs of gradients that keep AdamW's loss, rotated or not."""
COARSEST = "rotate|int2"
"""The coarsest of all, for gradients that have error feedback. For a GPT's embeddings and head it cost no more loss than `int4`
(benchmarks/convergence.py, `rotate|sign` for the hidden matrices, three seeds)."""


def groups(model: nn.Module, others: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the parameters that require a gradient in two groups: the hidden matrices, and the others.

    `others` are patterns of names (as in fnmatch) for further parameters of the second group. Raises ValueError for a pattern
    that matches nothing, and if no hidden matrix is float32.
    """
    embedded = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    named = {bare_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in others:
        if not fnmatch.filter(named, pattern):
            raise ValueError(
                f"others: {pattern!r} matches no parameter that requires a gradient, known: {', '.join(named)}"
            )
    hidden = [p for p in named.values() if p.dim() >= 2 and p not in embedded]
    if hidden and hidden[-1].shape in {table.shape for table in embedded}:
        hidden.pop()  # the head
    if hidden and not any(p.dtype == torch.float32 for p in hidden):
        raise ValueError(
            f"EF21Muon: the hidden matrices are {hidden[0].dtype}, expected float32; make the optimizer before DeepSpeed, or "
            "you, cast the model"
        )
    chosen = {p for p in hidden if p.dtype == torch.float32}
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in named.items():
        other = any(fnmatch.fnmatchcase(name, pattern) for pattern in others)
        (matrices if p in chosen and not other else rest).append(p)
    return [group for group in ({"params": matrices, "muon": True}, {"params": rest, "muon": False}) if group["params"]]


def others_codec(spec: str, feedback: bool = True) -> Codec:
    """Return the codec of an `others_spec`. Raises ValueError for one by whose gradients AdamW trains worse."""
    codec = parse(spec)
    values = codec.values if isinstance(codec, Rotate) else codec
    if values.word in GENTLE or (feedback and str(codec) == COARSEST):
        return codec
    known = ", ".join(GENTLE)
    if not feedback:
        raise ValueError(f"others_spec {spec!r}: sharded gradients have no error feedback; expected one of {known}")
    raise ValueError(f"others_spec {spec!r}: AdamW trains worse with it; expected one of {known}, {COARSEST}")
