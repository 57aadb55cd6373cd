"""The training program's optimizers by name, and the model spread over the ranks with one of them."""

from typing import Any

import torch
from torch import nn

from commpress import optim
from commpress.launch import parallel
from commpress.launch.model import GPT
from commpress.launch.settings import SYNC_EVERY, Settings

BETAS = (0.9, 0.95)
MOMENTUM = 0.9
"""SGD's and DGC's."""


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def adamw(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """torch's own."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)


def one_bit(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """1-bit Adam."""
    return optim.OneBitAdamW(groups, settings.lr, BETAS, **behind_warm_up(settings))


def zero_one(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """0/1 Adam."""
    return optim.ZeroOneAdamW(groups, settings.lr, BETAS, sync_every=sync_every(settings), **behind_warm_up(settings))


def sgd(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """torch's own, with momentum."""
    return torch.optim.SGD(groups, lr=settings.lr, momentum=MOMENTUM, fused=True)


def dgc(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """Deep Gradient Compression."""
    return optim.DGC(groups, settings.lr, MOMENTUM, warmup_steps=behind_warm_up(settings)["warmup_steps"])


def spread(model: GPT, settings: Settings) -> parallel.Spread:
    """The model on all ranks, as --parallel has it, its optimizer and its session. Collective."""

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return MAKERS[settings.optimizer](parameter_groups(module, settings), settings)

    if settings.parallel == "fsdp":
        return parallel.Sharded(model, optimizer, settings.compress, settings.parameters)
    if settings.parallel == "ddp":
        return parallel.Replicated(model, optimizer(model), settings.compress)
    if settings.parallel == "deepspeed":
        specs = settings.compress, settings.parameters
        return parallel.Engine(model, optimizer(model), settings.zero_stage, settings.batch, *specs)
    outer: dict[str, Any] = {"every": sync_every(settings), "fragments": settings.fragments, "delay": settings.delay}
    if settings.parallel == "diloco":
        outer |= {"lr": settings.outer_lr, "momentum": settings.outer_momentum}
    return parallel.Local(model, optimizer(model), settings.parallel, settings.compress, outer)


def sync_every(settings: Settings) -> int:
    """Steps between syncs."""
    return SYNC_EVERY.get(settings.parallel, 1) if settings.sync_every is None else settings.sync_every


MAKERS = {"AdamW": adamw, "OneBitAdamW": one_bit, "ZeroOneAdamW": zero_one, "SGD": sgd, "DGC": dgc}


def behind_warm_up(settings: Settings) -> dict[str, Any]:
    """How long a compressed optimizer warms up, and by what spec."""
    steps = settings.optimizer_warmup or max(1, min(2 * settings.warmup_steps, settings.steps // 4))
    return {"warmup_steps": steps, "warmup_spec": settings.warmup_compress}
