"""A small network and its training, for tests of the hooks: the same data and start on every run."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

INPUTS, WIDTH, CLASSES = 32, 64, 10
SMALL_BUCKETS = 0.002
"""`bucket_cap_mb` at which `network()` has three buckets, once DDP has laid them out anew after the first step."""
PRODUCTS = "commpress.optim.newton_schulz.CPU_DTYPE"
exact_products = mock.patch(PRODUCTS, torch.float32)
"""Has Newton-Schulz in float32 on any processor: bfloat16 makes a difference of one rounding in a gradient a large one."""


def network(seed: int = 0, width: int = WIDTH) -> nn.Sequential:
    """Three layers, 6922 parameters in 64 units; the same values for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)
        )


def batch(step: int, rank: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and classes of one rank in one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, INPUTS, generator=generator)
    return x, (x[:, :CLASSES] + 0.5 * x[:, CLASSES : 2 * CLASSES]).argmax(dim=1)


def loss_of(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    """The loss of one rank's batch."""
    x, y = batch(step, dist.get_rank() if rank is None else rank)
    return nn.functional.cross_entropy(model(x), y)


@dataclass
class Trained:
    """The result of a training: flat parameters, and the gradients of each step (None where there is none)."""

    parameters: list[Tensor]
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    extra: Any = None


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def gradients_of(model: nn.Module) -> list[Tensor | None]:
    """Copies of all gradients."""
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    """SGD with momentum for what is trained."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)


def by_dimensions(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups for EF21Muon, of parameters or of groups of them: what has two dimensions is a hidden matrix."""
    held = list(parameters)
    if held and isinstance(held[0], dict):
        return [{**group, **part} for group in held for part in by_dimensions(group["params"])]
    parts = [{"params": [p for p in held if (p.dim() == 2) == two], "muon": two} for two in (True, False)]
    return [part for part in parts if part["params"]]


def train(
    model: nn.Module,
    steps: Sequence[int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
    accumulate: int = 1,
) -> Trained:
    """Train a DDP module on the batches of these steps; `accumulate` backwards a step, all but the last under no_sync."""
    optimizer = optimizer or sgd(model)
    trained = Trained([])
    for step in steps:
        optimizer.zero_grad()
        for part in range(accumulate):
            held_back = isinstance(model, DistributedDataParallel) and part < accumulate - 1
            with model.no_sync() if held_back else contextlib.nullcontext():  # type: ignore[operator]
                (loss(model, step * accumulate + part) / accumulate).backward()
        trained.gradients.append(gradients_of(model))
        optimizer.step()
    trained.parameters = parameters_of(model)
    return trained


def same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Equal bit for bit, None where None."""
    return len(one) == len(other) and all(
        (a is None and b is None)
        or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)))
        for a, b in zip(one, other, strict=True)
    )


def same_training(one: Trained, other: Trained) -> bool:
    """Equal gradients in every step and equal parameters at the end, bit for bit."""
    steps = zip(one.gradients, other.gradients, strict=True)
    return same(one.parameters, other.parameters) and all(same(a, b) for a, b in steps)


def finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all values are finite numbers."""
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)


def adrift(
    wrapped: Any,
    optimizer: torch.optim.Optimizer,
    session: Any,
    names: Collection[str] = (),
) -> tuple[float, float]:
    """How far the sum of estimate and mean residual, and the estimate alone, are at most from a matrix's mean momentum.

    The matrices are those of a DDP module or an engine. Collective.
    """
    off, alone = [], []
    for name, p in wrapped.module.named_parameters():
        if p.dim() == 2 and (name in names or not names):
            (residual, momentum), part = session.collectives[0].feedback.part(name)
            both = torch.stack([residual[part], momentum[part]])
            dist.all_reduce(both)
            left, mean = both / dist.get_world_size()
            estimate = optimizer.state[p]["momentum_buffer"].view(-1)
            off.append(float((estimate + left - mean).norm() / mean.norm()))
            alone.append(float((estimate - mean).norm() / mean.norm()))
    return max(off), max(alone)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
