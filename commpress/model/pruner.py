"""The prune entries of a recipe at work: when an entry is due, its criterion's scores become masks, the same on all ranks.

Pruned weights are 0, so are their gradients and what the optimizer remembers of them. Behind some steps it is checked that they
still are, for whatever else may move weights.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model import importance, layers, pruning, reach
from commpress.model.distillation import PROJECTIONS
from commpress.model.held import Holding, whole
from commpress.model.masks import Masks, from_state
from commpress.model.reach import Reach
from commpress.model.recipe import Prune, Recipe, RecipeError
from commpress.model.steps import LocalSteps, Steps, states_of
from commpress.notice import warn

CHECKED, CHECK_EVERY = 3, 100
"""Steps after a change of masks, and then every so many, behind which it is checked that pruned weights are 0."""
LATE = "a model that was compiled and called before the Scheduler was made (then make the Scheduler first, or call \
torch.compiler.reset() before)"


class Session(Protocol):
    """The part of what `commpress.attach` returns that a recipe needs."""

    world_size: int
    group: dist.ProcessGroup | None
    """The ranks that train the model; None: all of the default group."""
    holding: Holding | None
    """Where parameters are stepped, if an optimizer steps flat tensors instead; else None."""

    def agree(self, settings: Mapping[str, object]) -> None:
        """Raise ValueError on all ranks if these differ."""

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Send only what these masks keep, from the next step on."""

    def send_dense(self, on: bool) -> None:
        """Send exact gradients of all values while this is on."""

    def phase(self, name: str) -> None:
        """Call the report's rows by this name from now on."""


