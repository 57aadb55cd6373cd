"""Hugging Face Accelerate, by the hook of the DDP module that `prepare` makes.

`accelerator.prepare` wraps the model in DistributedDataParallel, and the optimizer in one that steps only where gradients are
exchanged. `accelerator.scaler` exists under fp16. `save_state` calls its hooks on every rank before it writes. Rank 0 alone
writes the objects that are registered for checkpointing, and all ranks read them, after model and optimizer.
`accelerator.step` is 0 at the end of every epoch and cannot tell checkpoints apart, so rank 0 draws a random number that all
files of one checkpoint share.
"""

import contextlib
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commpress.comm.codecs import AUTO
from commpress.comm.rules import Spec
from commpress.comm.session import Session
from commpress.hooks import ddp, rank_checkpoint
from commpress.hooks.parameters import uncompiled

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach(
    accelerator: "Accelerator",
    model: nn.Module,
    gradients: Spec = AUTO,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: Any,
) -> Session:
    """Compress the gradients of a prepared model. `save_state` and `load_state` keep the session, one file a rank.

    `model` is what `accelerator.prepare` returned, compiled or not; `optimizer` is one of `commpress.optim`, prepared or not.
    Without `gradients` a spec is found during training. The accelerator's GradScaler is used if it has one. All other settings
    are those of `commpress.hooks.ddp.attach`.
    Collective. Raises TypeError for a model that is not in a DistributedDataParallel, and the errors of
    `commpress.hooks.ddp.attach`.
    """
    wrapped = prepared(accelerator, model)
    session = ddp.attach(wrapped, gradients, optimizer=inner(optimizer), grad_scaler=accelerator.scaler, **settings)
    _Checkpoint(accelerator, session, wrapped).register()
    return session


def prepared(accelerator: "Accelerator", model: nn.Module) -> DistributedDataParallel:
    """Return the DDP module inside the model that `accelerator.prepare` returned. Raises TypeError if there is none."""
    wrapped = uncompiled(model)  # torch.compile comes last
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped
    kind = accelerator.distributed_type.value
    why = f"Accelerate runs as {kind}"
    if kind == "NO":
        why = (
            "Accelerate sees one process: start it by accelerate launch or torchrun, and on CPU say so "
            "(Accelerator(cpu=True), TrainingArguments(use_cpu=True))"
        )
    raise TypeError(
        f"commpress: expected the DistributedDataParallel that accelerator.prepare makes of a model, got "
        f"{type(wrapped).__name__}. {why}"
    )


def inner(optimizer: Any) -> Any:
    """Return the optimizer inside an AcceleratedOptimizer; any other optimizer as it is."""
    return getattr(optimizer, "optimizer", optimizer)


@contextlib.contextmanager
def unwrapped_forward(model: nn.Module) -> Iterator[None]:
    """The model with the forward from before Accelerate put autocast around it: its files are float32, as its weights."""
    mixed, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if mixed is None or own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = mixed


class _Checkpoint:
    """A session as an object that an accelerator checkpoints: writes one file a rank and reads it back."""

    def __init__(self, accelerator: "Accelerator", session: Session, model: DistributedDataParallel) -> None:
        self._accelerator, self._session, self._group = accelerator, session, model.process_group
        place = sum(isinstance(other, _Checkpoint) for other in accelerator._custom_objects)
        self._name = f"commpress-{place}" if place else "commpress"
        self._folder = ""
        self._stamp = 0

    def register(self) -> None:
        """Register with the accelerator, which calls `load_state_dict` last, after it has loaded model and optimizer."""
        self._accelerator.register_save_state_pre_hook(self._save)
        self._accelerator.register_load_state_pre_hook(self._remember)
        self._accelerator.register_for_checkpointing(self)

    def _save(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        drawn = torch.tensor([secrets.randbelow(2**62)], dtype=torch.int64, device=self._session.device)
        dist.broadcast(drawn, dist.get_global_rank(self._group, 0), group=self._group)
        self._stamp = int(drawn)
        rank_checkpoint.save(self._session, folder, self._stamp, self._name)

    def _remember(self, models: list[nn.Module], folder: str) -> None:
        self._folder = folder

    def state_dict(self) -> dict[str, Any]:
        """Return the entry that rank 0 writes for all ranks: the files' name and their common number."""
        return {"files": self._name, "step": self._stamp}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read this rank's file. Collective."""
        if not rank_checkpoint.load(self._session, self._group, self._folder, state["step"], state["files"]):
            raise ValueError(f"cannot restore: no {state['files']}-rank*.pt in {self._folder}")
