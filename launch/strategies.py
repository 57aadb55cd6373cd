"""The ways to spread the training program's model over the ranks: a class for each, all with the same methods.

`ddp` replicates the model and averages gradients, `fsdp` shards it (FSDP2), `deepspeed` does either (ZeRO 0 to 3), `local_sgd`
and `diloco` let each rank take its own steps. Each has its own content of a checkpoint: the state that all ranks share, and the
state of one rank.
"""

import contextlib
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress import optim
from commpress.launch import optimizers
from commpress.launch.model import GPT
from commpress.launch.settings import Settings

State = dict[str, Any]


class Strategy(ABC):
    """A model on all ranks, its optimizer and the session that compresses its traffic."""

    model: nn.Module
    """The module that forward goes through."""
    optimizer: torch.optim.Optimizer
    session: Any
    """The session: it has `report`, `log`, `receipt`, `state_dict`, `load_state_dict`, and most have `timeline`."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Keep gradients of backward on this rank while the block runs."""
        return contextlib.nullcontext()

    def synced(self) -> AbstractContextManager[None]:
        """Give the model the same values on all ranks while the block runs."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients; the last backward of a step sends them."""
        loss.backward()

    def clip(self, most: float) -> Tensor:
        """Clip the gradients' norm at `most`; return the norm before."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), most)

    def step(self) -> None:
        """Apply the gradients, and clear them."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    @abstractmethod
    def state(self) -> tuple[State, State]:
        """Return the state that all ranks share, and the state that only this rank has. Collective."""

    @abstractmethod
    def load(self, shared: State, own: State) -> None:
        """Restore the result of `state`, except the session, which comes last: it must know the masks. Collective."""


class Replicated(Strategy):
    """DDP: the same model on all ranks. A compressed optimizer is attached to it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, spec: str | dict[str, str]) -> None:
        self.bare, self.optimizer = model, optimizer
        self.behind = optimizer if isinstance(optimizer, optim.CompressedOptimizer) else None
        self.model = self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.session = commpress.attach(self.ddp, spec, optimizer=self.behind)

    def accumulating(self) -> AbstractContextManager[None]:
        return self.ddp.no_sync()

    def synced(self) -> AbstractContextManager[None]:
        return _synced(self.optimizer)

    def clip(self, most: float) -> Tensor:
        return _clipped(self.bare, self.optimizer, most)

    def state(self) -> tuple[State, State]:
        shared = {"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()}
        return shared, {"session": self.session.state_dict()}

    def load(self, shared: State, own: State) -> None:
        self.bare.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])


class Sharded(Strategy):
    """FSDP2: each block's parameters, gradients and optimizer state divided among the ranks."""

    def __init__(self, model: GPT, optimizer: Callable[[nn.Module], torch.optim.Optimizer], spec: str, parameters: str):
        for block in model.blocks:
            fully_shard(block)
        self.root = fully_shard(model)
        self.model = model  # the same object: fully_shard changes its class
        self.optimizer = optimizer(model)  # of the shards
        behind = self.optimizer if isinstance(self.optimizer, optim.CompressedOptimizer) else None
        self.session = commpress.attach(model, gradients=spec, parameters=parameters, optimizer=behind)

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


