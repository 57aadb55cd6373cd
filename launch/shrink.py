"""Shrink a model into a budget: what the exported file may take, instead of percentages.

    commpress shrink --model my_project.models:trained --data my_project.data:batches --max-mb 5 --max-ms 14 --max-loss 1%
    torchrun --nproc-per-node 2 -m commpress.launch.shrink --model my_project.models:trained ...

The model's factory returns a trained torch.nn.Module, the data's function (training, held_out), both of batches (inputs,
targets). Layers are measured, settings chosen, and the model goes on training under them (`commpress.model.budget`). In the end
the exported file is held against the budget, in its own runtime: exit code 1 and a sentence for each limit that it misses.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress import extras
from commpress.launch import budgets, run_folder, runtime, tasks, units
from commpress.launch.predictions import require, say
from commpress.launch.run_record import default_threads
from commpress.launch.runtime import TrainingError, together

try:
    from commpress.launch import command_line
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.shrink", error, "launch") from None

if TYPE_CHECKING:
    from commpress.model import Recipe, Scheduler

TRAFFIC = "traffic.json"
CHANGES = 10
"""About as many steps of pruning, where flags make the recipe; they are over after PART of the training."""
PART = 0.6
Batches = Sequence[tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Shrink:
    """Shrink a model until its exported file fits into a budget, while it trains."""

    model: str = ""
    """The dense model, module:factory; the factory returns a torch.nn.Module. Required."""
    data: str = ""
    """module:function that returns (training, held_out), each of batches (inputs, targets). Required."""
    max_mb: float | None = None
    """The most megabytes that the file may have."""
    max_ms: float | None = None
    """The most milliseconds that a call may take in the file's runtime on one thread, as a median."""
    max_loss: str | None = None
    """The most that the held-out loss may rise, in % of the dense model's, such as 1%."""
    structure: str | None = None
    """The most of each width (heads, channels, feed-forward rows) that may be removed before training, such as 50%, where
    integers and zeros alone miss --max-mb or --max-ms."""
    format: Literal["onnx", "pt2e", "executorch", "safetensors"] = "onnx"
    """The file that must fit. onnx and safetensors leave pruned weights out."""
    recipe: Path | None = None
    """A recipe with [budget] in the place of these limits; it may have [distil], whose teacher is the dense model."""
    steps: int = 500
    """Steps of training."""
    lr: float = 1e-4
    """Learning rate of AdamW at first; it falls to 0 along a cosine."""
    compress: str = "none"
    """Spec of the gradients' traffic on several ranks."""
    out: Path = Path("runs/shrunk")
    """Folder for dense/, small/, judgement.json, judgement.html, model_card.md, recipe.yaml; with --structure
    structure.json, of several ranks traffic.json."""

    def run(self) -> None:
        """Shrink, judge and print. Ends the program with code 1 and a sentence if the budget is not met, or that cannot be."""
        runtime.run_on_all_ranks(self.shrink)

    def shrink(self) -> None:
        """Train on all ranks, judge on rank 0. Collective. Raises TrainingError on all ranks."""
        with runtime.process_group() as device, runtime.in_one_voice():
            recipe = together(self.checked, device)
            torch.set_num_threads(default_threads())
            dense, training, held_out = together(self.loaded, device)
            small = copy.deepcopy(dense).to(device)
            if budgets.takes_structure(recipe):
                recipe = budgets.narrowed(small, recipe, held_out[0][0], self.out, device, held_out)
            scheduler = self.trained(small, dense.to(device), training, held_out, recipe)
            structure = budgets.structure_of(self.out, scheduler.recipe)
            judged = partial(budgets.judged, dense.cpu(), small.cpu(), held_out, scheduler.recipe, self.out, structure)
            missed = list[str]()
            try:  # first: there is no checkpoint, and it writes the model, whatever an export meets
                if short := runtime.by_first_rank(judged, device):
                    missed.append(f"the budget is not met: {'; '.join(short)}")
            except TrainingError as error:
                missed.append(str(error))
            try:
                scheduler.finish(self.out)
            except ValueError as error:  # the same on all ranks
                missed.append(str(error))
            if missed:
                raise TrainingError("; ".join(missed))

    def checked(self) -> "Recipe":
        """The recipe of --recipe or of the limits. Raises ValueError for flags that make no sense."""
        from commpress.model import Recipe

        for flag, text in (("--model", self.model), ("--data", self.data)):
            require(bool(text), f"{flag}: expected module:function, such as my_project.models:trained")
        require(self.steps >= 1, f"--steps {self.steps}: expected a whole number from 1 on")
        require(math.isfinite(self.lr) and self.lr > 0, f"--lr {self.lr}: expected a finite number above 0")
        run_folder.require_writable(self.out)
        limits: dict[str, Any] = {"max_mb": self.max_mb, "max_ms": self.max_ms}
        if self.max_loss is not None:
            limits["max_loss"] = units.share(self.max_loss, "--max-loss")
        if self.structure is not None:
            limits["structure"] = units.share(self.structure, "--structure")
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if self.recipe is not None:
            require(
                not limits,
                f"--recipe {self.recipe}: has the limits, expected no --max-mb, --max-ms, --max-loss, --structure",
            )
            recipe = Recipe.load(self.recipe)
            require(recipe.budget is not None, f"--recipe {self.recipe}: has no [budget], expected one")
            require(recipe.search is None, f"--recipe {self.recipe}: has a [search], which `commpress train` makes")
            given, wanted = self.compress, recipe.traffic.spec
            require(
                wanted is None or given in ("none", wanted),
                f"--compress {given}: the recipe has traffic.spec {wanted!r}; leave one of them out",
            )
        else:
            require(bool(limits), "expected some of --max-mb, --max-ms, --max-loss, or --recipe")
            end = int(PART * self.steps)
            phases = {"end": end, "every": max(1, end // CHANGES), "format": self.format}
            recipe = Recipe.of({"budget": {**limits, **phases}}, "flags")
        recipe.require_within(self.steps)
        return recipe

    def loaded(self) -> tuple[nn.Module, Batches, Batches]:
        """The dense model, this rank's training batches, and all held-out ones. Raises ValueError that names the flag."""
        dense = tasks.module_of(self.model)
        training, held_out = tasks.batches(self.data)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        require(
            len(training) >= world_size and len(held_out) >= world_size,
            f"--data {self.data}: {len(training)} batches to train, {len(held_out)} held out, expected {world_size} at least",
        )
        return dense, training[rank::world_size], held_out

    def trained(
        self, small: nn.Module, dense: nn.Module, training: Batches, held_out: Batches, recipe: "Recipe"
    ) -> "Scheduler":
        """Train `small` in place. Collective."""
        from commpress.model import Scheduler, prepare
        from commpress.model.judgement.quality import usual_loss

        rank, world_size = dist.get_rank(), dist.get_world_size()
        prepare(small, recipe)
        optimizer = torch.optim.AdamW(small.parameters(), lr=self.lr)
        wrapped, session = small, None
        if world_size > 1:
            wrapped = DistributedDataParallel(small)
            session = commpress.attach(wrapped, recipe.traffic.spec or self.compress)
        teacher = dense if recipe.distil is not None else None
        own = held_out[rank::world_size]
        with runtime.same_error_on_all_ranks():
            example = held_out[0][0]
            scheduler = Scheduler(
                recipe, small, optimizer, session=session, teacher=teacher, held_out=own, example_inputs=example
            )
            small.train()
            device = next(small.parameters()).device
            for step, (inputs, targets) in enumerate(itertools.islice(_forever(training), self.steps)):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
                inputs, targets = tuple(x.to(device) for x in inputs), targets.to(device)
                output = wrapped(*inputs)
                loss = usual_loss(output, targets)(output, targets)
                _require_finite(loss.item(), step + 1, device, session)
                scheduler.loss(loss, output, *inputs).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if (step + 1) % max(1, self.steps // 10) == 0 and rank == 0:
                    say(f"step {step + 1}/{self.steps}: loss {loss.item():.4f} [{scheduler.phase}]")
        if session is not None and rank == 0:
            say(str(session.receipt()))
            self.out.mkdir(parents=True, exist_ok=True)
            session.report().write_json(self.out / TRAFFIC)
        return scheduler


def _require_finite(loss: float, step: int, device: torch.device, session: Any) -> None:
    """Raise TrainingError on all ranks, with those whose loss it is, if one's is not finite. Collective."""
    bad = torch.tensor(float(not math.isfinite(loss)), dtype=torch.float32, device=device)
    dist.all_reduce(bad)
    if bad.item():
        where = runtime.ranks_without(math.isfinite(loss), device)
        raise TrainingError(
            f"step {step}: the loss is not finite{f' on {where}' if where else f', but {loss}'}; --lr is probably too high"
            f"{runtime.or_too_coarse(session)}"
        )


def _forever(batches: Batches) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    while True:
        yield from batches


if __name__ == "__main__":
    command_line.read(Shrink, "python -m commpress.launch.shrink").run()
