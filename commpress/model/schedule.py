"""The scheduler: carries out a recipe while a training runs, step by step, the same on all ranks.

    scheduler = Scheduler(recipe, model, optimizer, session=session, teacher=teacher)
    for x, y in batches:
        output = wrapped(x)
        scheduler.loss(task_loss(output, y), output, x).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

Pruned weights are 0, so are their gradients and what the optimizer remembers of them, and they do not travel: the session
packs what is kept. Masks follow from what all ranks have alike, weights and mean gradients; the session compares their hashes.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model import importance, layers, pruning, quantization, reach
from commpress.model.distillation import PROJECTIONS, Distillation, Distiller, fingerprint
from commpress.model.masks import Masks, from_state, whole
from commpress.model.reach import Reach
from commpress.model.recipe import Prune, Quantize, Recipe, RecipeError, naming_the_file
from commpress.model.steps import Steps, states_of
from commpress.notice import warn

STATE_VERSION = 1
CHECKED, CHECK_EVERY = 3, 100
"""Behind so many steps after a change of masks, and every so many steps, it is checked that pruned weights are 0."""
LATE = "a model that was compiled and called before the Scheduler was made (then make the Scheduler first, or call \
torch.compiler.reset() before)"


class Session(Protocol):
    """What a scheduler asks of what `commpress.attach` returns."""

    world_size: int

    def agree(self, settings: Mapping[str, object]) -> None:
        """Raise ValueError on all ranks if these differ."""

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """From the next step on only what these masks keep travels."""

    def send_dense(self, on: bool) -> None:
        """While on, exact gradients of all values travel."""

    def phase(self, name: str) -> None:
        """Call the report's rows by this name from now on."""