class Engine(Strategy):
    """DeepSpeed: its engine does backward and step, and at ZeRO 1 to 3 each rank steps a part of the parameters."""

    def __init__(
        self, model: GPT, optimizer: torch.optim.Optimizer, stage: int, batch: int, spec: str, parameters: str
    ) -> None:
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher, which it insists on
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and is for inference
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", r"`torch\.distributed", FutureWarning)  # it calls some by their older names
        config = {
            "train_micro_batch_size_per_gpu": batch,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # see `clip`
            "steps_per_print": 1 << 30,
        }
        self.bare, self.stage = model, stage
        self.model = self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.optimizer = self.engine.basic_optimizer
        # what nobody asked for is left to attach, which knows better under a compressed optimizer
        wanted = None if parameters == "none" else parameters
        self.session = commpress.attach(self.engine, spec, parameters=wanted)
        self.replicated = self.session.step_buffer is not None

    def accumulating(self) -> AbstractContextManager[None]:
        return self._accumulating()

    @contextlib.contextmanager
    def _accumulating(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def synced(self) -> AbstractContextManager[None]:
        return _synced(self.optimizer)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def clip(self, most: float) -> Tensor:
        """Let the engine's step clip a mean gradient that no rank has whole; return the norm of the step before."""
        if self.replicated:
            return _clipped(self.bare, self.optimizer, most)
        self.engine.optimizer.clip_grad = most
        return torch.tensor(
            float(self.engine.get_global_grad_norm() or 0.0), dtype=torch.float32, device=self.engine.device
        )

    def step(self) -> None:
        self.engine.step()

    def state(self) -> tuple[State, State]:
        own: State = {"session": self.session.state_dict()}
        if not self.stage:
            return {"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()}, own
        with self._at_rest() as zero:
            state = zero.state_dict()
            own["zero"] = {key: state[key] for key in ZERO_STATE if key in state}
            return {"model": self._whole()}, own

    def load(self, shared: State, own: State) -> None:
        if self.stage < 3:
            self.bare.load_state_dict(shared["model"])
        else:  # parameters are each rank's own
            for name, buffer in self.bare.named_buffers():
                buffer.copy_(shared["model"][name])
        if not self.stage:
            self.optimizer.load_state_dict(shared["optimizer"])
        else:
            with self._at_rest() as zero:
                state = {**zero.state_dict(), **own["zero"]}  # the rest is settings
                zero.load_state_dict([state] * self.session.world_size, load_from_fp32_weights=True)

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[Any]:
        """Yield the ZeRO optimizer; under ZeRO 3 each rank has only its part of a parameter while the block runs."""
        zero = self.engine.optimizer
        if self.stage == 3:
            zero.checkpoint_event_prologue()
        yield zero
        if self.stage == 3:
            zero.checkpoint_event_epilogue()

    def _whole(self) -> State:
        if self.stage < 3:
            return self.bare.state_dict()
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.bare.parameters())):
            return _copied(self.bare.state_dict())  # type: ignore[no-any-return]


ZERO_STATE = ("base_optimizer_state", "single_partition_of_fp32_groups", "optimizer_state_dict", "fp32_flat_groups")
"""Parts of a ZeRO optimizer's state that change in training, by DeepSpeed's names: two for ZeRO 1 and 2, two for ZeRO 3."""


class Local(Strategy):
    """Local steps, and an outer sync now and then. The shared state is the model after the last sync."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer, way: str, spec: str, settings: State) -> None:
        self.model, self.optimizer = model, optimizer
        self.session = self.outer = getattr(commpress, way)(model, optimizer, spec, **settings)

    def synced(self) -> AbstractContextManager[None]:
        return self.outer.synced()  # type: ignore[no-any-return]

    def state(self) -> tuple[State, State]:
        own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        own = {key: _copied(value) for key, value in own.items()} | {"session": self.outer.state_dict()}
        with self.synced():
            return {"model": _copied(self.model.state_dict())}, own

    def load(self, shared: State, own: State) -> None:
        self.model.load_state_dict(own["model"])
        self.optimizer.load_state_dict(own["optimizer"])


def _synced(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Give replicas the same values while the block runs: under 0/1 Adam they drift apart between syncs."""
    return optimizer.synced() if isinstance(optimizer, optim.ZeroOneAdamW) else contextlib.nullcontext()


def _clipped(model: nn.Module, optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Clip mean gradients. The update of a compressed optimizer is not changed."""
    if not isinstance(optimizer, optim.CompressedOptimizer) or optimizer.takes_means:
        return nn.utils.clip_grad_norm_(model.parameters(), most)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def _copied(state: Any) -> Any:
    """Return the same state with its tensors copied."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, state)


def make(model: nn.Module, settings: Settings) -> Strategy:
    """Spread a model over the ranks by --parallel, with its optimizer and its session. Collective."""
    if settings.parallel == "fsdp":
        assert isinstance(model, GPT)
        optimizer_of = partial(optimizers.make, settings=settings)
        return Sharded(model, optimizer_of, settings.spec, settings.parameter_spec)
    optimizer = optimizers.make(model, settings)
    if settings.parallel == "ddp":
        return Replicated(model, optimizer, settings.gradients)
    assert isinstance(model, GPT)
    if settings.parallel == "deepspeed":
        specs = settings.spec, settings.parameter_spec
        return Engine(model, optimizer, settings.zero_stage, settings.batch, *specs)
    outer: State = {"every": optimizers.sync_every(settings), "fragments": settings.fragments, "delay": settings.delay}
    if settings.parallel == "diloco":
        outer |= {"lr": settings.outer_lr, "momentum": settings.outer_momentum}
    return Local(model, optimizer, settings.parallel, settings.spec, outer)
