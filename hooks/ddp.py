"""DistributedDataParallel, by its communication hook.

DDP calls the hook in backward, bucket by bucket, in the same order on every rank. Each call gets a flat gradient of one dtype
([n]) and returns a future of its mean; DDP waits for all futures before backward returns. Under `no_sync` it calls nothing.
After the first backward it rebuilds its buckets. A hook cannot be removed or replaced.

A module that is copied or unpickled keeps the hooks of its forward, but not this one: its gradients are sent uncompressed.
"""

import contextlib
import time
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commpress.comm.agreement import refuse_on_all, require_agreement
from commpress.comm.codecs import AUTO, Codec
from commpress.comm.collectives import GradScaler
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.meter import dtype_name
from commpress.comm.parameters import bare_name, unfit_dtype
from commpress.comm.replicas import replicas_session
from commpress.comm.rules import Spec, open_refusal
from commpress.comm.segments import Segment, Segments
from commpress.comm.session import Session
from commpress.comm.step_buffer import StepBuffer
from commpress.comm.verify import EVERY
from commpress.hooks.broadcast import attach_buffers, buffer_broadcasts, buffer_refusal
from commpress.hooks.parameters import delayed_parameters, exchanged_parameters, not_taken
from commpress.notice import speaks, warn
from commpress.optim.advice import advise
from commpress.optim.base import CompressedOptimizer


