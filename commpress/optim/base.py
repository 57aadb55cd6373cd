"""What all compressed optimizers have in common: they are told of every bucket, and step on what was exchanged."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.feedback import Segments
from commpress.comm.plan import Treatment
from commpress.optim import loops

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class CompressedOptimizer(torch.optim.Optimizer):
    """An optimizer that `commpress.attach(ddp_model, spec, optimizer=...)` takes. It does not step before it is attached.

    Between backward and `step`, a parameter's `grad` holds what `step` will apply: the mean of what the ranks sent (while
    `takes_means`, of their gradients), or, in a local step, this rank's own gradient.
    """

    may_be_masked = True
    """Whether a part of a parameter may be left out of the exchange."""

    def __init__(self, params: Parameters, defaults: dict[str, Any], max_norm: float | None) -> None:
        if max_norm is not None:
            within("max_norm", max_norm, 0)
        super().__init__(params, {**defaults, "max_norm": max_norm})
        self._places: dict[str, tuple[Tensor, dict[str, Any]]] = {}  # by name: a parameter and its group
        self._received: list[tuple[Tensor, Segments]] = []
        self._awaits_step = False
        self._world_size, self._may_be_unused = 1, False
        self._scale = 1.0
        self._clip = 1.0
        self._proven: object = None

    @property
    def takes_means(self) -> bool:
        """Whether `grad` holds the ranks' mean gradient now, as in a warm-up; what may be clipped as under any optimizer."""
        return False

    # what a session asks of it

    def bind(self, parameters: dict[str, Tensor], world_size: int, may_be_unused: bool) -> None:
        """The parameters that are exchanged, by name, and whether a backward may leave some out.

        Raises ValueError if they are not those that this optimizer holds.
        """
        groups = {p: group for group in self.param_groups for p in group["params"] if p.requires_grad}
        for name, p in parameters.items():
            if p not in groups:
                raise ValueError(f"parameter {name!r} is trained, but the optimizer does not hold it")
        if strangers := groups.keys() - set(parameters.values()):
            shapes = ", ".join(str(tuple(p.shape)) for p in strangers)
            raise ValueError(f"the optimizer holds {len(strangers)} parameters that the model does not train: {shapes}")
        for name, p in parameters.items():
            if not dense(p):
                raise ValueError(
                    f"parameter {name!r} has strides {p.stride()}, expected memory without gaps or overlaps"
                )
        self._places = {name: (p, groups[p]) for name, p in parameters.items()}
        self._world_size, self._may_be_unused = world_size, may_be_unused
        loops.warm_up()

    @property
    def awaits_step(self) -> bool:
        """Whether what was exchanged last has not been used."""
        return self._awaits_step

    def start(self, scale: float) -> bool:
        """Backward starts, its gradients multiplied by `scale`. Returns whether the exchange before this one was used."""
        used, self._awaits_step = not self._awaits_step, True
        self._received, self._scale, self._clip = [], scale, 1.0
        return used

    def waits(self) -> bool:
        """Whether no bucket of this step may be treated before `measure` has seen them all."""
        return False

    def measure(self, gradients: list[Tensor]) -> None:
        """All buckets of this step, which are this rank's own gradients: how much of them counts under `max_norm`.

        A rank may have sqrt(W) times the norm of the mean: so much larger is the noise of one of W (as Deep Gradient
        Compression, section 3.2, has it for sums).
        """
        if (most := self.param_groups[0]["max_norm"]) is not None and self.waits():
            norm = float(
                torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
            )
            bound = most * self._world_size**0.5 * self._scale
            self._clip = bound / norm if norm > bound and norm < float("inf") else 1.0

    def clip(self, bucket: Tensor) -> None:
        """Scale a bucket's gradient down to what counts of it."""
        if self._clip < 1:
            bucket.mul_(self._clip)

    @abstractmethod
    def treat(self, segments: Segments, codec: Codec) -> Treatment:
        """What to do with a bucket of these parameters in this step; the same on every rank."""

    def receive(self, bucket: Tensor, segments: Segments) -> None:
        """This bucket will hold what was exchanged when backward is over."""
        self._received.append((bucket, segments))

    def standing(self) -> dict[str, object]:
        """What all ranks must agree on now, as JSON values."""
        groups = [{k: plain(v) for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"optimizer": type(self).__name__, "optimizer's groups": groups}

    def unproven(self) -> bool:
        """Whether a phase begins, or a state was loaded, since the ranks compared their standing."""
        before, self._proven = self._proven, self.phase()
        return before != self._proven

    def phase(self) -> object:
        """What changes when a phase begins."""
        return 0

    def replica(self, p: Tensor) -> Tensor:
        """What of a parameter is the same on all ranks: itself, unless the optimizer takes local steps."""
        return p

    def own_state(self) -> dict[str, Any]:
        """What of its state is this rank's own; nothing, unless it takes local steps."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""

    # what a training script asks of it

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply what the last backward exchanged.

        Raises RuntimeError if it is not attached, or if no backward has exchanged anything since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        name = type(self).__name__
        if not self._places:
            raise RuntimeError(f"{name} is not attached: commpress.attach(ddp_model, spec, optimizer=optimizer)")
        if not self._awaits_step:
            if all(p.grad is None for p, _ in self._places.values()):
                return loss
            raise RuntimeError(
                f"{name}.step(): no backward has exchanged gradients since the last step (all in no_sync?)"
            )
        late = self._late()
        updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]] = {}
        for key, (p, group) in self._places.items():
            if p.grad is not None and p.grad.is_sparse:
                raise TypeError(f"{name}: the gradient of {key!r} is sparse, expected a dense one")
            updates[key] = (p, group, late.get(key, p.grad))
        self.apply(updates)
        self._awaits_step, self._received = False, []
        return loss

    @abstractmethod
    def apply(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        """One step: parameter, group and what was exchanged of it, by name."""

    def _late(self) -> dict[str, Tensor]:
        """What was exchanged of parameters that no rank used: DDP leaves their `grad` None or 0."""
        unused = {
            key
            for key, (p, _) in self._places.items()
            if p.grad is None or (self._may_be_unused and not bool(p.grad.any()))
        }
        parts: dict[str, Tensor] = {}
        for bucket, segments in self._received if unused else ():
            for (key, _), part in zip(segments, bucket.split([n for _, n in segments]), strict=True):
                if key in unused:
                    p = self._places[key][0]
                    parts[key] = part.as_strided(p.shape, p.stride()) / self._scale  # in DDP's order of a bucket
        return parts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the ranks compare their standing at the next backward."""
        super().load_state_dict(state_dict)
        self._proven = None
        for p, state in self.state.items():
            for key, value in state.items():
                if key == "step":
                    state[key] = value.to(p.device, torch.float32)
                elif isinstance(value, Tensor) and value.stride() != p.stride():
                    state[key] = torch.empty_like(p, dtype=value.dtype).copy_(
                        value
                    )  # the loops want one order of memory
        groups = {p: group for group in self.param_groups for p in group["params"]}
        self._places = {name: (p, groups[p]) for name, (p, _) in self._places.items()}


def dense(p: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def plain(value: Any) -> Any:
    """A setting of a group as a JSON value."""
    return value.item() if isinstance(value, Tensor) else value


def within(name: str, value: float, least: float, below: float = float("inf")) -> None:
    """Raises ValueError unless least <= value < below."""
    if not least <= value < below:
        raise ValueError(f"{name} {value}: expected a number in [{least:g}, {below:g})")
