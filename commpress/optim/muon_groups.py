"""The parameters of a model that Muon steps, and those that it leaves to AdamW."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from commpress.comm.parameters import bare_name


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
