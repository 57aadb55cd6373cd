"""Quality: the loss of both models on the same batches, and how far their predictions agree."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets of a batch to its mean loss."""


@dataclass
class Quality:
    """Means over batches, each weighed by its rows."""

    rows: int = 0
    dense_loss: float = 0.0
    small_loss: float = 0.0
    differences: list[tuple[int, float]] = field(default_factory=list)
    """Rows, and small less dense loss, of each batch."""
    classified: int = 0
    """Predictions: 0 where outputs are no classes."""
    dense_right: int = 0
    small_right: int = 0
    changed: int = 0
    """Predictions, the largest output of each, that are others in the small model."""
    divergence: float = 0.0
    """The sum of KL(dense || small) of all predictions, in nats."""

    def add(self, dense: Tensor, small: Tensor, targets: Tensor, loss: Loss | None) -> None:
        """Add a batch. Raises ValueError if outputs and targets do not go together."""
        if dense.shape != small.shape:
            raise ValueError(f"judge: dense outputs are {tuple(dense.shape)}, small ones {tuple(small.shape)}")
        rows = len(dense) if dense.dim() else 1
        by_class = classes_last(dense, targets)
        function = loss or usual_loss(dense, targets)
        losses = [float(function(y, targets)) for y in (dense, small)]
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"judge: the loss is {losses[0]} of the dense and {losses[1]} of the small model")
        self.rows += rows
        self.dense_loss += rows * losses[0]
        self.small_loss += rows * losses[1]
        self.differences.append((rows, losses[1] - losses[0]))
        if by_class is None:
            return
        asked = targets >= 0  # torch's losses leave out -100
        one, other, targets = by_class(dense)[asked], by_class(small)[asked], targets[asked]
        first, second = one.argmax(-1), other.argmax(-1)
        self.classified += first.numel()
        self.dense_right += int((first == targets).sum())
        self.small_right += int((second == targets).sum())
        self.changed += int((first != second).sum())
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        self.divergence += float((p.exp() * (p - q)).sum())

    def to_dict(self) -> dict[str, float | None]:
        """The means. Those of classes are None where there are none; `difference_error` is that of the mean, over batches."""
        of, rows = self.classified, max(self.rows, 1)
        mean = (self.small_loss - self.dense_loss) / rows
        n = len(self.differences)
        spread = sum(each * (found - mean) ** 2 for each, found in self.differences) / rows
        return {
            "dense_loss": self.dense_loss / rows,
            "small_loss": self.small_loss / rows,
            "difference_error": math.sqrt(spread / (n - 1)) if n > 1 else None,
            "dense_accuracy": self.dense_right / of if of else None,
            "small_accuracy": self.small_right / of if of else None,
            "changed": self.changed / of if of else None,
            "divergence": self.divergence / of if of else None,
        }


def classes_last(outputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How outputs become [..., classes] for whole targets [...]; None where they are no classes.

    Classes stand last, or second as torch's own losses have them, [rows, classes, ...].
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return None
    if outputs.shape[:-1] == targets.shape:
        return lambda y: y
    if outputs.dim() > 2 and outputs.shape[:1] + outputs.shape[2:] == targets.shape:
        return lambda y: y.movedim(1, -1)
    return None


def usual_loss(outputs: Tensor, targets: Tensor) -> Loss:
    """Cross entropy for classes, squared error for numbers. Raises ValueError for anything else."""
    by_class = classes_last(outputs, targets)
    if by_class is not None:
        return lambda y, t: functional.cross_entropy(by_class(y).flatten(0, -2), t.flatten().long())
    if targets.is_floating_point() and outputs.shape == targets.shape:
        return lambda y, t: functional.mse_loss(y, t.to(y.dtype))
    raise ValueError(
        f"judge: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} of {targets.dtype} have no usual loss, "
        "expected whole numbers for classes, floats of the outputs' shape, or loss="
    )
