"""DistributedDataParallel, by its communication hook.

DDP calls the hook in backward, in the order of the buckets, the same on every rank; it hands over a flat gradient of one
dtype that the hook must replace by its mean, and waits for all futures before backward returns. It calls nothing under
`no_sync`. After the first backward it lays its buckets out anew. A hook cannot be taken off or replaced.
"""

import contextlib
import time
import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commpress.comm.agreement import require_agreement
from commpress.comm.codecs import Codec
from commpress.comm.feedback import Segments
from commpress.comm.notice import speaks
from commpress.comm.session import GradScaler, Session
from commpress.hooks.broadcast import attach_buffers, buffer_broadcasts
from commpress.optim.advice import advise
from commpress.optim.base import CompressedOptimizer


class CommState:
    """State for `ddp.register_comm_hook(CommState("int4"), comm_hook)`. `session` is there after the first backward.

    `group` is the process group that the DDP module was given (default: the default group). The first backward compares
    the ranks' specs and compiles the loops; `attach` does both beforehand and knows the parameters' names, so prefer it.
    """

    def __init__(
        self,
        spec: str | Codec,
        group: dist.ProcessGroup | None = None,
        *,
        exchange: str | None = None,
        error_feedback: bool = True,
        grad_scaler: GradScaler | None = None,
    ) -> None:
        self.session: Session | None = None
        self._names: dict[Tensor, str] = {}
        self._optimizer: CompressedOptimizer | None = None
        self._binding: object = None
        self._arguments = (spec, group, exchange, error_feedback, grad_scaler)

    def start(
        self, device: torch.device, names: dict[Tensor, str], optimizer: CompressedOptimizer | None = None
    ) -> Session:
        """Make the session. Collective."""
        spec, group, exchange, error_feedback, grad_scaler = self._arguments
        self._names, self._optimizer = names, optimizer
        self._binding = None if optimizer is None else optimizer.binding
        self.session = Session(
            spec,
            group or dist.distributed_c10d._get_default_group(),
            device,
            exchange=exchange,
            error_feedback=error_feedback,
            grad_scaler=grad_scaler,
            parameters=tuple((name, p.numel()) for p, name in names.items()),
            optimizer=optimizer,
        )
        return self.session

    def follow(self, last: bool) -> None:
        """For the optimizer: a bucket of its backward is there. Raises RuntimeError if it serves another module by now."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        if optimizer.binding is not self._binding:
            raise RuntimeError(
                f"commpress: this DDP module's {type(optimizer).__name__} was attached to another DDP module since; expected "
                "that one to be trained, or an optimizer of its own for each"
            )
        if last:
            told = partial(optimizer.gradients_are_there, scaled=self._arguments[-1] is not None)
            # DDP hands the gradients out in a callback that it queues behind this one: ours comes behind that
            engine = torch.autograd.Variable._execution_engine
            with contextlib.suppress(RuntimeError):  # a compiled backward has no callbacks
                engine.queue_callback(lambda: engine.queue_callback(told))

    def segments(self, parameters: list[Tensor]) -> Segments:
        """Names and sizes of a bucket's parameters; without a model they are numbered in the order of their first use."""
        for p in parameters:
            self._names.setdefault(p, f"parameter {len(self._names)}")
        return tuple((self._names[p], p.numel()) for p in parameters)


