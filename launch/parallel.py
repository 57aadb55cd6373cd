"""How the training program's model is spread over the ranks: one class a way, all with the same face.

`ddp` replicates the model and averages gradients, `fsdp` shards it (FSDP2), `local_sgd` and `diloco` let each rank take
steps of its own. What a checkpoint must hold differs with them: what all ranks share, and what one rank alone has.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress import optim
from commpress.launch.model import GPT

State = dict[str, Any]


class Spread(ABC):
    """A model on all ranks, its optimizer and the session that compresses its traffic."""

    model: nn.Module
    """What forward goes through."""
    optimizer: torch.optim.Optimizer
    session: Any
    """Has `report`, `state_dict`, `load_state_dict`, and most have `timeline`."""

    def accumulating(self) -> AbstractContextManager[None]:
        """While the block runs, backward keeps its gradients on this rank."""
        return contextlib.nullcontext()

    def alike(self) -> AbstractContextManager[None]:
        """While the block runs, the model has the same values on all ranks."""
        return contextlib.nullcontext()

    def clip(self, most: float) -> Tensor:
        """Clip the gradients' norm at `most`; returns what it was."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), most)

    @abstractmethod
    def state(self) -> tuple[State, State]:
        """What all ranks share, and what this one alone has. Collective."""

    @abstractmethod
    def load(self, shared: State, own: State) -> None:
        """Restore what `state` returned. Collective."""


class Replicated(Spread):
    """DDP: the same model on all ranks. A compressed optimizer is told of it."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer, spec: str) -> None:
        self.bare, self.optimizer = model, optimizer
        self.behind = optimizer if isinstance(optimizer, optim.CompressedOptimizer) else None
        self.model = self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.session = commpress.attach(self.ddp, spec, optimizer=self.behind)

    def accumulating(self) -> AbstractContextManager[None]:
        return self.ddp.no_sync()

    def alike(self) -> AbstractContextManager[None]:
        if isinstance(self.optimizer, optim.ZeroOneAdamW):  # under it the ranks drift apart between syncs
            return self.optimizer.synced()
        return contextlib.nullcontext()

    def clip(self, most: float) -> Tensor:
        """What a compressed optimizer is about to apply is left as it is."""
        if self.behind is None or self.behind.takes_means:
            return super().clip(most)
        return nn.utils.get_total_norm([p.grad for p in self.bare.parameters() if p.grad is not None])

    def state(self) -> tuple[State, State]:
        shared = {"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()}
        return shared, {"session": self.session.state_dict()}

    def load(self, shared: State, own: State) -> None:
        self.bare.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.session.load_state_dict(own["session"])


class Sharded(Spread):
    """FSDP2: each block's parameters, gradients and optimizer state divided among the ranks."""

    def __init__(self, model: GPT, optimizer: Callable[[nn.Module], torch.optim.Optimizer], spec: str, parameters: str):
        for block in model.blocks:
            fully_shard(block)
        self.root = fully_shard(model)
        self.model = model  # the same object: fully_shard changes its class
        self.optimizer = optimizer(model)  # of the shards
        self.session = commpress.attach(model, gradients=spec, parameters=parameters)

    def accumulating(self) -> AbstractContextManager[None]:
        return self._accumulating()

    @contextlib.contextmanager
    def _accumulating(self) -> Iterator[None]:
        self.root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.root.set_requires_gradient_sync(True)

    def clip(self, most: float) -> Tensor:
        norm = super().clip(most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state(self) -> tuple[State, State]:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=whole)
        return {"model": model, "optimizer": optimizer}, {"session": self.session.state_dict()}

    def load(self, shared: State, own: State) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=shared["model"],
            optim_state_dict=shared["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.session.load_state_dict(own["session"])


class Local(Spread):
    """Local steps, and an outer sync now and then. The shared state is the model as all ranks know it."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer, way: str, spec: str, settings: State) -> None:
        self.model, self.optimizer = model, optimizer
        self.session = self.outer = getattr(commpress, way)(model, optimizer, spec, **settings)

    def alike(self) -> AbstractContextManager[None]:
        return self.outer.synced()  # type: ignore[no-any-return]

    def state(self) -> tuple[State, State]:
        own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        own = {key: _copied(value) for key, value in own.items()} | {"session": self.outer.state_dict()}
        with self.alike():
            return {"model": _copied(self.model.state_dict())}, own

    def load(self, shared: State, own: State) -> None:
        self.model.load_state_dict(own["model"])
        self.optimizer.load_state_dict(own["optimizer"])
        self.outer.load_state_dict(own["session"])


def _copied(state: Any) -> Any:
    """The same, its tensors copied."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, state)


WAYS = ("ddp", "fsdp", "local_sgd", "diloco")
