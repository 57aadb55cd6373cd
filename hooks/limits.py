"""The [budget] of a recipe in another library's loop: the batches that it is measured on, and the dense model to compare with.

At the budget's `start` rank 0 keeps the model's values; they are in its checkpoint file from then on. When training ends the
exported file is judged against the model with these values, in the runtime of its format.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commpress.comm.agreement import agree_on_all
from commpress.model import Recipe, RecipeError, Scheduler, judge
from commpress.model.budget import runtime_of, shortfalls
from commpress.model.export.by_recipe import whole_copy
from commpress.model.first_rank import done_by_first_rank
from commpress.model.judgement.forms import Batch, batches_of, missing_package
from commpress.model.judgement.quality import Loss
from commpress.model.narrowing import described
from commpress.notice import global_rank

FOLDER = "judged"
"""Inside of the trainer's own folder: both models' files, judgement.json and model_card.md."""


class Limits:
    """A recipe's budget, on every rank. Make it before the model is prepared for quantisation.

    `held_out` are this rank's batches (inputs, targets), if the caller has some; `loss` takes outputs and targets. `dense` is
    the model that the file is compared with, if it is another one than `model` at the budget's `start`. Raises ValueError if
    structure was removed and nobody says of what.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        held_out: Sequence[tuple[Any, Tensor]] | None,
        loss: Loss | None,
        dense: nn.Module | None,
    ) -> None:
        its = recipe.budget
        assert its is not None
        if its.removed and dense is None:
            raise ValueError(
                f"budget.removed: {described(its.removed)} is gone: expected dense=, the model as it was before"
            )
        self.model, self.loss, self.batches = model, loss, list[Batch]()
        self._held_out = held_out
        self._budget, self._given, self._kept = its, dense is not None, dense is not None
        self._dense = None if global_rank() else dense if dense is not None else whole_copy(model)

    def read(self, default: Callable[[], Sequence[tuple[Any, Tensor]]], group: dist.ProcessGroup) -> None:
        """Take this rank's batches: those of the caller, else what `default` gives. Collective.

        Raises ValueError on all ranks for what one of them cannot use.
        """
        refusal: Exception | None = None
        try:
            with torch.random.fork_rng(devices=[]):  # a loader's order draws nothing from the training
                self.batches = [
                    (tuple(x.detach().cpu() for x in inputs), y.detach().cpu())
                    for inputs, y in batches_of(default() if self._held_out is None else self._held_out, "held_out")
                ]
            if global_rank() == 0 and (package := missing_package(runtime_of(self._budget))):
                raise RecipeError(
                    f"budget.format: {self._budget.format} is measured in {package}, which is not installed"
                )
        except Exception as error:  # of the user's data, of any kind
            refusal = error
        agree_on_all({}, (group,), next(self.model.parameters()).device, refusal)

    def keep(self, done: int) -> None:
        """Keep the model's values if the budget begins behind `done` steps. Call it before the scheduler takes that step."""
        if self._dense is not None and not self._given and not self._budget.settled and done == self._budget.start:
            values = self.model.state_dict()  # with what a recipe has prepared
            self._dense.load_state_dict({name: values[name] for name in self._dense.state_dict()})
            self._kept = True

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the values that are kept; None on other ranks, before the budget begins, and if the dense model was given."""
        return None if self._dense is None or self._given or not self._kept else self._dense.state_dict()

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        """Restore what `state_dict` returned."""
        if self._dense is not None and not self._given:
            self._kept = state is not None
            if state is not None:
                self._dense.load_state_dict(state)

    def missed(self, scheduler: Scheduler, folder: str | Path, group: dist.ProcessGroup | None) -> list[str]:
        """Write the file into `folder`, judge it, and return a sentence for each limit that it misses. Collective.

        What prevents that is such a sentence, too: a training's result is not lost for it.
        """

        def held() -> list[str]:
            try:
                scheduler.recipe.require_within(scheduler.done)
                if not self._kept:
                    return [
                        "the budget is not held against the file: no dense model was kept at its start, expected dense="
                    ]
                return self._judged(Path(folder) / FOLDER)
            except Exception as error:  # of an exporter or a runtime, of any kind; the others wait for this rank's word
                return [f"the budget is not held against the file: {' '.join(str(error).split())}"]

        return done_by_first_rank(held, group, next(self.model.parameters()).device)  # type: ignore[no-any-return]

    def _judged(self, folder: Path) -> list[str]:
        assert self._dense is not None
        dense, small = whole_copy(self._dense).eval(), whole_copy(self.model).eval()
        runtimes = (runtime_of(self._budget),)
        judgement = judge(dense, small, self.batches, loss=self.loss, runtimes=runtimes, folder=folder)
        judgement.write(folder)
        return [f"the budget is not met: {each}" for each in shortfalls(self._budget, judgement.record)]