@naming_the_file
def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Make a model ready for what a recipe does to its modules. For FSDP2 before `fully_shard`; else the scheduler does it.

    Its forward, its parameters and their names stay as they are. Raises RecipeError for layers that do not exist or do not
    fit.
    """
    for index, entry in enumerate(recipe.quantize):
        try:
            quantization.prepare(model, _settings(entry))
        except ValueError as error:
            raise RecipeError(f"quantize[{index}]: {error}") from None


class Scheduler:
    """A recipe at work on a model. Collective where ranks share it: all of them make one, at the same point.

    `model` is the module itself, not its DDP; or what `fully_shard` took, or what `torch.compile` returned and nobody has
    called. `optimizer` is one or a list: all that move weights which the recipe prunes; what Accelerate or Lightning made of
    them does as well. `session` is what `commpress.attach` returned, and is needed with more than one rank. `teacher` is a
    model of any kind, for a recipe that distils. Call `loss` in each backward and `step` after each optimizer step, once if
    there are several. `phase` says what goes on now.

    Raises RecipeError, naming the key, if the recipe does not fit the model, TypeError or ValueError if something is missing,
    as an optimizer. What is left out, and a share below a half of the model, is a warning, from rank 0.
    """

    @naming_the_file
    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        session: Session | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        given = [*optimizer] if isinstance(optimizer, Sequence) else [optimizer]
        self.recipe, self.model, self.optimizer = recipe, layers.uncompiled(model), given[0] if given else None
        self.done = 0
        """Optimizer steps so far."""
        self._session, self._teacher = session, teacher
        self.model.state_dict(keep_vars=True)  # FSDP shards what an evaluation has left whole
        self._parameters = layers.named_parameters(self.model)
        sharded = any(isinstance(p, DTensor) for p in self._parameters.values())
        if session is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                'Scheduler: expected session=, as commpress.attach(ddp, "none") returns it, on several ranks'
            )
        if recipe.quantize and not quantization.is_prepared(self.model):
            if sharded:
                raise ValueError("Scheduler: call prepare(model, recipe) before fully_shard")
            prepare(self.model, recipe)
        self._pruned = reach.chosen(recipe, self.model, given)
        self.masks = Masks(self._parameters)
        self._steps = Steps(given, {n: self._parameters[n] for n in self._of_entries()}, self.masks, self._observe)
        self._layouts = {name: layers.layout_of(self.model, name) for name in self._of_entries()}
        self._wandas: dict[int, importance.Wanda] = {}
        self._criteria: list[importance.Criterion | None] = [None for _ in recipe.prune]
        self._unchecked = 0  # steps since the masks changed
        self._empty: set[str] = set()  # parameters of which nothing is left, told
        self._unsteady: set[str] = set()  # parameters that something has moved where they are pruned
        self._hooks_are_seen = False
        # now: a wrong name is told at once, and what is compiled later has its hooks
        self._distiller = self._distilling()
        self._agree()
        self._tell_reach()
        if teacher is not None and recipe.distil is None:
            warn("Scheduler: a teacher was given, and the recipe has no [distil]: it is not asked")
        self._advance()

    @property
    def reach(self) -> Reach:
        """What share of the model is pruned, and what is left out. Of sharded weights that moved, this rank's part counts."""
        pruned = self.masks.sparsity
        masked = sum(mask.numel() for mask in self.masks.of.values())
        total = sum(p.numel() for name, p in self._parameters.items() if not name.startswith(PROJECTIONS))
        chosen = sum(self._parameters[name].numel() for name in self._of_entries())
        left_out = reach.left_out(self.model, self._of_entries()) if self.recipe.prune else {}
        return Reach(pruned * masked / max(chosen, 1), pruned * masked / max(total, 1), left_out)

    @property
    def phase(self) -> str:
        """Return what goes on: "dense", or "prune", "pruned", "int8", "distil", joined by " + "."""
        on = []
        if any(entry.start <= self.done < entry.last for entry in self.recipe.prune):
            on.append("prune")
        elif self.masks.of:
            on.append("pruned")
        on += sorted({f"int{entry.bits}" for entry in self.recipe.quantize if entry.start <= self.done})
        on += ["distil"] * self._distils
        return " + ".join(on) or "dense"

    def loss(self, task_loss: Tensor, output: Any, *inputs: Any, **named_inputs: Any) -> Tensor:
        """The loss that backward starts from: `task_loss`, and what the teacher says to the same inputs while it is asked.

        `output` is the student's: logits, or a Transformers output that has them.
        """
        if self._distiller is None or not self._distils:
            for p in getattr(self.model, PROJECTIONS, nn.Module()).parameters():
                if not isinstance(p, DTensor):  # DDP waits for a gradient of all its parameters
                    task_loss = task_loss + 0 * p.sum()
            return task_loss
        return self._distiller.loss(task_loss, output, *inputs, **named_inputs)

    @naming_the_file
    def step(self) -> None:
        """An optimizer step was taken: do what the recipe wants done now. Collective.

        Raises ValueError on all ranks, with the parameter's name, if their masks differ.
        """
        self.done += 1
        self._steps.stand_closest()
        self._check()
        self._advance()

    def state_dict(self) -> dict[str, Any]:
        """Masks, scores, the recipe and how far it is, and which teacher it was. Each rank saves its own: scores may differ.

        Of fake quantisers their settings, and which are on: their scales follow from the weights.
        """
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_dict(),
            "done": self.done,
            "masks": self.masks.state_dict(),
            "criteria": [None if each is None else each.state_dict() for each in self._criteria],
            "quantization": quantization.state_dict(self.model),
            "teacher": None if self._teacher is None else fingerprint(self._teacher),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` saved; training goes on bit for bit. Collective. Load model and optimizer before, the
        session behind it.

        Another recipe may follow from here on, as long as what it has done so far is what was saved: a run forks. Raises
        ValueError for another version, another teacher, or a recipe that would have done something else by now.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"cannot restore: a scheduler's state of version {state.get('version')!r}, not {STATE_VERSION}"
            )
        done = int(state["done"])
        saved = Recipe.of(state["recipe"], "the saved recipe")
        self._require_same_past(saved, done)
        now = None if self._teacher is None else fingerprint(self._teacher)
        if state["teacher"] is not None and now is not None and now != state["teacher"]:
            raise ValueError(f"cannot restore: the saved run had a teacher {state['teacher']}, this one has {now}")
        self.done = done
        self._close_criteria()
        self._take({layers.plain(name): mask for name, mask in from_state(state["masks"]).items()})
        for index, (entry, before, seen) in enumerate(
            zip(self.recipe.prune, saved.prune, state["criteria"], strict=False)
        ):
            if seen is not None and entry == before:  # another starts anew
                self._criteria[index] = criterion = self._criterion(index)
                criterion.load_state_dict({layers.plain(name): of for name, of in seen.items()})
        for index, entry in enumerate(self.recipe.prune):
            if self._criteria[index] is None and self._watches(entry):
                self._criteria[index] = self._criterion(index)
        if self.recipe.quantize == saved.quantize:
            quantization.load_state_dict(self.model, state["quantization"])
        else:
            for late in self.recipe.quantize:
                quantization.enable(self.model, on=late.start <= done, settings=_settings(late))
        self._announce()

    def begin_at(self, done: int) -> None:
        """Go on with a run that had no recipe, behind `done` steps. Collective. Raises ValueError as `load_state_dict` does."""
        self.load_state_dict(
            {
                **self.state_dict(),
                **{"recipe": {}, "done": done, "masks": {}, "criteria": []},
            }
        )

    def close(self) -> None:
        """Take off all hooks."""
        self._steps.close()
        self._close_criteria()
        for wanda in self._wandas.values():
            wanda.close()
        self._wandas.clear()
        if self._distiller is not None:
            self._distiller.close()
            self._distiller = None

    # how it works

    @property
    def _distils(self) -> bool:
        distil = self.recipe.distil
        return distil is not None and distil.start <= self.done < distil.last

    def _of_entries(self) -> list[str]:
        """The parameters that any entry prunes."""
        return list(dict.fromkeys(name for names in self._pruned for name in names))

    def _tell_reach(self) -> None:
        """A default that reaches less than half of the model is not what it sounds like."""
        if any(not entry.parameters for entry in self.recipe.prune):
            chosen = sum(self._parameters[name].numel() for name in self._of_entries())
            total = sum(p.numel() for name, p in self._parameters.items() if not name.startswith(PROJECTIONS))
            if 2 * chosen < total:
                warn(
                    f"the recipe prunes among {chosen:,} of {total:,} parameters, {chosen / total:.1%} of the model; "
                    f"left out: {reach.listed(self.reach.left_out)}"
                )

    def _agree(self) -> None:
        """The ranks compare recipe and teacher, and whether masks can be had, before the first step."""
        for index in range(len(self.recipe.prune)):
            self._close_criterion(self._criterion(index))
        if self._session is None:
            return
        teacher = None if self._teacher is None else fingerprint(self._teacher)
        self._session.agree({"recipe": self.recipe.to_dict(), "teacher": teacher})
        if self.recipe.prune:
            whole_masks = {
                name: torch.ones(self._parameters[name].shape, dtype=torch.bool, device=self._parameters[name].device)
                for name in self._of_entries()
            }
            self._session.set_masks(self.masks.ordered(whole_masks))
            self._session.set_masks({})

    def _distilling(self) -> Distiller | None:
        distil = self.recipe.distil
        if distil is None:
            return None
        if self._teacher is None:
            raise TypeError("Scheduler: the recipe distils, expected teacher=")
        settings = distil.model_dump(exclude={"start", "end", "teacher"})
        try:
            return Distiller(self.model, self._teacher, Distillation(**settings))
        except ValueError as error:
            raise RecipeError(f"distil: {error}") from None

    def _advance(self) -> None:
        """What is due behind `done` steps."""
        for index, entry in enumerate(self.recipe.prune):
            if entry.due(self.done):
                self._prune(index, entry)
            if not self._watches(entry):
                self._close_criteria(index)
            elif self._criteria[index] is None:
                self._criteria[index] = self._criterion(index)
        for late in self.recipe.quantize:
            if late.start == self.done:
                quantization.enable(self.model, settings=_settings(late))
        self._announce()

    def _announce(self) -> None:
        """Tell the session what goes on, and whether the next step looks at all gradients."""
        if self._distiller is not None:
            self._distiller.watch(self._distils)
        looks = [
            name
            for names, entry in zip(self._pruned, self.recipe.prune, strict=True)
            if entry.how == "regrow" and entry.start < self.done + 1 < entry.last and entry.due(self.done + 1)
            for name in names
        ]
        self._steps.look(looks)
        if self._session is not None:
            self._session.send_dense(bool(looks))
            self._session.phase(self.phase)

    def _watches(self, entry: Prune) -> bool:
        """Whether what happens in the next step counts for the entry's scores."""
        return entry.start - entry.every <= self.done < entry.last

    def _criterion(self, index: int) -> importance.Criterion:
        kind = importance.CRITERIA[self.recipe.prune[index].criterion]
        try:
            parameters = {name: self._parameters[name] for name in self._pruned[index]}
            if kind is not importance.Wanda:
                return kind(self.model, parameters, getattr(self._session, "group", None))
            if index not in self._wandas:  # its hooks stay: those that come behind a compiled call are not called
                self._wandas[index] = importance.Wanda(self.model, parameters, getattr(self._session, "group", None))
            self._wandas[index].watch(True)
            return self._wandas[index]
        except ValueError as error:
            raise RecipeError(f"prune[{index}].criterion: {error}") from None

    def _close_criteria(self, only: int | None = None) -> None:
        for index, criterion in enumerate(self._criteria):
            if criterion is not None and only in (None, index):
                self._close_criterion(criterion)
                self._criteria[index] = None

    def _close_criterion(self, criterion: importance.Criterion) -> None:
        if isinstance(criterion, importance.Wanda):
            criterion.watch(False)
        else:
            criterion.close()

    def _before_step(self) -> None:
        """Gradients are there, and the first optimizer is about to use them."""
        self._steps.arrived()

    def _observe(self, scale: float, names: Collection[str]) -> None:
        """The gradients of these parameters are there, times `scale`, and their optimizer is about to use them."""
        if not self._hooks_are_seen:
            self._require_seen_hooks()
        for criterion in self._criteria:
            if criterion is not None:
                criterion.observe(scale, names)

    def _require_seen_hooks(self) -> None:
        """Behind the first backward: have the hooks been called that are needed at some later step?"""
        trained = [name for name in self._parameters if self._parameters[name].grad is not None]
        if not trained:
            return
        self._hooks_are_seen = True
        for index, wanda in self._wandas.items():
            if self.done >= self.recipe.prune[index].last:
                continue
            uncalled = [name for name in wanda.not_called if name in trained]
            if uncalled and len(wanda.not_called) == len(self._pruned[index]):
                raise RecipeError(
                    f"prune[{index}].criterion: wanda has seen no input of {reach.listed(uncalled)} in training mode, though "
                    f"there are gradients: their modules are not called, or it is {LATE}"
                )
            if uncalled:
                warn(
                    f"prune[{index}].criterion: wanda has seen no input of {reach.listed(uncalled)} in training mode, though "
                    "there are gradients: they will be left out, unless their modules are called before "
                    f"step {self.recipe.prune[index].start}"
                )
        ahead = self.recipe.distil is not None and self.done < self.recipe.distil.last
        if ahead and self._distiller is not None and (unseen := self._distiller.not_called):
            raise RecipeError(
                f"distil.{unseen[0][0]}: the student's {unseen[0][1]!r} was not called in the first forward, or it is {LATE}"
            )

    def _check(self) -> None:
        """Pruned weights are 0, or one warning says which are not, and they are set to 0 behind each step from now on."""
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

    @torch.no_grad()
    def _prune(self, index: int, entry: Prune) -> None:
        names = self._pruned[index]
        now = {name: self.masks.of[name] for name in names if name in self.masks.of}
        criterion = self._criteria[index] or self._criterion(index)
        try:
            with self._alike():  # between syncs of local steps the ranks' weights differ
                scores = criterion.scores()
        except ValueError as error:
            raise RecipeError(f"prune[{index}].criterion: {error}") from None
        if self._criteria[index] is None:
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

        Of several backwards in a step only the last may have been exchanged. Each rank has the sums of what it saw; their
        mean over the ranks is that of the gradients, as the mean of means is the mean.
        """
        dense = {name: g for name, g in self._steps.dense.items() if name in names}
        session = self._session
        if session is not None and session.world_size > 1:
            group = getattr(session, "group", None)
            found = torch.tensor(
                [self._steps.backwards, *(name in dense for name in names)], dtype=torch.int64, device=self._device
            )
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            backwards, *has = found.tolist()
            for name in [name for name, any_has in zip(names, has, strict=True) if any_has and backwards > 1]:
                if not isinstance(self._parameters[name], DTensor):
                    g = dense.setdefault(name, torch.zeros_like(self._parameters[name], requires_grad=False))
                    dist.all_reduce(g, group=group)
                    g /= session.world_size
        return {name: whole(g).abs() for name, g in dense.items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _take(self, masks: Mapping[str, Tensor]) -> None:
        """The ranks compare masks first: one that differs changes nothing."""
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
        for optimizer in self._steps.optimizers:
            for each in states_of(optimizer):
                self.masks.clean(each)

    def _alike(self) -> contextlib.ExitStack[None]:
        stack: contextlib.ExitStack[None] = contextlib.ExitStack()
        for optimizer in self._steps.optimizers:
            if (synced := getattr(optimizer, "synced", None)) is not None:
                stack.enter_context(synced())
        return stack

    def _require_same_past(self, saved: Recipe, done: int) -> None:
        """What was done by now must be what this recipe would have done."""
        for name in ("prune", "quantize"):
            before, now = (list(getattr(recipe, name)) for recipe in (saved, self.recipe))
            for index in range(max(len(before), len(now))):
                one, other = before[index : index + 1], now[index : index + 1]
                if one != other and any(entry.start <= done for entry in one + other):
                    raise ValueError(
                        f"cannot restore: by step {done} {name}[{index}] has begun, and the saved run's is another than this "
                        "recipe's"
                    )


def _settings(entry: Quantize) -> quantization.Quantization:
    return quantization.Quantization(
        bits=entry.bits, group=entry.group, activations=entry.activations, layers=entry.layers
    )
