"""The loss, and its mean on held-out text."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from commpress.launch import data
from commpress.launch.settings import Settings


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats a byte of logits [batch, time, 256] against int64 [batch, time]."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, settings: Settings, device: torch.device) -> float:
    """Return the mean loss in nats a byte over --eval-batches times --batch fixed windows, split over the ranks. Collective."""
    starts = data.validation_starts(text, settings.eval_batches * settings.batch, settings.context)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = starts[rank::world_size]
    for first in range(0, -(-len(starts) // world_size), settings.batch):
        # as many forwards on every rank: those of a sharded model are collective
        part = mine[first : first + settings.batch]
        x, y = (t.to(device) for t in data.windows(text, part if len(part) else starts[:1], settings.context))
        summed = [cross_entropy(model(x), y).item() * len(part), len(part)]
        total += torch.tensor(summed, dtype=torch.float32, device=device)
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()