class Pruner:
    """The masks of a model, and the prune entries of `recipe` that change them.

    `optimizers` are all that move weights which the recipe prunes. `on_first_gradients` is called once, when the first backward
    has given gradients. Raises RecipeError, naming the key, for an entry that does not fit the model.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        session: Session | None,
        on_first_gradients: Callable[[], None],
    ) -> None:
        self._entries, self._model, self._session = recipe.prune, model, session
        self._holding = None if session is None else session.holding
        self._on_first_gradients = on_first_gradients
        self.done = 0
        """Optimizer steps so far."""
        self._parameters = layers.named_parameters(model)
        with self._whole():
            self.names_of = reach.chosen(recipe, model, optimizers)
            """Names of the parameters that each entry prunes."""
            self.names = list(dict.fromkeys(name for names in self.names_of for name in names))
            """The names of the parameters that any entry prunes."""
            self.masks = Masks(self._parameters, self._holding)
            self._layouts = {name: layers.layout_of(model, name) for name in self.names}
            self._left_out = reach.left_out(model, self.names) if self._entries else {}
        pruned = {name: self._parameters[name] for name in self.names}
        self.steps = Steps(optimizers, pruned, self.masks, self._observe, self._holding)
        self._wandas: dict[int, importance.Wanda] = {}
        self.criteria: list[importance.Criterion | None] = [None for _ in self._entries]
        """The criterion of each entry while it gathers scores."""
        self._unchecked = 0  # steps since the masks changed
        self._empty: set[str] = set()  # parameters of which nothing is left, told
        self._unsteady: set[str] = set()  # parameters that something has moved where they are pruned
        self._hooks_are_seen = False
        for index in range(len(self._entries)):
            self._close_criterion(self._criterion(index))  # now: what does not fit is told before step 1

    @property
    def reach(self) -> Reach:
        """The share of the model that is pruned, and what is left out. This rank's part of sharded weights counts."""
        pruned = self.masks.sparsity
        masked = sum(mask.numel() for mask in self.masks.of.values())
        chosen, total = self._sizes()
        return Reach(pruned * masked / max(chosen, 1), pruned * masked / max(total, 1), self._left_out)

    def require_masks(self) -> None:
        """Raise what the session raises if masks of these parameters cannot be had. Collective."""
        if self._session is None or not self._entries:
            return
        whole_masks = {
            name: torch.ones(self.masks.held[name].shape, dtype=torch.bool, device=self._device) for name in self.names
        }
        self._session.set_masks(self.masks.ordered(whole_masks))
        self._session.set_masks({})

    def tell_reach(self) -> None:
        """Warn of a default that reaches less than half of the model: it is not what it sounds like."""
        chosen, total = self._sizes()
        if any(not entry.parameters for entry in self._entries) and 2 * chosen < total:
            warn(
                f"the recipe prunes among {chosen:,} of {total:,} parameters, {chosen / total:.1%} of the model; "
                f"left out: {reach.listed(self._left_out)}"
            )

    def advance(self) -> None:
        """Do what is due behind `done` steps. Collective."""
        for index, entry in enumerate(self._entries):
            if entry.due(self.done):
                self._prune(index, entry)
            if not self._watches(entry):
                self._close_criteria(index)
            elif self.criteria[index] is None:
                self.criteria[index] = self._criterion(index)

    def look(self) -> bool:
        """Return whether the next step looks at all gradients, those of pruned weights as well, and prepare it."""
        looks = [
            name
            for names, entry in zip(self.names_of, self._entries, strict=True)
            if entry.how == "regrow" and entry.start < self.done + 1 < entry.last and entry.due(self.done + 1)
            for name in names
        ]
        self.steps.look(looks)
        return bool(looks)

    def check(self) -> None:
        """Check that pruned weights are 0. Warn once of those that are not, and set them to 0 after each step from then on."""
        if not self.masks.of:
            return
        self._unchecked += 1
        if self._unchecked <= CHECKED or self._unchecked % CHECK_EVERY == 0:
            moved = {name: count for name, count in self.masks.moved().items() if name not in self._unsteady}
            if moved:
                self._unsteady |= moved.keys()
                count, size = next(iter(moved.values())), len(moved)
                warn(
                    f"step {self.done}: {count} pruned weights of {next(iter(moved))!r} were not 0"
                    f"{f', and some of {size - 1} other parameters' if size > 1 else ''}. Something else than the "
                    "Scheduler's optimizers has moved them; they are set to 0 again, in each step"
                )
        if self._unsteady:
            self.masks.apply(self._unsteady)

    def state_dict(self) -> dict[str, Any]:
        """Return masks, and the scores of the criteria that gather some."""
        return {
            "masks": self.masks.state_dict(),
            "criteria": [None if each is None else each.state_dict() for each in self.criteria],
        }

    def load_state_dict(self, state: Mapping[str, Any], saved: Recipe, done: int) -> None:
        """Restore what `state_dict` returned behind `done` steps of the recipe `saved`. Collective."""
        self.done = done
        self._close_criteria()
        masks = {layers.plain(name): mask for name, mask in from_state(state["masks"]).items()}
        if masks or self.masks.of:  # not every kind of sharding takes some
            self._take(masks)
        for index, (entry, before, seen) in enumerate(zip(self._entries, saved.prune, state["criteria"], strict=False)):
            if seen is not None and entry == before:  # another starts anew
                self.criteria[index] = criterion = self._criterion(index)
                criterion.load_state_dict({layers.plain(name): of for name, of in seen.items()})
        for index, entry in enumerate(self._entries):
            if self.criteria[index] is None and self._watches(entry):
                self.criteria[index] = self._criterion(index)

    def close(self) -> None:
        """Take off all hooks."""
        self.steps.close()
        self._close_criteria()
        for wanda in self._wandas.values():
            wanda.close()
        self._wandas.clear()

    # how it works

    def _sizes(self) -> tuple[int, int]:
        """Return how many values the parameters have that any entry prunes, and how many those of the model."""
        sizes = {name: held.shape.numel() for name, held in self.masks.held.items()}
        chosen = sum(sizes[name] for name in self.names)
        return chosen, sum(size for name, size in sizes.items() if not name.startswith(PROJECTIONS))

    def _watches(self, entry: Prune) -> bool:
        """Whether what happens in the next step counts for the entry's scores."""
        return entry.start - entry.every <= self.done < entry.last

    def _criterion(self, index: int) -> importance.Criterion:
        group = None if self._session is None else self._session.group
        kind = importance.CRITERIA[self._entries[index].criterion]
        try:
            parameters = {name: self._parameters[name] for name in self.names_of[index]}
            with self._whole():
                if kind is importance.Taylor or kind is importance.Movement:
                    return kind(self._model, parameters, group, self._holding)
                if kind is not importance.Wanda:
                    return kind(self._model, parameters, group)
                if index not in self._wandas:  # its hooks stay: those that come behind a compiled call are not called
                    self._wandas[index] = importance.Wanda(self._model, parameters, group)
            self._wandas[index].watch(True)
            return self._wandas[index]
        except ValueError as error:
            raise RecipeError(f"prune[{index}].criterion: {error}") from None

    def _close_criteria(self, only: int | None = None) -> None:
        for index, criterion in enumerate(self.criteria):
            if criterion is not None and only in (None, index):
                self._close_criterion(criterion)
                self.criteria[index] = None

    def _close_criterion(self, criterion: importance.Criterion) -> None:
        if isinstance(criterion, importance.Wanda):
            criterion.watch(False)
        else:
            criterion.close()

    def _observe(self, scale: float, names: Collection[str]) -> None:
        """The gradients of these parameters are there, times `scale`, and their optimizer is about to use them."""
        if not self._hooks_are_seen:
            self._require_seen_hooks()
        for criterion in self.criteria:
            if criterion is not None:
                criterion.observe(scale, names)

    def _require_seen_hooks(self) -> None:
        """Raise RecipeError or warn, after the first backward, if a hook that is needed at some later step was not called."""
        flat = self._holding is not None  # its gradients are elsewhere, and those of all parameters are there
        trained = [name for name, p in self._parameters.items() if p.grad is not None or (flat and p.requires_grad)]
        if not trained:
            return
        self._hooks_are_seen = True
        for index, wanda in self._wandas.items():
            if self.done >= self._entries[index].last:
                continue
            uncalled = [name for name in wanda.not_called if name in trained]
            if uncalled and len(wanda.not_called) == len(self.names_of[index]):
                raise RecipeError(
                    f"prune[{index}].criterion: wanda has seen no input of {reach.listed(uncalled)} in training mode, though "
                    f"there are gradients: their modules are not called, or it is {LATE}"
                )
            if uncalled:
                warn(
                    f"prune[{index}].criterion: wanda has seen no input of {reach.listed(uncalled)} in training mode, though "
                    "there are gradients: they will be left out, unless their modules are called before "
                    f"step {self._entries[index].start}"
                )
        self._on_first_gradients()

    @torch.no_grad()
    def _prune(self, index: int, entry: Prune) -> None:
        names = self.names_of[index]
        now = {name: self.masks.of[name] for name in names if name in self.masks.of}
        criterion = self.criteria[index] or self._criterion(index)
        try:
            with self._synced(), self._whole():  # between syncs of local steps the ranks' weights differ
                scores = criterion.scores()
        except ValueError as error:
            raise RecipeError(f"prune[{index}].criterion: {error}") from None
        if self.criteria[index] is None:
            self._close_criterion(criterion)
        if unseen := [name for name in names if name not in scores and name not in now]:
            warn(f"prune[{index}].criterion: wanda has seen no input of {reach.listed(unseen)}: not pruned")
        if entry.threshold is not None:
            masks = pruning.by_threshold(scores, entry.threshold)
            if all(bool(mask.all()) for mask in masks.values()):
                warn(f"prune[{index}].threshold: no weight scores below {entry.threshold}, none is pruned")
        elif entry.pattern is not None:
            last = {name: self._layouts[name].inputs_last(s) for name, s in scores.items()}
            found = pruning.n_of_m(last, *entry.n_of_m)
            masks = {name: self._layouts[name].from_inputs_last(mask) for name, mask in found.items()}
        elif entry.how == "regrow" and self.done > entry.start:
            share = pruning.share_at(self.done, entry.start, entry.last, entry.regrow)
            self._take({**self.masks.of, **pruning.regrow(now, scores, self._wanted(names), share)})
            return
        else:
            assert entry.amount is not None
            schedule = "one-shot" if entry.how == "regrow" else entry.how
            amount = pruning.amount_at(self.done, entry.start, entry.last, entry.amount, schedule)
            masks = self._by_amount(scores, amount, entry.scope, now)
        # what an entry before this one has pruned stays pruned
        self._take({**self.masks.of, **{name: mask & now.get(name, mask) for name, mask in masks.items()}})

    def _by_amount(
        self, scores: Mapping[str, Tensor], amount: float, scope: str, keep: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if scope != "row":
            return pruning.by_amount(scores, amount, scope, keep)
        scores, keep = ({name: self._layouts[name].turned(x) for name, x in each.items()} for each in (scores, keep))
        masks = pruning.by_amount(scores, amount, scope, keep)
        return {name: self._layouts[name].turned(mask) for name, mask in masks.items()}

    def _wanted(self, names: Collection[str]) -> dict[str, Tensor]:
        """The mean gradients of pruned weights, in absolute value. Collective.

        A rank has what it saw, which may not be means: of several backwards in a step only the last may have been exchanged,
        and DeepSpeed exchanges behind a backward. The mean of that over the ranks is the mean; the mean of means is the mean.
        """
        dense = {name: g for name, g in self.steps.dense.items() if name in names}
        session = self._session
        if session is not None and session.world_size > 1:
            has = torch.tensor([name in dense for name in names], dtype=torch.int64, device=self._device)
            dist.all_reduce(has, dist.ReduceOp.MAX, group=session.group)
            for name in [name for name, any_has in zip(names, has.tolist(), strict=True) if any_has]:
                p, held = self._parameters[name], self.masks.held[name]
                if held.is_flat:  # each rank has the means of its part
                    dist.all_reduce(dense.setdefault(name, held.nothing()), group=session.group)
                elif not isinstance(p, DTensor):
                    g = dense.setdefault(name, torch.zeros_like(p, requires_grad=False))
                    dist.all_reduce(g, group=session.group)
                    g /= session.world_size
        return {name: whole(g).abs() for name, g in dense.items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _take(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks, once the ranks have compared them: if one differs nothing changes."""
        if self._session is not None:
            self._session.set_masks(self.masks.ordered(masks))
        told = self._empty
        empty = [n for n, mask in masks.items() if n not in told and mask.dim() > 1 and mask.numel() and not mask.any()]
        self.masks.replace(masks)
        self._unchecked = 0
        if empty:
            told |= set(empty)
            warn(
                f"step {self.done}: all weights of {reach.listed(empty)} are pruned, and nothing gets through any more; scope "
                "'local' or 'row' keeps some in each"
            )
        for optimizer in self.steps.optimizers:
            for each in states_of(optimizer):
                self.masks.clean(each)

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which each rank has whole parameters, where there are entries; those of FSDP2 stay DTensors."""
        return contextlib.nullcontext() if self._holding is None or not self._entries else self._holding.whole()

    def _synced(self) -> contextlib.ExitStack:
        """Return a context in which all ranks have the same weights."""
        stack: contextlib.ExitStack = contextlib.ExitStack()
        for optimizer in self.steps.optimizers:
            if isinstance(optimizer, LocalSteps):
                stack.enter_context(optimizer.synced())
        return stack
