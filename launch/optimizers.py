"""The training program's optimizers by name, and their learning rate."""

import math
from typing import Any

import torch
from torch import nn

from commpress import optim
from commpress.launch.settings import SYNC_EVERY, Settings

BETAS = (0.9, 0.95)
MOMENTUM = 0.9
"""The momentum of SGD and DGC."""
HEAD = "head.*"
"""The model's last layer, by name: with a long context the table of positions is larger."""
FINAL_LR = 0.1
"""The end of the cosine, as a share of --lr."""


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return all of a model's parameters, in two groups by weight decay."""
    return by_decay([{"params": list(model.parameters())}], settings)


def by_decay(groups: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Divide groups: matrices decay, biases and norms do not."""
    parts = [
        {**group, "params": [p for p in group["params"] if (p.dim() > 1) == decays], "weight_decay": decay}
        for group in groups
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return [part for part in parts if part["params"]]


def adamw(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make torch's AdamW."""
    return torch.optim.AdamW(parameter_groups(model, settings), lr=settings.lr, betas=BETAS, fused=True)


def one_bit(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make 1-bit Adam."""
    return optim.OneBitAdamW(parameter_groups(model, settings), settings.lr, BETAS, **behind_warm_up(settings))


def zero_one(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make 0/1 Adam."""
    groups = parameter_groups(model, settings)
    return optim.ZeroOneAdamW(groups, settings.lr, BETAS, sync_every=sync_every(settings), **behind_warm_up(settings))


def ef21_muon(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make EF21Muon: Muon with a shared estimate for hidden matrices, AdamW for embeddings, the head and vectors."""
    groups = optim.muon_groups.groups(model, others=[HEAD])
    return optim.EF21Muon(by_decay(groups, settings), settings.lr, betas=BETAS)


def sgd(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make torch's SGD with momentum."""
    return torch.optim.SGD(parameter_groups(model, settings), lr=settings.lr, momentum=MOMENTUM, fused=True)


def dgc(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make Deep Gradient Compression."""
    groups = parameter_groups(model, settings)
    return optim.DGC(groups, settings.lr, MOMENTUM, warmup_steps=behind_warm_up(settings)["warmup_steps"])


def sync_every(settings: Settings) -> int:
    """Return the steps between syncs."""
    return SYNC_EVERY.get(settings.parallel, 1) if settings.sync_every is None else settings.sync_every


def make(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer of --optimizer for a model's parameters."""
    return MAKERS[settings.optimizer](model, settings)


MAKERS = {
    "AdamW": adamw,
    "OneBitAdamW": one_bit,
    "ZeroOneAdamW": zero_one,
    "EF21Muon": ef21_muon,
    "SGD": sgd,
    "DGC": dgc,
}


def behind_warm_up(settings: Settings) -> dict[str, Any]:
    """Return the warm-up of a compressed optimizer: its steps, and its spec."""
    steps = settings.optimizer_warmup or max(1, min(2 * settings.warmup_steps, settings.steps // 4))
    return {"warmup_steps": steps, "warmup_spec": settings.warmup_compress}


def learning_rate(step: int, settings: Settings) -> float:
    """Return the rate of the update after `step` updates: linear warm-up, then a cosine down to FINAL_LR."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    part = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * part)))
