"""DeepSpeed engines on the ranks of a test: the small network of `training`, the same data and start on every run."""

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from training import batch, network

import commpress

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by names that torch renamed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and is for inference
RANKS = 3
"""In all tests: ZeRO 3 counts modules and changes torch for as long as a process lives, and it wants all ranks alike."""
_seen: list[object] = []


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer that most tests train with."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)


def config(stage: int, zero: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed config in which every parameter is sharded under ZeRO 3, however small."""
    return {
        "train_micro_batch_size_per_gpu": 16,
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
        **settings,
    }


def engine(
    stage: int,
    zero: dict[str, Any] | None = None,
    *,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = adamw,
    model: Callable[[], nn.Module] = network,
    start: Callable[..., Any] = deepspeed.initialize,
    **settings: Any,
) -> Any:
    """An engine; `settings` go into its config. Without an optimizer it takes that of the config."""
    fresh()
    made = model()
    chosen = None if optimizer is None else optimizer(made.parameters())
    return start(model=made, optimizer=chosen, config=config(stage, zero, **settings))[0]


def fresh() -> None:
    """Make DeepSpeed forget the process groups of the test before, and end its engines here.

    An engine imports modules when it is collected; in the middle of another import Python 3.11 fails at that.
    """
    gc.collect()
    group = dist.distributed_c10d._get_default_group()
    if not _seen or _seen[-1] is not group:
        _seen[:] = [group]
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
        deepspeed.comm.comm.cdb = None
        groups._release_process_group_references(group=None)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def train(engine: Any, steps: Sequence[int]) -> list[float]:
    """Train on the batches of these steps, one a backward; return this rank's losses."""
    losses = []
    for step in steps:
        x, y = batch(step, dist.get_rank())
        if engine.bfloat16_enabled():
            x = x.bfloat16()
        loss = nn.functional.cross_entropy(engine(x).float(), y)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def weights(engine: Any) -> list[Tensor]:
    """Copies of all parameters; under ZeRO 3 the exact ones."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return [p.detach().clone() for p in parameters]


def same_on_all_ranks(tensors: Sequence[Tensor]) -> bool:
    """Equal bit for bit on all ranks. Collective."""
    flat = torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])
    of_all = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, flat)
    return all(torch.equal(other, flat) for other in of_all)


def rows(session: Any, role: str) -> list[commpress.comm.meter.Row]:
    """The report's rows of one role."""
    return [row for row in session.report().rows if row.role == role]
