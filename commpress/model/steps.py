"""Hooks that mask gradients when a backward ends, and around the steps of one or several optimizers.

    backward     each gradient is masked as it arrives (after autograd has added it up), so what clips it sees no pruned one
    step         criteria observe the gradients; masked once more, for whoever has changed them in between
    step(f)      the same behind each call of the closure f: its gradients are this step's
    behind it    pruned weights are set to 0, where an optimizer moves a weight whose gradient is 0

In a step that looks, gradients of pruned weights are gathered first. Under DDP they are means when the backward is over.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from commpress.model.held import Holding, local
from commpress.model.masks import Masks

HOPS = 3
"""Callbacks of a backward run in the order in which they were asked for, and may ask for others: DDP with a static graph asks
for one that asks for the one in which it hands out means. The next after those is behind it."""

Observe = Callable[[float, Collection[str]], None]


@runtime_checkable
class SendsUpdates(Protocol):
    """An optimizer of `commpress.optim`: its gradients may be updates, which are no means of the ranks' gradients."""

    @property
    def takes_means(self) -> bool:
        """Whether gradients are means now."""


@runtime_checkable
class SendsMoves(Protocol):
    """An optimizer of `commpress.optim` whose gradients are how far a momentum has moved, and no gradients at any time."""

    sends_moves: bool


@runtime_checkable
class LocalSteps(Protocol):
    """An optimizer under which the ranks' weights differ between two syncs."""

    def synced(self) -> AbstractContextManager[None]:
        """Return a context in which all ranks have the weights of the last sync."""


