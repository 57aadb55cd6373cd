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
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model import importance, pruning, quantization
from commpress.model.distillation import PROJECTIONS, Distillation, Distiller, fingerprint
from commpress.model.masks import Masks, from_state, whole
from commpress.model.recipe import Prune, Quantize, Recipe, RecipeError, matching, naming_the_file

STATE_VERSION = 1


class Session(Protocol):
    """What a scheduler asks of what `commpress.attach` returns."""

    world_size: int

    def agree(self, settings: Mapping[str, object]) -> None:
        """Raise ValueError on all ranks if these differ."""

    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """From the next step on only what these masks keep travels."""

    def look(self, on: bool) -> None:
        """While on, exact gradients of all values travel."""

    def phase(self, name: str) -> None:
        """What the report's rows are called by from now on."""


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

    `model` is the module itself, not its DDP; or what `fully_shard` took. `session` is what `commpress.attach` returned, and
    is needed with more than one rank. `teacher` is a model of any kind, for a recipe that distils. Call `loss` in each
    backward and `step` after each optimizer step. `phase` says what goes on now.

    Raises RecipeError, naming the key, if the recipe does not fit the model, TypeError or ValueError if something is missing.
    """

    @naming_the_file
    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        session: Session | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self.done = 0
        """Optimizer steps so far."""
        self._session, self._teacher = session, teacher
        model.state_dict(keep_vars=True)  # FSDP shards what an evaluation has left whole
        self._parameters = dict(model.named_parameters())
        sharded = any(isinstance(p, DTensor) for p in self._parameters.values())
        if session is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                'Scheduler: expected session=, as commpress.attach(ddp, "none") returns it, on several ranks'
            )
        if recipe.quantize and not quantization.is_prepared(model):
            if sharded:
                raise ValueError("Scheduler: call prepare(model, recipe) before fully_shard")
            prepare(model, recipe)
        self._pruned = self._prunable()
        self.masks = Masks(self._parameters)
        self._criteria: list[importance.Criterion | None] = [None for _ in recipe.prune]
        self._wanted: dict[str, Tensor] = {}  # mean gradients of pruned weights, in a step that looks at them
        self._looks = False
        self._distiller = self._distilling()  # now, so that a wrong name is told at once
        self._agree()
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self._before_step())]
        if type(optimizer).__module__.split(".")[0] not in ("torch", "commpress") or type(optimizer).__name__ == "Muon":
            # one that may mix a matrix's values moves weights whose gradients are 0
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.masks.apply()))
        self._advance()

    @property
    def phase(self) -> str:
        """What goes on: "dense", or "prune", "pruned", "int8", "distil", joined by " + "."""
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
        if self._distiller is None:
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
        self._take(from_state(state["masks"]))
        for index, (entry, before, seen) in enumerate(
            zip(self.recipe.prune, saved.prune, state["criteria"], strict=False)
        ):
            if seen is not None and entry == before:  # another starts anew
                self._criteria[index] = criterion = self._criterion(index)
                criterion.load_state_dict(seen)
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
        for hook in self._hooks:
            hook.remove()
        self._close_criteria()
        self._distil(False)

    # how it works

    @property
    def _distils(self) -> bool:
        distil = self.recipe.distil
        return distil is not None and distil.start <= self.done < distil.last

    def _prunable(self) -> list[list[str]]:
        """The parameters of each entry. Raises RecipeError for contradictions."""
        usual = [f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        # a tied one has the name of its first place; projections leave before the model does
        usual = [name for name in usual if name in self._parameters and not name.startswith(PROJECTIONS)]
        usual = [name for name in usual if self._parameters[name].requires_grad]
        found: list[list[str]] = []
        for index, entry in enumerate(self.recipe.prune):
            names = usual
            if entry.parameters:
                names = matching(f"prune[{index}].parameters", entry.parameters, list(self._parameters))
            if not names:
                raise RecipeError(f"prune[{index}].parameters: the model has no Linear layers, expected globs of names")
            for before, earlier in enumerate(self.recipe.prune[:index]):
                if (shared := set(found[before]) & set(names)) and not earlier.last < entry.start:
                    if entry.last < earlier.start:
                        raise RecipeError(
                            f"prune[{index}].start: {entry.start}, before prune[{before}] of the same {min(shared)!r}, which "
                            f"starts at {earlier.start}: write the entries in the order of their steps"
                        )
                    raise RecipeError(
                        f"prune[{index}].start: {entry.start}, while prune[{before}] prunes {min(shared)!r}, too, until "
                        f"{earlier.last}"
                    )
            for name in names:
                if not self._parameters[name].requires_grad:
                    raise RecipeError(f"prune[{index}].parameters: {name!r} is frozen, expected one that is trained")
            kind = type(self.optimizer).__name__
            if entry.how == "regrow" and hasattr(self.optimizer, "takes_means"):
                raise RecipeError(f"prune[{index}].schedule: regrow needs mean gradients, {kind} has none")
            if entry.criterion in ("taylor", "movement") and hasattr(self.optimizer, "synced"):
                raise RecipeError(
                    f"prune[{index}].criterion: {entry.criterion} needs gradients that all ranks share; under {kind} each has "
                    "its own between syncs, expected magnitude or wanda"
                )
            self._try(index, entry, names)
            found.append(names)
        return found

    def _try(self, index: int, entry: Prune, names: list[str]) -> None:
        """Raises RecipeError now for what an entry could not do when its time comes."""
        ones = {name: torch.ones(self._parameters[name].shape, dtype=torch.float32, device="cpu") for name in names}
        try:
            if entry.pattern is not None:
                pruning.n_of_m(ones, *entry.n_of_m)
            elif entry.scope == "row":
                pruning.by_amount(ones, 0.0, "row")
        except ValueError as error:
            raise RecipeError(f"prune[{index}].{'pattern' if entry.pattern else 'scope'}: {error}") from None

    def _agree(self) -> None:
        """The ranks compare recipe and teacher, and whether masks can be had, before the first step."""
        for index in range(len(self.recipe.prune)):
            self._criterion(index).close()
        if self._session is None:
            return
        teacher = None if self._teacher is None else fingerprint(self._teacher)
        self._session.agree({"recipe": self.recipe.to_dict(), "teacher": teacher})
        if self.recipe.prune:
            whole_masks = {
                name: torch.ones(self._parameters[name].shape, dtype=torch.bool, device="cpu")
                for names in self._pruned
                for name in names
            }
            self._session.keep(self.masks.ordered(whole_masks))
            self._session.keep({})

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

    def _distil(self, on: bool) -> None:
        """Out of its phase a teacher's hooks are off."""
        if on and self._distiller is None:
            self._distiller = self._distilling()
        elif not on and self._distiller is not None:
            self._distiller.close()
            self._distiller = None

    def _announce(self) -> None:
        """Tell the session what goes on, and whether the next step looks at all gradients."""
        self._distil(self._distils)
        self._wanted = {}
        self._looks = any(
            entry.how == "regrow" and entry.start < self.done + 1 < entry.last and entry.due(self.done + 1)
            for entry in self.recipe.prune
        )
        if self._session is not None:
            self._session.look(self._looks)
            self._session.phase(self.phase)

    def _watches(self, entry: Prune) -> bool:
        """Whether what happens in the next step counts for the entry's scores."""
        return entry.start - entry.every <= self.done < entry.last

    def _criterion(self, index: int) -> importance.Criterion:
        kind = importance.CRITERIA[self.recipe.prune[index].criterion]
        try:
            parameters = {name: self._parameters[name] for name in self._pruned[index]}
            return kind(self.model, parameters, getattr(self._session, "group", None))
        except ValueError as error:
            raise RecipeError(f"prune[{index}].criterion: {error}") from None

    def _close_criteria(self, only: int | None = None) -> None:
        for index, criterion in enumerate(self._criteria):
            if criterion is not None and only in (None, index):
                criterion.close()
                self._criteria[index] = None

    @torch.no_grad()
    def _before_step(self) -> None:
        """Gradients are there, and the optimizer is about to use them."""
        found_inf = getattr(
            self.optimizer, "found_inf", None
        )  # a GradScaler leaves it to fused ones to skip their step
        if found_inf is not None and bool(found_inf):
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        for criterion in self._criteria:
            if criterion is not None:
                criterion.observe(1.0 if scale is None else float(scale))
        if self._looks:
            regrowing = [
                names for names, entry in zip(self._pruned, self.recipe.prune, strict=True) if entry.how == "regrow"
            ]
            self._wanted = {
                name: whole(g).abs()  # masking p.grad must not reach it
                for names in regrowing
                for name in names
                if (g := self._parameters[name].grad) is not None
            }
        self.masks.apply_to_gradients()  # a session has not seen all of them: in a local step, on one rank, in a look

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
            criterion.close()
        if entry.threshold is not None:
            masks = pruning.by_threshold(scores, entry.threshold)
        elif entry.pattern is not None:
            masks = pruning.n_of_m(scores, *entry.n_of_m)
        elif entry.how == "regrow" and self.done > entry.start:
            share = pruning.share_at(self.done, entry.start, entry.last, entry.regrow)
            self._take({**self.masks.of, **pruning.regrow(now, scores, self._wanted, share)})
            return
        else:
            assert entry.amount is not None
            schedule = "one-shot" if entry.how == "regrow" else entry.how
            amount = pruning.amount_at(self.done, entry.start, entry.last, entry.amount, schedule)
            masks = pruning.by_amount(scores, amount, entry.scope, keep=now)
        # what an entry before this one has pruned stays pruned
        self._take({**self.masks.of, **{name: mask & now.get(name, mask) for name, mask in masks.items()}})

    def _take(self, masks: Mapping[str, Tensor]) -> None:
        """The ranks compare masks first: one that differs changes nothing."""
        if self._session is not None:
            self._session.keep(self.masks.ordered(masks))
        self.masks.replace(masks)
        self.masks.clean(self.optimizer)

    def _alike(self) -> AbstractContextManager[None]:
        synced = getattr(self.optimizer, "synced", None)
        return contextlib.nullcontext() if synced is None else synced()

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
