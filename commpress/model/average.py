"""An exponential moving average of the weights (Polyak and Juditsky, 1992), under the masks and quantisers of a recipe:

    average <- decay * average + (1 - decay) * weights,    0 where a weight is pruned

It is no second model: while a `with` block lasts, the averages are in the parameters. So quantisers, ranges of inputs and
other buffers are the model's own, also sharded or compiled, and all that takes the model takes the average.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from commpress.model import layers
from commpress.model.held import local
from commpress.model.schedule import Scheduler

NARROW = (torch.float16, torch.bfloat16)
"""Dtypes in which a step of an average would be rounded away; it is of float32 then."""


class Average:
    """The averages of the parameters of a scheduler's model, which start as those are now.

        average = Average(scheduler, decay=0.999)
        ...
        optimizer.step()
        scheduler.step()
        average.update()
        ...
        with average as model:
            export(model, ...)

    All ranks have the same one where they have the same weights; of sharded parameters each has its part. Raises ValueError
    for a decay below 0 or not below 1, and under ZeRO 3.
    """

    def __init__(self, scheduler: Scheduler, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Average(decay={decay}): expected 0 or more, and less than 1")
        if scheduler.is_gathered:
            raise ValueError(
                "Average: under ZeRO 3 no rank has the parameters between two steps: expected ZeRO 0 to 2, DDP or FSDP2"
            )
        self.decay = decay
        self._scheduler = scheduler
        self._shard()
        found = layers.named_parameters(scheduler.model)
        self._parameters = {name: p for name, p in found.items() if p.is_floating_point() or p.is_complex()}
        self._averages = {name: _copy(p) for name, p in self._parameters.items()}
        self._weights: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights. Call it after each `scheduler.step()`. Raises RuntimeError within the
        block."""
        if self._weights is not None:
            raise RuntimeError("Average.update: the averages are in the model now; call it after the `with` block")
        averages = {name: local(x) for name, x in self._averages.items()}
        weights = [local(self._parameters[name]).to(x.dtype) for name, x in averages.items()]
        get_ema_multi_avg_fn(self.decay)([*averages.values()], weights, 0)
        self._scheduler.masks.apply_to(averages)

    @torch.no_grad()
    def __enter__(self) -> nn.Module:
        """Put the averages into the model's parameters, and return the model. Raises RuntimeError if they are there already."""
        if self._weights is not None:
            raise RuntimeError("Average: the averages are in the model already")
        self._shard()
        self._scheduler.masks.apply_to({name: local(x) for name, x in self._averages.items()})
        self._weights = {name: local(p).detach().clone() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            local(p).copy_(local(self._averages[name]))
        return self._scheduler.model

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        """Put back the weights, bit for bit."""
        assert self._weights is not None
        self._shard()
        for name, weight in self._weights.items():
            local(self._parameters[name]).copy_(weight)
        self._weights = None

    def state_dict(self) -> dict[str, Any]:
        """The averages by the parameters' names, float32 or wider; DTensors where parameters are."""
        return {"averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises ValueError, with nothing changed, for other parameters or shapes, RuntimeError within the block.
        """
        if self._weights is not None:
            raise RuntimeError(
                "Average.load_state_dict: the averages are in the model now; call it after the `with` block"
            )
        saved = state["averages"]
        if saved.keys() != self._averages.keys():
            others = ", ".join(sorted(saved.keys() ^ self._averages.keys()))
            raise ValueError(f"cannot restore an average: {others} are parameters on one side only")
        for name, x in self._averages.items():
            if saved[name].shape != x.shape:
                raise ValueError(
                    f"cannot restore an average: {name!r} was {tuple(saved[name].shape)}, here it is {tuple(x.shape)}"
                )
        for name, x in self._averages.items():
            x.copy_(saved[name])

    def _shard(self) -> None:
        """Let FSDP2 shard what an evaluation has left whole: it would go on with what is gathered."""
        self._scheduler.model.state_dict(keep_vars=True)


def _copy(p: Tensor) -> Tensor:
    return p.detach().float() if p.dtype in NARROW else p.detach().clone()
