"""The evaluation batches of Transformers' Trainer as a budget measures them: inputs as forward takes them first, and targets.

Which targets the model's own loss compares its outputs with, the loss tells: the labels, or those of a causal model, one place
further. What gives another loss than the Trainer's, such as label smoothing, is refused: a budget by a loss that nobody trains
for would be wrong without a word.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from commpress.model.judgement.quality import Loss, usual_loss

GIVE = "expected held_out=, batches (inputs, targets)"
NEAR = 1e-3
"""The relative difference of two losses that are the same one."""


def batches_for(trainer: Trainer, compute_loss: Callable[..., Any], loss: Loss | None) -> list[tuple[Any, Tensor]]:
    """Return this rank's evaluation batches (inputs, targets). `compute_loss` is the Trainer's, `loss` one that replaces it.

    Collective where the Trainer's loader is. Raises ValueError for batches that are not of this kind.
    """
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        got = "none" if trainer.eval_dataset is None else "several"
        raise ValueError(
            f"the recipe has a [budget]: expected an eval_dataset in the Trainer, got {got}; or {GIVE[9:]}"
        )
    names = list(trainer.label_names)
    found = [dict(batch) for batch in trainer.get_eval_dataloader()]
    if len(names) != 1 or not found or names[0] not in found[0]:
        raise ValueError(
            f"the recipe has a [budget], and the evaluation batches have no single target of {names}: {GIVE}"
        )
    pairs = [(_in_order(batch, names[0], trainer.model), batch[names[0]]) for batch in found]
    if loss is None and _shifts(trainer.model, compute_loss, found[0], *pairs[0]):
        return [(inputs, _shifted(labels)) for inputs, labels in pairs]
    return list(pairs)


def _in_order(batch: dict[str, Tensor], label: str, model: nn.Module) -> tuple[Tensor, ...]:
    """A batch's inputs as positional arguments: files of a model know no names."""
    given = [name for name in batch if name != label]
    first = list(inspect.signature(type(model).forward).parameters)[1 : 1 + len(given)]
    if set(first) != set(given):
        raise ValueError(
            f"the recipe has a [budget], evaluation batches have {', '.join(given)}, and forward of {type(model).__name__} "
            f"takes {', '.join(first)} first: {GIVE}, with inputs in the order of forward"
        )
    return tuple(batch[name] for name in first)


@torch.no_grad()
def _shifts(
    model: nn.Module,
    compute_loss: Callable[..., Any],
    batch: dict[str, Tensor],
    inputs: tuple[Tensor, ...],
    labels: Tensor,
) -> bool:
    """Whether the Trainer's loss is that of the labels one place further, not of the labels themselves."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        told = float(compute_loss(model, {name: x.to(device) for name, x in batch.items()}))
        outputs = model(*(x.to(device) for x in inputs))
    finally:
        model.train(was)
    y = next(each for each in tree_leaves(outputs) if isinstance(each, Tensor))
    losses = [_usual(y, targets.to(device)) for targets in (labels, _shifted(labels))]
    off = [abs(each - told) for each in losses]
    best = min(range(len(off)), key=lambda i: off[i] if math.isfinite(off[i]) else math.inf)
    if not off[best] <= NEAR * max(abs(told), NEAR):
        raise ValueError(
            f"the recipe has a [budget], and the Trainer's loss of an evaluation batch, {told:.4g}, is not the usual one of "
            f"outputs and labels, {losses[0]:.4g}: expected budget_loss=, which takes both"
        )
    return best == 1


def _usual(outputs: Tensor, targets: Tensor) -> float:
    try:
        return float(usual_loss(outputs, targets)(outputs, targets))
    except ValueError:
        return math.nan


def _shifted(labels: Tensor) -> Tensor:
    """The next label at each place, -100 at the last one, which losses leave out."""
    if not labels.dim() or labels.is_floating_point():
        return labels
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