class Steps:
    """Hooks on parameters and their optimizers. `observe(scale, names)` is called once in each step of an optimizer, when
    the gradients of these parameters are there, multiplied by `scale`.

    `parameters` are those that may be pruned, by name. With a `holding` its optimizer may step them in flat tensors, in several
    steps of some of them. Raises TypeError for an optimizer that is none of torch's kind, ValueError, with the names, for
    parameters that none of them has.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        parameters: Mapping[str, nn.Parameter],
        masks: Masks,
        observe: Observe,
        holding: Holding | None = None,
    ) -> None:
        self.optimizers = [unwrapped(optimizer) for optimizer in optimizers]
        self._masks, self._observe, self._holding = masks, observe, holding
        flat = {name for name in parameters if masks.held[name].is_flat}
        names = {id(p): name for name, p in parameters.items() if name not in flat}
        self._names = [{names[id(p)] for p in parameters_of(o) if id(p) in names} for o in self.optimizers]
        for optimizer, own in zip(self.optimizers, self._names, strict=True):
            if holding is not None and optimizer is holding.optimizer:
                own |= flat
        if missing := [name for name in parameters if not any(name in own for own in self._names)]:
            raise ValueError(
                f"Scheduler: no optimizer that was given has {_listed(missing)}, which the recipe prunes: expected all "
                "optimizers, Scheduler(recipe, model, [one, other]), or other `parameters` in the recipe"
            )
        self._dense: dict[str, Tensor] = {}
        self._looks: frozenset[str] = frozenset()
        self._complete: set[str] = set()
        self._callback_is_due = False
        self._removable = [
            p.register_post_accumulate_grad_hook(self._on_arrival(name))
            for name, p in parameters.items()
            if name not in flat  # the session masks those before it sends them
        ]
        self._before = [o.register_step_pre_hook(self._before_step(i)) for i, o in enumerate(self.optimizers)]
        self._behind = [o.register_step_post_hook(self._after_step(i)) for i, o in enumerate(self.optimizers)]
        self.stand_closest()

    def look(self, names: Collection[str]) -> None:
        """In the next step gather the gradients of these parameters' pruned weights; forget the last one's."""
        self._looks = frozenset(names)
        self._complete.clear()
        self._dense, self._callback_is_due = {}, False

    @property
    def dense(self) -> dict[str, Tensor]:
        """This rank's gradients of pruned weights in a step that looks, 0 elsewhere: sums over its backwards. None
        if the step was skipped."""
        return {name: g for name, g in self._dense.items() if name in self._complete}

    def stand_closest(self) -> None:
        """Put these hooks next to the step: others that come before it may change gradients, those behind it read weights."""
        for optimizer, before, behind in zip(self.optimizers, self._before, self._behind, strict=True):
            ahead: Any = optimizer._optimizer_step_pre_hooks
            after: Any = optimizer._optimizer_step_post_hooks
            ahead.move_to_end(before.id)
            after.move_to_end(behind.id, last=False)

    def arrived(self, index: int = 0, *, first: bool = True) -> None:
        """The gradients of an optimizer's parameters are there, and it is about to use them."""
        optimizer, names = self.optimizers[index], self._moving(index)
        with torch.no_grad():
            found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler leaves it to fused ones to skip their step
            skipped = found_inf is not None and bool(found_inf)
            if first and not skipped:
                scale = getattr(optimizer, "grad_scale", None)
                self._observe(1.0 if scale is None else float(scale), names)
            for name in self._looks & names:
                if skipped:
                    self._dense.pop(name, None)
                else:
                    self._gather(name)
                    self._complete.add(name)
            self._masks.apply_to_gradients(names)

    def close(self) -> None:
        """Take off all hooks."""
        for hook in [*self._removable, *self._before, *self._behind]:
            hook.remove()

    def _moving(self, index: int) -> set[str]:
        """The parameters that an optimizer steps now: flat tensors may come one after another."""
        names = self._names[index]
        if self._holding is None:
            return names
        now = parameters_of(self.optimizers[index])
        return {name for name in names if self._masks.held[name].moved_by(now)}

    def _on_arrival(self, name: str) -> Callable[[Tensor], None]:
        def mask(p: Tensor) -> None:
            if name not in self._masks.of or p.grad is None:
                return
            if name not in self._looks or name in self._complete:
                self._masks.apply_to_gradients((name,))
            elif not self._callback_is_due:
                self._callback_is_due = True
                Variable._execution_engine.queue_callback(lambda: self._backward_ends(HOPS))

        hook: Callable[[Tensor], None] = torch.compiler.disable(mask)
        return hook

    def _backward_ends(self, hops: int) -> None:
        if hops:
            Variable._execution_engine.queue_callback(lambda: self._backward_ends(hops - 1))
            return
        self._callback_is_due = False
        for name in self._looks - self._complete:
            self._gather(name)
        self._masks.apply_to_gradients(self._looks)

    def _gather(self, name: str) -> None:
        if name in self._complete or (gradient := self._masks.pruned_gradient(name)) is None:
            return
        before = self._dense.get(name)
        if before is not None and bool(local(before).isfinite().all()):  # else of a step that a GradScaler has skipped
            gradient += before
        self._dense[name] = gradient

    def _before_step(self, index: int) -> Any:
        def before(optimizer: Optimizer, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if callable(closure := named.get("closure")):
                return args, {**named, "closure": self._behind_closure(index, closure)}
            if len(args) > 1 and callable(args[1]):
                return (args[0], self._behind_closure(index, args[1]), *args[2:]), named
            self.arrived(index)
            return None

        return torch.compiler.disable(before)

    def _behind_closure(self, index: int, closure: Callable[[], Any]) -> Callable[[], Any]:
        calls = 0

        def evaluate() -> Any:
            nonlocal calls
            loss = closure()
            self.arrived(index, first=calls == 0)  # LBFGS calls it again, at other weights than those of this step
            calls += 1
            return loss

        return evaluate

    def _after_step(self, index: int) -> Any:
        def after(*_: Any) -> None:
            if moves_without_gradient(self.optimizers[index]):
                self._masks.apply(self._moving(index))

        return torch.compiler.disable(after)


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer that has hooks of its own: the one inside of what Accelerate or Lightning hand out, or of a schedule of
    learning rates. Raises TypeError if there is none."""
    found: Any = optimizer
    while not (isinstance(found, Optimizer) and "_optimizer_step_pre_hooks" in vars(found)):
        if (inner := _inside(found)) is None:
            raise TypeError(
                f"Scheduler: expected a torch.optim.Optimizer or a list of them, got {type(optimizer).__name__}"
            )
        found = inner
    return found


def states_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer, and those inside of it that hold a state, as in ZeroRedundancyOptimizer or a Lookahead of a user."""
    found = [optimizer]
    while (inner := _inside(found[-1])) is not None and inner not in found:
        found.append(inner)
    return found


def _inside(optimizer: Any) -> Optimizer | None:
    inner = (getattr(optimizer, name, None) for name in ("optimizer", "optim", "base_optimizer", "_optimizer"))
    return next((each for each in inner if isinstance(each, Optimizer) and each is not optimizer), None)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return what it moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def moves_without_gradient(optimizer: Optimizer) -> bool:
    """Whether it may move a weight whose gradients are all 0: one that mixes a matrix's values, or one that we do not know."""
    kinds = [type(each) for each in states_of(optimizer)]
    known = all(kind.__module__.split(".")[0] in ("torch", "commpress") for kind in kinds)
    return not known or any(kind.__name__ in ("Muon", "LBFGS") for kind in kinds)


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} others" if len(names) > most else "")
