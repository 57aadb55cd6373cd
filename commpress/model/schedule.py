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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model import budget, layers, quantization, ranges
from commpress.model.distillation import PROJECTIONS, Distillation, Distiller, fingerprint
from commpress.model.export import Exported, by_recipe
from commpress.model.export import require as require_packages
from commpress.model.first_rank import done_by_first_rank, told_by_first_rank
from commpress.model.judgement.quality import Loss
from commpress.model.masks import Masks
from commpress.model.pruner import LATE, Pruner, Session
from commpress.model.reach import Reach
from commpress.model.recipe import Budget, Quantize, Recipe, RecipeError, naming_the_file
from commpress.notice import warn

STATE_VERSION = 1


@naming_the_file
def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Make a model ready for what a recipe does to its modules. Call it before `fully_shard`; elsewhere the scheduler does it.

    Forward, parameters and names stay as they are. A model that this recipe has prepared already is not changed. Raises
    RecipeError for layers that do not exist or do not fit.
    """
    before = {settings for _, _, settings in quantization.prepared(model)}
    if before and before <= {_settings(entry) for entry in recipe.quantize}:
        return
    for index, entry in enumerate(recipe.quantize):
        try:
            quantization.prepare(model, _settings(entry))
        except ValueError as error:
            raise RecipeError(f"quantize[{index}]: {error}") from None


class Scheduler:
    """A recipe at work on a model. Collective: all ranks make one, at the same point.

    `model` is the module itself, not its DDP; or what `fully_shard` took, or what `torch.compile` returned before its first
    call. `optimizer` is one optimizer or a list: all that change weights which the recipe prunes, also as Accelerate or
    Lightning wrapped them. `session` is what `commpress.attach` returned, and is required with more than one rank. `teacher`
    is a model of any kind, for a recipe that distils. `restoring` says that model and optimizer hold a checkpoint already and
    `load_state_dict` or `begin_at` comes next; until then nothing is pruned. `held_out` are this rank's batches (inputs,
    targets) for a recipe with a budget; `budget_loss` takes outputs and targets, if the loss is not the usual one
    (`commpress.model.judge`). `example_inputs` are the model's positional arguments, a tuple, for a recipe with an [export];
    `finish` writes its files. Call `loss` in each backward, and `step` after each optimizer step, once if there are several
    optimizers. `phase` names what goes on now.

    Raises RecipeError, with the key, if the recipe does not fit the model; TypeError or ValueError if something is missing,
    such as an optimizer. Rank 0 warns of weights that the recipe leaves out, and if it prunes less than half of the model.
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
        restoring: bool = False,
        held_out: Sequence[tuple[Any, Tensor]] = (),
        budget_loss: Loss | None = None,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> None:
        given = [*optimizer] if isinstance(optimizer, Sequence) else [optimizer]
        self.recipe, self.model, self.optimizer = recipe, layers.uncompiled(model), given[0] if given else None
        self._session, self._teacher = session, teacher
        self._optimizers, self._held_out, self._budget_loss = given, held_out, budget_loss
        if recipe.chooses and not held_out:
            raise TypeError("Scheduler: the recipe has a [budget], expected held_out=, batches (inputs, targets)")
        if recipe.chooses and recipe.budget is not None and recipe.budget.structure and recipe.budget.removed is None:
            raise RecipeError(
                "budget.structure: is removed before the model is wrapped, and a scheduler comes after that: call `recipe, _ = "
                "commpress.model.narrowing.narrow(model, recipe, (x,), batches)` before, and give the recipe that it returns"
            )
        if recipe.search is not None:
            raise RecipeError(
                "search: comes before the run, in `commpress train` by itself, elsewhere by your own call of "
                "commpress.model.search.search; expected the recipe after it, recipe.after_search(...)"
            )
        if recipe.export is not None and not isinstance(example_inputs, tuple):
            raise TypeError("Scheduler: the recipe has an [export], expected example_inputs=, a tuple")
        self._example_inputs = example_inputs
        self._asked = False
        """Whether the teacher has answered since the last step."""
        self.model.state_dict(keep_vars=True)  # FSDP shards what an evaluation has left whole
        sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        self.is_gathered = session is not None and session.holding is not None and session.holding.gathers
        """Whether the model's parameters are whole only while it computes with them, as under ZeRO 3."""
        self._sharded = sharded or self.is_gathered
        if recipe.chooses and self.is_gathered:
            raise ValueError(
                "Scheduler: budget: the parameters are sharded, expected a model that is whole on each rank"
            )
        if session is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                'Scheduler: expected session=, as commpress.attach(ddp, "none") returns it, on several ranks'
            )
        if recipe.quantize and not quantization.is_prepared(self.model):
            if sharded:
                raise ValueError("Scheduler: call prepare(model, recipe) before fully_shard")
            prepare(self.model, recipe)
        self._pruner = Pruner(recipe, self.model, given, session, self._require_called)
        # now: a wrong name is told at once, and what is compiled later has its hooks
        self._distiller = self._distilling()
        self._agree()
        self._require_packages()
        self._pruner.tell_reach()
        if teacher is not None and recipe.distil is None:
            warn("Scheduler: a teacher was given, and the recipe has no [distil]: it is not asked")
        if not restoring:
            self._advance()

    @property
    def done(self) -> int:
        """Optimizer steps so far."""
        return self._pruner.done

    @property
    def masks(self) -> Masks:
        """The masks of what is pruned."""
        return self._pruner.masks

    @property
    def reach(self) -> Reach:
        """The share of the model that is pruned, and what is left out. This rank's part of sharded weights counts."""
        return self._pruner.reach

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
        """Return the loss that backward starts from: `task_loss`, and the teacher's part while the recipe distils.

        `output` is the student's: logits, or a Transformers output that holds them.
        """
        if self._distiller is None or not self._distils:
            for p in getattr(self.model, PROJECTIONS, nn.Module()).parameters():
                if not isinstance(p, DTensor):  # DDP waits for a gradient of all its parameters
                    task_loss = task_loss + 0 * p.sum()
            return task_loss
        self._asked = True
        return self._distiller.loss(task_loss, output, *inputs, **named_inputs)

    @naming_the_file
    def step(self) -> None:
        """Do what the recipe says after an optimizer step. Collective.

        Raises ValueError on all ranks, with the parameter's name, if their masks differ; RuntimeError, on this rank alone, if
        the recipe distils and `loss` was not called.
        """
        if self._distils and not self._asked:
            raise RuntimeError(
                f"Scheduler.step(): the recipe distils in step {self.done}, and loss() was not called: expected "
                "scheduler.loss(task_loss, output, x).backward()"
            )
        self._asked = False
        self._pruner.done += 1
        self._pruner.steps.stand_closest()
        self._pruner.check()
        ranges.learn(self.model, None if self._session is None else self._session.group)
        self._advance()

    @naming_the_file
    def finish(self, folder: str | Path) -> list[Exported]:
        """Write the files of [export] on the first rank, into its folder inside of `folder`; what was written there.

        Collective. Raises RecipeError if the recipe is not over, ValueError for sharded parameters and, with the reason, for a
        format that cannot be written; the others are then. Without [export] nothing is done.
        """
        its = self.recipe.export
        if its is None:
            return []
        self.recipe.require_within(self.done)
        if self._sharded:
            raise ValueError("export: the parameters are sharded, expected a model that is whole on each rank")
        assert self._example_inputs is not None
        written, example = list[Exported](), self._example_inputs

        def write() -> list[str]:
            try:
                files, failed = by_recipe.export_by(its, self.model, Path(folder), example)
            except Exception as error:  # the others wait for this rank's word, whatever it met
                return [str(error)]
            written.extend(files)
            return failed

        failed = write() if self._session is None else done_by_first_rank(write, self._session.group, self._device)
        if failed:
            raise ValueError(f"export: {'; '.join(failed)}")
        return written

    def state_dict(self) -> dict[str, Any]:
        """Return masks, scores, the recipe and its step, and the teacher's name. Each rank saves its own, since scores may
        differ.

        Fake quantisers are saved as their settings, and whether they are on: their scales follow from the weights.
        """
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_dict(),
            "done": self.done,
            **self._pruner.state_dict(),
            "quantization": quantization.state_dict(self.model),
            "teacher": None if self._teacher is None else fingerprint(self._teacher),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` saved; training goes on bit for bit. Collective. Load model and optimizer before, the
        session behind it.

        What a budget came to is in the saved recipe: prepare a fresh model for that one before its state is loaded. Another
        recipe may follow from here on, as long as what it has done so far is what was saved: a run forks. Raises
        ValueError for another version, another teacher, or a recipe that would have done something else by now.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"cannot restore: a scheduler's state of version {state.get('version')!r}, not {STATE_VERSION}"
            )
        done = int(state["done"])
        saved = Recipe.of(state["recipe"], "the saved recipe")
        if saved.budget is not None and saved.budget.settled and self._follows(saved.budget):
            self._follow(saved)
        self._require_same_past(saved, done)
        its = self.recipe.budget
        if its is not None and self.recipe.chooses and its.start <= done:
            raise ValueError(
                f"cannot restore: budget.start is {its.start}, and the saved run is at step {done}: expected more"
            )
        now = None if self._teacher is None else fingerprint(self._teacher)
        if state["teacher"] is not None and now is not None and now != state["teacher"]:
            raise ValueError(f"cannot restore: the saved run had a teacher {state['teacher']}, this one has {now}")
        self._pruner.load_state_dict(state, saved, done)
        if self.recipe.quantize == saved.quantize:
            quantization.load_state_dict(self.model, state["quantization"])
        else:
            for late in self.recipe.quantize:
                quantization.enable(self.model, on=late.start <= done, settings=_settings(late))
        self._announce()

    def begin_at(self, done: int) -> None:
        """Go on with a run that had no recipe, after `done` steps. Collective. Raises ValueError as `load_state_dict` does."""
        self.load_state_dict(
            {
                **self.state_dict(),
                **{"recipe": {}, "done": done, "masks": {}, "criteria": []},
            }
        )

    def close(self) -> None:
        """Take off all hooks."""
        self._pruner.close()
        if self._distiller is not None:
            self._distiller.close()
            self._distiller = None

    # how it works

    @property
    def _distils(self) -> bool:
        distil = self.recipe.distil
        return distil is not None and distil.start <= self.done < distil.last

    def _agree(self) -> None:
        """Compare recipe and teacher among the ranks, and whether masks can be had, before the first step."""
        if self._session is None:
            return
        teacher = None if self._teacher is None else fingerprint(self._teacher)
        self._session.agree({"recipe": self.recipe.to_dict(), "teacher": teacher})
        self._pruner.require_masks()

    def _require_packages(self) -> None:
        """Raise RecipeError on all ranks if the first one lacks a package that a format of [export] needs."""
        said = ""
        if self.recipe.export is None:
            return
        try:
            require_packages(self.recipe.export.formats)
        except ModuleNotFoundError as error:
            said = str(error)
        if said := self._told(said):
            raise RecipeError(f"export.formats: {said}")

    def _told(self, value: Any) -> Any:
        """Return the first rank's value on all ranks. Collective."""
        return value if self._session is None else told_by_first_rank(value, self._session.group, self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

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
        """Do what is due behind `done` steps."""
        its = self.recipe.budget
        if its is not None and self.recipe.chooses and its.start == self.done:
            group = None if self._session is None else self._session.group
            self._follow(budget.settled(self.recipe, self.model, self._held_out, self._budget_loss, group))
            self._agree()
        self._pruner.advance()
        for late in self.recipe.quantize:
            if late.start == self.done:
                quantization.enable(self.model, settings=_settings(late))
        self._announce()

    def _follows(self, saved: Budget) -> bool:
        """Whether a saved run's choice is that of this recipe's budget."""
        own = self.recipe.budget
        return own is not None and own.model_copy(update={"settled": True}) == saved

    def _follow(self, recipe: Recipe) -> None:
        """Go on by the entries that the budget came to."""
        done, source = self.done, self.recipe._source
        self._pruner.close()
        self.recipe = recipe
        recipe._source = source
        if not quantization.is_prepared(self.model):
            prepare(self.model, recipe)
        self._pruner = Pruner(recipe, self.model, self._optimizers, self._session, self._require_called)
        self._pruner.done = done

    def _announce(self) -> None:
        """Tell the session what goes on, and whether the next step looks at all gradients."""
        if self._distiller is not None:
            self._distiller.watch(self._distils)
        looks = self._pruner.look()
        if self._session is not None:
            self._session.send_dense(looks)
            self._session.phase(self.phase)

    def _require_called(self) -> None:
        """Raise RecipeError behind the first backward if a module that is distilled at some later step was not called."""
        ahead = self.recipe.distil is not None and self.done < self.recipe.distil.last
        if ahead and self._distiller is not None and (unseen := self._distiller.not_called):
            raise RecipeError(
                f"distil.{unseen[0][0]}: the student's {unseen[0][1]!r} was not called in the first forward, or it is {LATE}"
            )

    def _require_same_past(self, saved: Recipe, done: int) -> None:
        """Raise ValueError if what was done by now is not what this recipe would have done."""
        for name in ("prune", "quantize"):
            before, now = (list(getattr(recipe, name)) for recipe in (saved, self.recipe))
            for index in range(max(len(before), len(now))):
                one, other = before[index : index + 1], now[index : index + 1]
                if one != other and any(entry.start <= done for entry in one + other):
                    raise ValueError(
                        f"cannot restore: by step {done} {name}[{index}] has begun, and the saved run had another entry than "
                        "this recipe"
                    )


def _settings(entry: Quantize) -> quantization.Quantization:
    return quantization.Quantization(
        bits=entry.bits, group=entry.group, activations=entry.activations, layers=entry.layers
    )
