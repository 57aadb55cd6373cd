"""The base of all compressed optimizers: a session calls them for every bucket, and they step on the exchanged values.

Parameters that no session exchanges, such as those that DDP ignores, step as under torch's optimizer. A parameter that does not
require a gradient does not move, and its state does not change until it requires one again.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.feedback import Feedback
from commpress.comm.masks_index import MaskIndex
from commpress.comm.optimizer_hooks import Candidate
from commpress.comm.parameters import dense
from commpress.comm.plan import DENSE, Override
from commpress.comm.segments import Segment, Segments, sizes
from commpress.comm.step_buffer import StepBuffer
from commpress.optim import loops
from commpress.optim.gradient_watch import GradientWatch
from commpress.optim.norm import norm_of
from commpress.optim.settings import plain, require_in_range
from commpress.optim.with_session import came, steps_of

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class CompressedOptimizer(torch.optim.Optimizer):
    """An optimizer that `commpress.attach(ddp_model, spec, optimizer=...)` takes.

    It steps only after it is attached, or, if it `may_step_alone`, after it is given to `diloco` or `local_sgd`. Between
    backward and `step`, the `grad` of an exchanged parameter holds the value that `step` will apply: the mean of what the ranks
    sent (of their gradients while `takes_means`), or, in a local step, this rank's own gradient.
    """

    may_be_masked = True
    """Whether a part of a parameter may be left out of the exchange."""
    masks_momentum = False
    """Whether it clears a rank's momentum where that rank has sent (momentum factor masking)."""
    needs_feedback = False
    """Whether it sums up the values that arrive, so that error feedback must send the rest later."""
    may_step_alone = False
    """Whether it may take local steps between outer syncs while it is not attached."""
    shared: tuple[str, ...] = ("max_norm",)
    """Settings of the whole optimizer, not of a group; they are saved with the groups."""

    def __init__(self, params: Parameters, defaults: dict[str, Any], max_norm: float | None) -> None:
        if max_norm is not None:
            require_in_range("max_norm", max_norm, 0)
        self._forget()
        super().__init__(params, {**defaults, "max_norm": max_norm})
        self._watch()

    def _forget(self) -> None:
        """Reset to the state of an optimizer that is not attached."""
        self._bound: dict[str, Tensor] = {}  # by name: the exchanged parameters
        self._places: dict[
            str, tuple[Tensor, dict[str, Any]]
        ] = {}  # by name: those that a group holds, with that group
        self._received: list[tuple[Tensor, Segments]] = []
        self._frozen: frozenset[str] = frozenset()  # names in `_places` that do not move in this step
        self._awaits_step = False
        self._world_size, self._may_be_unused, self._may_be_frozen = 1, False, True
        self._scale = 1.0
        self._clip = 1.0
        self._proven: object = None
        self._brought: int | None = None  # steps of the state that a session has restored since the last backward
        self.watch = GradientWatch()
        self._speaks = True
        self.binding: object = None
        """A new object with every `bind`."""
        self._alone = False
        self._withheld: tuple[Feedback, dict[str, Tensor]] | None = None

    def _watch(self) -> None:
        # the first of the step hooks: later ones may change gradients on purpose
        self.register_step_pre_hook(lambda optimizer, *_: optimizer._require_untouched())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; a copy is not attached, and `step` says so."""
        if "_bound" not in vars(self):  # else torch calls this to load a state
            self._forget()
        super().__setstate__(state)
        if not self._optimizer_step_pre_hooks:
            self._watch()

    @property
    def takes_means(self) -> bool:
        """Whether `grad` holds the ranks' mean gradient now, as in a warm-up, and may be clipped as under any optimizer."""
        return False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. It gets the settings in `shared` from the first group."""
        if self.param_groups:
            first = self.param_groups[0]
            param_group = {**param_group, **{key: first[key] for key in self.shared if key in first}}
        super().add_param_group(param_group)
        self._find_places()

    # the methods that a session calls

    def bind(
        self,
        parameters: dict[str, Tensor],
        world_size: int,
        may_be_unused: bool,
        *,
        may_be_frozen: bool = True,
        speaks: bool = True,
    ) -> None:
        """Take the exchanged parameters, by name; `may_be_unused` says whether a backward may leave some of them out.

        `may_be_frozen`: a backward also ends if a parameter has stopped requiring a gradient. `speaks`: this rank may warn.
        All other parameters of this optimizer step as under torch's. An optimizer that was bound before keeps its state; the
        parameters given now replace the earlier ones. Raises ValueError if it does not hold a trained parameter, and for
        parameters that it cannot exchange.
        """
        held = {p for group in self.param_groups for p in group["params"]}
        name = type(self).__name__
        if self._alone:
            raise ValueError(
                f"this {name} takes local steps between outer syncs, as commpress.diloco or local_sgd has it; expected another "
                f"{name} for what is exchanged in every step"
            )
        for key, p in parameters.items():
            if p not in held and p.requires_grad:
                raise ValueError(
                    f"parameter {key!r} is trained, but the optimizer does not hold it: expected all of the "
                    f"model's that require a gradient in one {name} (in groups, if settings differ)"
                )
            if not dense(p):
                raise ValueError(
                    f"parameter {key!r} has strides {p.stride()}, expected memory without gaps or overlaps"
                )
        others = [key for key, p in self._bound.items() if p.requires_grad and p in held]
        if others and not set(parameters.values()) & set(self._bound.values()):
            raise ValueError(
                f"this {name} is attached to another model, whose {others[0]!r} it steps: expected an optimizer of its own for "
                "each model, or the same parameters wrapped anew"
            )
        self._bound, self._awaits_step, self._received = dict(parameters), False, []
        self.watch.forget()
        self._world_size, self._may_be_unused = world_size, may_be_unused
        self._may_be_frozen, self._speaks = may_be_frozen, speaks
        self._proven, self.binding = None, object()
        self._find_places()
        for device in {p.device for p in held}:
            loops.warm_up(device)

    def hand_over(self, buckets: StepBuffer) -> None:
        """Take the step buffer that exchanges the bound parameters; it takes over earlier residuals. For hooks."""
        if self._withheld is not None:
            feedback, before = self._withheld
            ours = {p: name for name, p in self._bound.items()}
            names = {name: ours[p] for name, p in before.items() if p in ours}
            masked = any(name in feedback.masks for name in before)  # a new session has no masks
            if feedback.memories and not masked:
                buckets.take_over(feedback, names, self._scale)
        self._withheld = buckets.collectives.feedback, dict(self._bound)

    @property
    def masks(self) -> MaskIndex:
        """The index of the values that are sent, by parameter; without masks all of them."""
        return MaskIndex() if self._withheld is None else self._withheld[0].masks

    def step_alone(self) -> None:
        """Take local steps from now on, on this rank's own gradients, without a session. For hooks."""
        self._alone = True

    def _find_places(self) -> None:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        self._places = {name: (p, groups[p]) for name, p in self._bound.items() if p in groups}

    @property
    def awaits_step(self) -> bool:
        """Whether no step has used the values of the last exchange."""
        return self._awaits_step

    def begin_backward(self, scale: float) -> bool:
        """Note that a backward starts, whose gradients are multiplied by `scale`. Returns whether a step has used the exchange
        before it."""
        used, self._awaits_step = not self._awaits_step, True
        self._received, self._scale, self._clip, self._brought = [], scale, 1.0, None
        self.watch.forget()
        self._find_places()
        self._frozen = frozenset(name for name, (p, _) in self._places.items() if not p.requires_grad)
        return used

    def frozen_parameters(self) -> list[str] | None:
        """Return the names of the parameters that are not trained in this step, or None if the ranks need not compare them.

        They must compare them if a difference would go unnoticed.
        """
        return sorted(self._frozen) if self._may_be_unused and self._may_be_frozen else None

    def split(self, segments: Segments) -> list[Segments]:
        """Return the parts of a bucket that are sent in this step, each with its own override; the same on every rank."""
        parts: dict[object, list[Segment]] = {}
        for segment in segments:
            if segment.name not in self._frozen:
                kind = self.kind(segment.name) if segment.name in self._places else None
                parts.setdefault(kind, []).append(segment)
        return [tuple(part) for part in parts.values()]

    def kind(self, name: str) -> object:
        """Return a parameter's kind: those of one kind may be sent together. None if this optimizer does not hold it."""
        return "exchanged"

    def override(self, segments: Segments, codec: Codec) -> Override:
        """Return what to do with a part of a bucket in this step; the same on every rank."""
        if segments[0].name not in self._places:
            return Override(DENSE, "the optimizer does not hold it")
        return self.override_held(segments, codec)

    def needs_all_buckets(self) -> bool:
        """Whether no bucket of this step may be sent before `on_all_buckets` has seen them all."""
        return False

    def on_all_buckets(self) -> None:
        """Compute the factor by which `max_norm` clips this rank's own gradients, which are in all buckets now.

        A rank's norm may be sqrt(W) times that of the mean, since the noise of one of W ranks is so much larger (Deep Gradient
        Compression, section 3.2, has the same for sums).
        """
        if (most := self.param_groups[0]["max_norm"]) is not None and self.needs_all_buckets():
            norm, bound = norm_of(self._received), most * self._world_size**0.5 * self._scale
            self._clip = bound / norm if norm > bound and norm < float("inf") else 1.0

    def clip(self, bucket: Tensor) -> None:
        """Multiply a bucket's gradient by the factor of `on_all_buckets`, in place."""
        if self._clip < 1:
            bucket.mul_(self._clip)

    @abstractmethod
    def override_held(self, segments: Segments, codec: Codec) -> Override:
        """Return the override for parameters of one kind that this optimizer steps."""

    @abstractmethod
    def candidates(self) -> Sequence[Candidate]:
        """Return the candidates of `auto`, the gentlest first. Raises TypeError, which lists specs, if `auto` cannot choose."""

    def take(self, candidate: Candidate) -> None:
        """Go on as `auto` has chosen."""

    def own_spec(self) -> str | None:
        """Return the spec by which everything is sent in the step that begins, whatever `auto` chose; None if there is none."""
        return None

    def on_bucket(self, bucket: Tensor, segments: Segments) -> None:
        """Note a bucket that has come; it will hold the exchanged values when backward is over."""
        self._received.append((bucket, segments))

    def replicated_state(self) -> dict[str, object]:
        """Return the state on which all ranks must agree now, as JSON values."""
        groups = [{k: plain(v) for k, v in group.items() if k != "params"} for group in self.param_groups]
        frozen = sorted(name for name, (p, _) in self._places.items() if not p.requires_grad)
        return {"optimizer": type(self).__name__, "optimizer's groups": groups, "frozen parameters": frozen}

    def must_verify(self) -> bool:
        """Whether a phase begins, or a state was loaded, since the ranks compared `replicated_state`."""
        before, self._proven = self._proven, self.phase()
        return before != self._proven

    def phase(self) -> object:
        """Return a value that changes when a new phase begins."""
        return 0

    def replica(self, p: Tensor) -> Tensor:
        """Return the value of a parameter that is the same on all ranks: itself, unless the optimizer takes local steps."""
        return p

    def own_state(self) -> dict[str, Any]:
        """Return the part of the state that is this rank's own; empty unless the optimizer takes local steps."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""

    def gradients_are_there(self, scaled: bool) -> None:
        """Note that backward is over and `grad` holds the exchanged values. For hooks. `scaled`: a GradScaler divides them."""
        self.watch.remember((p for p, _ in self._places.values()), scaled)

    def _require_untouched(self) -> None:
        """Warn, once, if `grad` holds exchanged updates, not gradients, and was changed since."""
        if self.takes_means:
            self.watch.forget()
        held = {name: p for name, (p, _) in self._places.items() if name not in self._frozen}
        self.watch.check(held, type(self).__name__, self._speaks)

    # the methods that a training script calls

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply what the last backward exchanged, and the gradients of parameters that are not exchanged.

        Raises RuntimeError if the optimizer is not attached, if no backward has exchanged anything since the last step, or if a
        backward has exchanged only a part.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._require_untouched()
        name = type(self).__name__
        if not self._bound and not self._alone:
            local = ", or commpress.diloco(model, optimizer, ...)" if self.may_step_alone else ""
            raise RuntimeError(f"{name} is not attached: commpress.attach(ddp_model, spec, optimizer=optimizer){local}")
        if self._awaits_step:
            self._apply_exchanged()
        elif any(p.grad is not None and p.requires_grad for p, _ in self._places.values()):
            raise RuntimeError(
                f"{name}.step(): no backward has exchanged gradients since the last step (all in no_sync?){self._why_not()}"
            )
        exchanged = set(self._bound.values())
        for group in self.param_groups:
            plain = [p for p in group["params"] if p not in exchanged and p.requires_grad and p.grad is not None]
            if plain:
                self.step_plain(plain, group)
        return loss

    def _apply_exchanged(self) -> None:
        moving = {
            key: place for key, place in self._places.items() if key not in self._frozen and place[0].requires_grad
        }
        arrived = {segment.name for _, segments in self._received for segment in segments}
        expected = moving if self._may_be_frozen else self._places
        if arrived and (missing := [key for key in expected if key not in arrived]):
            raise RuntimeError(
                f"{type(self).__name__}.step(): backward has exchanged no gradient of {missing[0]!r} and {len(missing) - 1} "
                f"others{self._why_not()}"
            )
        late = self._late(moving)
        updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]] = {}
        for key, (p, group) in moving.items():
            if p.grad is not None and p.grad.is_sparse:
                raise TypeError(f"{type(self).__name__}: the gradient of {key!r} is sparse, expected a dense one")
            updates[key] = (p, group, late.get(key, p.grad))
        self.apply(updates)
        self._awaits_step, self._received = False, []

    def _why_not(self) -> str:
        """Return a sentence on why DDP has not exchanged gradients; empty if that is not known."""
        frozen = [key for key, (p, _) in self._places.items() if not p.requires_grad]
        if not frozen or self._may_be_frozen:
            return ""
        return (
            f". {frozen[0]!r} does not require a gradient, and DDP waits for one: expected "
            "DistributedDataParallel(..., find_unused_parameters=True), or the model wrapped and attached anew"
        )

    @abstractmethod
    def apply(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        """Take one step. `updates` has, by name, a parameter, its group and its exchanged values (None: it has none)."""

    @abstractmethod
    def step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Take one step, as torch's optimizer does, of a group's parameters that are not exchanged. All have a `grad`."""

    def _late(self, moving: dict[str, tuple[Tensor, dict[str, Any]]]) -> dict[str, Tensor]:
        """Return the exchanged values of parameters that no rank used: DDP leaves their `grad` None or 0."""
        if not self._received:
            return {}
        unused = {key for key, (p, _) in moving.items() if p.grad is None}
        grads = {key: p.grad for key, (p, _) in moving.items() if p.grad is not None and self._may_be_unused}
        if grads:
            found = [grad.any() for grad in grads.values()]
            used = torch.stack([one.to(found[0].device) for one in found]).tolist()  # the host waits once
            unused |= {key for key, one in zip(grads, used, strict=True) if not one}
        parts: dict[str, Tensor] = {}
        for bucket, segments in self._received if unused else ():
            for segment, part in zip(segments, bucket.split(sizes(segments)), strict=True):
                if segment.name in unused:
                    p = self._places[segment.name][0]
                    # in DDP's order of a bucket
                    parts[segment.name] = part.as_strided(p.shape, p.stride()) / self._scale
        return parts

    def load_with_session(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that a session's checkpoint holds; `load_state_dict` then ignores one of as many steps (`came`)."""
        self._brought = None
        self.load_state_dict(state_dict)
        self._brought = steps_of(state_dict)

    def came_with_session(self, state_dict: dict[str, Any]) -> bool:
        """Whether the session has restored this state (`with_session.came`); a second one is another."""
        brought, self._brought = self._brought, None
        return came(self, state_dict, brought)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the ranks compare their states at the next backward."""
        super().load_state_dict(state_dict)
        self._proven = self._brought = None
        for p, state in self.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    # the loops need all tensors in one memory order
                    state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        self._find_places()
