"""`auto` with a compressed optimizer: finds the optimizer's spec, and how often it syncs, after its warm-up.

    warm-up, by warmup_spec ............ | none | A  B  none | A  B  none | ...     A, B: candidates of the optimizer
    its steps are plain ones if it is exact     ^ ranked                            ^ chosen, as in `search.py`

The optimizer names its candidates: specs that keep its loss, and, if it takes local steps, how often it syncs. With local
steps most of a step's buckets are not sent, so a trial lasts whole intervals, and its mean step counts. A step by the
optimizer's own spec, such as one that refreshes a variance, is not counted. The ranks do not send gradients, so there is no
dense mean to compare with, and no error is measured; error feedback repays the whole error.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from commpress.comm import cost
from commpress.comm.auto import Auto
from commpress.comm.cost import Cluster
from commpress.comm.optimizer_hooks import Candidate, OptimizerHooks
from commpress.comm.plan import Plan
from commpress.comm.said import Said
from commpress.comm.search import PLAIN, Search

if TYPE_CHECKING:
    from commpress.comm.collectives import Collectives


class AutoBehind(Auto):
    """The choice of an optimizer's spec, step by step, with error feedback.

    Raises TypeError for an optimizer with which `auto` cannot choose.
    """

    def __init__(self, collectives: "Collectives", optimizer: OptimizerHooks) -> None:
        self._optimizer = optimizer
        self._candidates: dict[str, Candidate] = {}
        """All candidates so far, by name; an interval that grows brings new ones."""
        specs = tuple(dict.fromkeys(candidate.spec for candidate in optimizer.candidates()))
        super().__init__(collectives, True, specs=specs)
        self.search = Search(self._predicted, period=lambda name: self._candidates[name].now)
        self._look_up()
        self._counts = True
        """Whether the present step counts for its candidate."""

    def _look_up(self) -> None:
        """Ask the optimizer for its present candidates."""
        found = {str(candidate): candidate for candidate in self._optimizer.candidates()}
        self._candidates |= found
        self._plans = {name: Plan.of(candidate.spec) for name, candidate in found.items()}

    def begin_step(self) -> None:
        if self._collectives.world_size == 1:
            super().begin_step()
            return
        own, search = self._optimizer.own_spec(), self.search
        if self._began is not None and not self._counts and self._question is None:
            search.steps += 1
            self._began = None
        search.holds = own is not None
        super().begin_step()
        self.watch = None
        self._counts = own is None or (own == PLAIN and search.state in ("warm up", "plain"))
        self._optimizer.take(self._candidates[search.spec])

    def _break_even_of(self, name: str) -> float | None:
        if name not in self._plans or self._candidates[name].sync_every > 1:
            return None  # the model assumes that all buckets are sent in every step
        return super()._break_even_of(name)

    def _predicted(self, everyone: Sequence[Said], plain: float) -> Mapping[str, float]:
        self._look_up()
        return super()._predicted(everyone, plain)

    def _step_seconds(self, name: str, cluster: Cluster) -> float:
        """Return the seconds of a step by the last model, on a cluster; with local steps the mean over an interval, in which
        each bucket is sent once."""
        assert self._model is not None
        model, candidate = self._model, self._candidates[name]
        buckets, total = model.buckets, sum(model.buckets)
        turns: list[list[int]] = [[] for _ in range(candidate.now)]
        ready: list[list[float]] = [[] for _ in turns]
        start = 0
        for i, n in enumerate(buckets):
            turn = start * candidate.now // total
            turns[turn].append(n)
            ready[turn] += model.ready[i : i + 1]
            start += n
        plan, speed, of = (
            self._plans[name],
            model.speeds[candidate.spec],
            (cluster, model.compute, model.itemsize),
        )
        return fmean(
            cost.step(plan, turn, speed, *of, at).seconds if turn else model.compute
            for turn, at in zip(turns, ready, strict=True)
        )