def comm_hook(state: CommState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """The hook: the bucket's mean over the ranks, compressed."""
    gradient = bucket.buffer()
    session = state.session or state.start(gradient.device, {})
    state.follow(bucket.is_last())
    return session.submit(gradient, state.segments(bucket.parameters()), bucket.index(), bucket.is_last())


def attach(
    model: DistributedDataParallel,
    spec: str | Codec,
    *,
    optimizer: CompressedOptimizer | None = None,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: GradScaler | None = None,
    buffers: str | Codec | None = None,
) -> Session:
    """Register the hook on `model` and return its session. Collective over the model's process group.

    `optimizer` is one of `commpress.optim`: what it is about to apply travels instead of the gradient. Leave it out for others.
    `exchange` names one of `two_shot`, `all_gather`, `all_reduce` instead of the codec's own choice. `grad_scaler` is the
    `torch.amp.GradScaler` of the run, if there is one: what feedback keeps follows its scale, and with `optimizer` a step that
    it skips moves no state. `buffers` is a spec for the buffers that DDP broadcasts before each forward; without one DDP sends
    them, uncounted. Raises ValueError on all ranks if a spec is unknown or the ranks differ or the optimizer holds
    other parameters than the model trains, TypeError for sparse embeddings and for optimizers of other kinds,
    RuntimeError if the model already has a hook.
    """
    names: dict[Tensor, str] = {p: name for name, p in _trained(model)}
    if not names:
        raise ValueError(
            "commpress.attach: this DistributedDataParallel exchanges no gradients: it ignores or delays all of them"
        )
    device = next(iter(names)).device
    refusal = _refusal(model, names, optimizer)
    if refusal is not None:
        with contextlib.suppress(ValueError):  # what the other ranks raise
            require_agreement({"error": str(refusal)}, model.process_group, device)
        raise refusal
    state = CommState(
        spec,
        model.process_group,
        exchange=exchange,
        error_feedback=error_feedback,
        grad_scaler=grad_scaler,
    )
    session = state.start(device, names, optimizer)
    if optimizer is not None:
        optimizer.hand_over(session)
    session.layouts = {name: (p.shape, p.stride()) for p, name in names.items()}
    # what may fail comes before the hook, which DDP would keep
    broadcasts = None if buffers is None else buffer_broadcasts(model, buffers)
    try:
        model.register_comm_hook(state, comm_hook)
    except RuntimeError:
        state.session = None  # DDP keeps the state that it refuses; the threads shall end all the same
        raise
    if broadcasts is not None:
        attach_buffers(model, broadcasts)
        session.beside.append(broadcasts)
    _watch(model, session)
    if optimizer is None:
        advise(session.plan.codec, set(names), speaks(model.process_group))
    return session


def _refusal(
    model: DistributedDataParallel, names: dict[Tensor, str], optimizer: CompressedOptimizer | None
) -> Exception | None:
    """Why this rank cannot attach, if it cannot."""
    if getattr(model, "_comm_hooks", None):
        return RuntimeError(
            "commpress.attach: this DistributedDataParallel has a communication hook already, which cannot be replaced; "
            "expected one without: attach once, or wrap the module anew"
        )
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            return TypeError(
                f"{name}: {type(module).__name__}(sparse=True) has sparse gradients, expected sparse=False"
            )
    if optimizer is None:
        return None
    if not isinstance(optimizer, CompressedOptimizer):
        return TypeError(
            f"optimizer: expected one of commpress.optim, got {type(optimizer).__name__}; others take what arrives "
            "in p.grad, leave optimizer= out for them"
        )
    try:
        world_size = dist.get_world_size(model.process_group)
        may_be_unused = model.find_unused_parameters or model.static_graph
        optimizer.bind(
            {name: p for p, name in names.items()},
            world_size,
            may_be_unused,
            may_be_frozen=model.find_unused_parameters and not model.static_graph,
            speaks=speaks(model.process_group),
        )
    except ValueError as error:
        return error
    return None


def _watch(model: DistributedDataParallel, session: Session) -> None:
    """Tell the session's timeline of forward and of the start of backward."""
    started = [0.0]
    told = weakref.ref(session)  # the model must not keep the session's threads alive

    def before(module: nn.Module, arguments: Any) -> None:
        started[0] = time.perf_counter()

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        session = told()
        if session is not None and session.recording:
            session.note("forward", started[0])
            if (tensor := _differentiable(output)) is not None:
                tensor.register_hook(lambda gradient: session.backward_starts())

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


def _differentiable(output: Any) -> Tensor | None:
    """The first tensor in a model's output that backward can start from."""
    if isinstance(output, Tensor):
        return output if output.requires_grad else None
    inside = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for part in inside if (found := _differentiable(part)) is not None), None)


def _trained(model: DistributedDataParallel) -> list[tuple[str, Any]]:
    """What DDP exchanges: what it does not ignore or delay, and what required a gradient when it was wrapped."""
    candidates = [(n, p) for n, p in model.module.named_parameters() if n not in model.parameters_to_ignore]
    if all(p.requires_grad for _, p in candidates):
        return candidates
    buckets = model.reducer._get_zeros_like_grad_buckets()
    exchanged = {p for bucket in buckets for p in bucket.parameters()}
    return [(name, p) for name, p in candidates if p in exchanged]