class CommState:
    """State for `ddp.register_comm_hook(CommState("int4"), comm_hook)`. `session` exists after the first backward.

    `group` is the process group of the DDP module (default: the default group). The first backward compares the ranks' specs
    and compiles the loops. `attach` does both beforehand and knows the parameters' names, so prefer it.

    A copy, pickled or not, holds only the settings. Registered on a module of the default group, it starts a session of its
    own. DDP does not register it in a copy of the module: the copy's gradients are sent uncompressed, and a copy of an
    attached model warns.
    """

    def __init__(
        self,
        spec: Spec,
        group: dist.ProcessGroup | None = None,
        *,
        exchange: str | None = None,
        error_feedback: bool = True,
        grad_scaler: GradScaler | None = None,
        verify: int = EVERY,
    ) -> None:
        self.session: Session | None = None
        self._buckets: StepBuffer | None = None
        self._names: dict[Tensor, str] = {}
        self._layouts: dict[tuple[int, ...], Segments] = {}
        """The segments of each bucket so far, by the ids of its parameters, which `_names` keeps alive."""
        self._optimizer: CompressedOptimizer | None = None
        self._binding: object = None
        self._arguments = (spec, group, exchange, error_feedback, grad_scaler, verify)
        self._lost: str | None = None
        """In a copy: the names of those arguments that could not be copied, "" if all could. None if this is not a copy."""

    def __getstate__(self) -> dict[str, Any]:
        spec, group, exchange, error_feedback, grad_scaler, verify = self._arguments
        lost = [] if group is None or _is_default(group) else ["process group"]
        lost += [] if grad_scaler is None else ["grad_scaler"]
        return {"arguments": (spec, None, exchange, error_feedback, None, verify), "lost": " and ".join(lost)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.session, self._buckets, self._names, self._layouts = None, None, {}, {}
        self._optimizer, self._binding = None, None
        self._arguments, self._lost = state["arguments"], state["lost"]

    def start(
        self, device: torch.device, names: dict[Tensor, str], optimizer: CompressedOptimizer | None = None
    ) -> Session:
        """Make the session. Collective. Raises RuntimeError for a copy that lacks something."""
        spec, group, exchange, error_feedback, grad_scaler, verify = self._arguments
        if self._lost:
            raise RuntimeError(
                f"this CommState is a copy, without the {self._lost} of the one it was copied from: make a new "
                f"CommState({str(spec)!r}, ...), or call commpress.attach"
            )
        self._names, self._optimizer = names, optimizer
        self._binding = None if optimizer is None else optimizer.binding
        self.session = replicas_session(
            spec,
            group or dist.distributed_c10d._get_default_group(),
            device,
            exchange=exchange,
            error_feedback=error_feedback,
            grad_scaler=grad_scaler,
            parameters=tuple(Segment.whole(name, p) for p, name in names.items()),
            layouts={name: (p.shape, p.stride()) for p, name in names.items()},
            optimizer=optimizer,
            verify=verify,
            dtypes={p.dtype for p in names if not p.is_complex()},
        )
        replica = (lambda p: p) if optimizer is None else optimizer.replica
        self._buckets = self.session.step_buffer
        assert self._buckets is not None
        self._buckets.replicas = lambda: [(name, replica(p)) for p, name in names.items()]
        self._buckets.collectives.pairs.update(name for p, name in names.items() if p.is_complex())
        if self._lost is not None:
            warn(
                "commpress: this CommState is a copy: its session starts anew, with nothing that feedback had kept. Load "
                "what session.state_dict() saved on each rank, if it shall go on",
                self.session.rank == 0,
            )
        return self.session

    def buckets(self, device: torch.device) -> StepBuffer:
        """Return the step buffer that takes this rank's buckets. The first call makes the session if there is none."""
        if self._buckets is None:
            self.start(device, {})
        assert self._buckets is not None
        return self._buckets

    def follow(self, last: bool) -> None:
        """Tell the optimizer that a bucket has come. For hooks. Raises RuntimeError if it now serves another module."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        if optimizer.binding is not self._binding:
            raise RuntimeError(
                f"commpress: this DDP module's {type(optimizer).__name__} has been attached to another DDP module since; "
                "train that one, or give each its own optimizer"
            )
        if last:
            told = partial(optimizer.gradients_are_there, scaled=self._arguments[4] is not None)
            # DDP writes `grad` in a callback that it queues after this one: a callback queued from there runs after DDP's
            engine = torch.autograd.Variable._execution_engine
            with contextlib.suppress(RuntimeError):  # a compiled backward has no callbacks
                engine.queue_callback(lambda: engine.queue_callback(told))

    def segments(self, parameters: list[Tensor]) -> Segments:
        """Return the names and sizes of a bucket's parameters. Without a model they are numbered in order of first use."""
        ids = tuple(map(id, parameters))
        if (known := self._layouts.get(ids)) is not None:
            return known
        for p in parameters:
            if p not in self._names:
                self._names[p] = f"parameter {len(self._names)}"
            if p.is_complex() and self._buckets is not None:
                self._buckets.collectives.pairs.add(self._names[p])
        found = self._layouts[ids] = tuple(Segment.whole(self._names[p], p) for p in parameters)
        return found


def comm_hook(state: CommState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Exchange a bucket compressed: the hook for `register_comm_hook`.

    Returns a future of the mean over the ranks: [n], in the bucket's dtype.
    """
    gradient = bucket.buffer()
    buckets = state.buckets(gradient.device)
    state.follow(bucket.is_last())
    return buckets.submit(gradient, state.segments(bucket.parameters()), bucket.index(), bucket.is_last())


def attach(
    model: DistributedDataParallel,
    gradients: Spec = AUTO,
    *,
    parameters: str | Codec | None = None,
    buffers: str | Codec | None = None,
    optimizer: CompressedOptimizer | None = None,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: GradScaler | None = None,
    verify: int = EVERY,
) -> Session:
    """Register the hook on `model` and return its session. Collective over the model's process group.

    Without `gradients` a spec is found during training. The first steps are not compressed; then `none`, `bf16`, `int8` and
    `int4` are tried in turns of a few steps, as far as they may pay, and the medians of all ranks decide. When the steps
    drift, the search starts again (`session.explain()`, `session.receipt()`). Timing then decides which bits a run has. A dict
    holds specs by patterns of names, `{"*embed*": "int8", "*.bias": "none", "*": "auto"}`: the first pattern that fits
    decides.

    `optimizer` is one of `commpress.optim`: its update is sent in place of the gradient. Leave it out for other optimizers.
    Without a spec, `auto` chooses among the optimizer's own specs after its warm-up, and chooses how often ZeroOneAdamW syncs.
    `exchange` overrides the codec's own choice: `two_shot`, `one_shot`, `all_reduce` or `hierarchical` (dense inside a node of
    LOCAL_WORLD_SIZE ranks; `hierarchical(8)` for nodes of 8). `grad_scaler` is the run's `torch.amp.GradScaler`, if it has
    one: the residuals follow its scale, and a step that it skips changes no state of `optimizer`.

    `buffers` is the spec of the buffers that DDP broadcasts before each forward; without it DDP sends them itself, uncounted.
    Every `verify` steps (0: never) the ranks compare hashes of the means and of their parameters; a replica that has drifted
    is an error that names it. Parameters that DDP ignores are left alone. Parameters that DDP delays are sent by DDP,
    uncompressed, and the report says so. A copy of `model`, pickled or not, has no session: its gradients are sent
    uncompressed, and it warns in its first backward.

    Raises ValueError on all ranks if a spec is unknown, the ranks differ, the optimizer holds other parameters than the model
    trains or complex ones, or there is nothing to exchange; TypeError for sparse embeddings and for optimizers of other kinds;
    RuntimeError if the model already has a hook.
    """
    hooks = getattr(model, "_comm_hooks", [])
    hooks[:] = [pair for pair in hooks if not is_copy(pair[1])]  # a copied module lists hooks that DDP never registered
    names: dict[Tensor, str] = {p: name for name, p in exchanged_parameters(model).items()}
    device = next(model.module.parameters()).device
    refusal = not_taken("parameters", parameters, "DistributedDataParallel sends none")
    refusal = refusal or (None if buffers is None else buffer_refusal(model, buffers))
    refusal = refusal or open_refusal(gradients, optimizer, exchange, error_feedback)
    refusal = refusal or _refusal(model, names, optimizer)  # also binds the optimizer, if nothing is refused
    if refusal is not None:
        refuse_on_all(refusal, model.process_group, device)
    require_agreement({"buffers": "dense" if buffers is None else "compressed"}, model.process_group, device)
    state = CommState(
        gradients,
        model.process_group,
        exchange=exchange,
        error_feedback=error_feedback,
        grad_scaler=grad_scaler,
        verify=verify,
    )
    session = state.start(device, names, optimizer)
    if optimizer is not None:
        assert session.step_buffer is not None
        optimizer.hand_over(session.step_buffer)
    # calls that may fail come first: DDP keeps a hook once it is registered
    broadcasts = None if buffers is None else buffer_broadcasts(model, buffers)
    try:
        model.register_comm_hook(state, comm_hook)
    except RuntimeError:
        state.session = state._buckets = None  # DDP keeps the state even if it refuses the hook; the threads must end
        raise
    if broadcasts is not None:
        attach_buffers(model, broadcasts)
        session.side_traffic.append(broadcasts)
    _watch(model, session)
    _count_delayed(model, session)
    if optimizer is None:
        rules = None if session.step_buffer is None else session.step_buffer.rules
        for codec in {session.collectives[0].gradients.codec} if rules is None else rules.lossy:
            ours = {p for p, name in names.items() if rules is None or rules.last(name) == codec}
            advise(codec, ours, speaks(model.process_group))
    return session


def _refusal(
    model: DistributedDataParallel, names: dict[Tensor, str], optimizer: CompressedOptimizer | None
) -> Exception | None:
    """Return the error if this rank cannot attach, else None. Binds the optimizer."""
    if getattr(model, "_comm_hooks", None):
        return RuntimeError(
            "commpress.attach: this DistributedDataParallel has a communication hook already, which cannot be replaced; "
            "expected one without: attach once, or wrap the module anew"
        )
    if not names:
        return ValueError("commpress.attach: DDP ignores or delays every trained parameter, and gives the hook nothing")
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight in names:
            return TypeError(
                f"{bare_name(name)}: {type(module).__name__}(sparse=True) has sparse gradients, expected sparse=False"
            )
    if unfit := unfit_dtype({name: p for p, name in names.items()}):
        return ValueError(unfit)
    if optimizer is None:
        return None
    if not isinstance(optimizer, CompressedOptimizer):
        return TypeError(
            f"optimizer: expected one of commpress.optim, got {type(optimizer).__name__}; others use p.grad as it is, leave "
            "optimizer= out for them"
        )
    for p, name in names.items():
        if p.is_complex():
            return ValueError(
                f"parameter {name!r} is {dtype_name(p.dtype)}, {type(optimizer).__name__} steps real ones; expected a torch "
                "optimizer, and no optimizer="
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


# Forward hooks. Copies of the module have them, too: they are module-level functions, so pickle finds them by name, and they
# hold no reference to a session.


@dataclass
class _Attached:
    """The record of an attached module: a weak reference to its session, and when its forward started (perf_counter seconds).

    `met`: the ranks have agreed that they begin to train at the same point.
    """

    session: "weakref.ref[Session]"
    forward_started: float = 0.0
    met: bool = False


_attached: "weakref.WeakKeyDictionary[nn.Module, _Attached]" = weakref.WeakKeyDictionary()
_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Copies that have warned that they are copies."""


def _watch(model: DistributedDataParallel, session: Session) -> None:
    """Record the forward and the start of backward in the session's timeline."""
    _attached[model] = _Attached(weakref.ref(session))
    if _before_forward not in model._forward_pre_hooks.values():  # a copy that is attached has them
        model.register_forward_pre_hook(_before_forward)
        model.register_forward_hook(_behind_forward)


def _before_forward(module: nn.Module, arguments: Any) -> None:
    attached = _attached.get(module)
    session = None if attached is None else attached.session()
    if attached is None or session is None:
        return
    if session.step_buffer is not None and session.step_buffer.recording:
        attached.forward_started = time.perf_counter()
    if not attached.met and not torch.compiler.is_compiling() and _waits_for_buffers(module):
        attached.met = True
        session.agree({}, "the first forward")


def _waits_for_buffers(module: Any) -> bool:
    """Whether all ranks wait for rank 0's buffers in this forward, up to the timeout of DDP's group.

    A rank that restores a state instead must be noticed before that wait.
    """
    joins = getattr(module, "_join_config", None)  # not public; under `join` a rank may have no forward
    alike = module.training and torch.is_grad_enabled() and not (joins is not None and joins.enable)
    return alike and bool(module.will_sync_module_buffers())


def _behind_forward(module: nn.Module, arguments: Any, output: Any) -> None:
    attached = _attached.get(module)
    if attached is None:
        if module not in _warned and (tensor := _differentiable(output)) is not None:
            tensor.register_hook(partial(_say_copy, weakref.ref(module)))
        return
    session = attached.session()
    buckets = None if session is None else session.step_buffer
    if buckets is not None and buckets.recording:
        buckets.note("forward", attached.forward_started)
        if (tensor := _differentiable(output)) is not None:
            tensor.register_hook(lambda gradient: buckets.backward_starts())


def _say_copy(of: "weakref.ref[nn.Module]", gradient: Tensor) -> None:
    """Warn on rank 0, once for each copy that is trained, that it is a copy."""
    module = of()
    if not isinstance(module, DistributedDataParallel) or module in _warned:
        return
    _warned.add(module)
    warn(
        "commpress: this DistributedDataParallel is a copy of one that was attached. It has no session, so its gradients "
        "are sent uncompressed: call commpress.attach(copy, spec) before it is trained, or copy model.module",
        speaks(module.process_group),
    )


def _count_delayed(model: DistributedDataParallel, session: Session) -> None:
    """Count the bytes of delayed parameters: DDP sends all of them in every backward, also under `no_sync`."""
    delayed = [p for p in delayed_parameters(model) if p.requires_grad]
    flat = getattr(model, "_delay_grad_buffer", None)  # not public
    if not delayed or flat is None:
        return
    told = weakref.ref(session)
    n, dtype, crossing = flat.numel(), dtype_name(flat.dtype), ring_bytes(flat.nbytes, session.world_size)

    def count(gradient: Tensor) -> None:
        if (session := told()) is not None:
            why = "delayed: DDP sends it by itself"
            session.collectives[0].meter.record_uncompressed(0, n, dtype, "all_reduce", why, "gradients", crossing)

    delayed[0].register_hook(torch.utils.hooks.unserializable_hook(count))


def _differentiable(output: Any) -> Tensor | None:
    """Return the first tensor in a model's output that requires a gradient; None if there is none."""
    if isinstance(output, Tensor):
        return output if output.requires_grad else None
    inside = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for part in inside if (found := _differentiable(part)) is not None), None)


def is_copy(state: object) -> bool:
    """Whether `state` is a copy of a CommState, and has not started a session of its own."""
    return isinstance(state, CommState) and state.session is None and state._lost is not None


def _is_default(group: dist.ProcessGroup) -> bool:
    return dist.is_initialized() and group is dist.distributed_c10d._get_default_group()
