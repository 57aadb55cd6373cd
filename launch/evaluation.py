"""The loss, and its mean on held-out text."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from commpress.launch.tasks import Task


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats a byte of logits [batch, time, 256] against int64 [batch, time]."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, task: "Task", device: torch.device) -> float:
    """Return the mean loss of the task's held-out batches, split over the ranks. Collective."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    # as many forwards on every rank: those of a sharded model are collective
    for (inputs, targets), rows in task.held_out(dist.get_rank(), dist.get_world_size()):
        output = model(*(x.to(device) for x in inputs))
        summed = [task.loss(output, targets.to(device)).item() * rows, rows]
        total += torch.tensor(summed, dtype=torch.float32, device=device)
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()
