"""What hurts: means that are too far from the dense ones, a residual that grows, a loss that rises.

    error       |mean - dense mean| / |dense mean|      more than the budget: gradients arrive wrong
    residual    |residual| / |gradient|                 more than RESIDUAL: what is left out is not repaid, but grows
    loss        of all ranks, since the last look       not finite in two looks, or far above its running mean

Errors and residuals are measured in a few steps (`error.py`). The loss is known only if the training loop tells it. A spec that
hurts is not tried for a while, which is longer each time.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from commpress.comm.choice import Trial
from commpress.comm.said import Figures, worse

BUDGET = 0.5
"""The largest error of a spec in two steps, one after the other."""
RESIDUAL = 3.0
"""The largest residual of a spec in two steps, one after the other. In 300 steps of a GPT of 0.4 M parameters by AdamW on two
ranks that of `int4` had a median of 0.16, and in one step 0.63; of `int8` 0.01 and 0.07."""
RETRY = 300
"""Steps until a spec that has hurt is tried again; twice as many each time."""
RISE = 0.5
"""The share of its running mean by which the loss may rise above it."""
SPREADS = 12
"""How many times the mean distance by which it usually is above its running mean the loss may rise above it."""
SETTLED = 8
"""Looks without which the usual loss is not known; a search has four of them."""
WEIGHT, SPREAD_WEIGHT = 0.5, 0.1
"""The weights of the last look in the running mean, which follows a loss that falls, and in the usual distance above it."""


def of_same_codec(hurt: Mapping[str, str], specs: Iterable[str], codec: Callable[[str], str]) -> dict[str, str]:
    """Return all of these specs whose codec hurts, and how, from some that hurt."""
    how = {codec(spec): why for spec, why in hurt.items()}
    return {spec: how[codec(spec)] for spec in specs if codec(spec) in how}


class LossWatch:
    """The losses of this rank since the last look, and the running mean of all ranks' losses with its usual excess."""

    def __init__(self) -> None:
        self._sum: float | Tensor = 0.0
        self._count = 0
        self.forget()

    def add(self, loss: float | Tensor) -> None:
        """Add the loss of a step on this rank; a tensor has no dimensions."""
        self._sum, self._count = self._sum + loss, self._count + 1

    def mean(self) -> float | None:
        """Return the mean of the added losses, and begin a new one; None if there are none."""
        found = float(self._sum) / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return found

    def forget(self) -> None:
        """Start anew: what comes next is the usual loss."""
        self._mean, self._spread, self._looks = 0.0, 0.0, 0
        self.broke_under: tuple[str, ...] | None = None
        """The specs under which it was not finite first; None if it was finite in the last look."""

    def note(self, loss: float | None, specs: tuple[str, ...]) -> str:
        """Note the mean of all ranks since the last look; None if nobody told it. Returns what is wrong with it, or "".

        `specs` are those in use since then; () while specs are tried, when nobody can say which one did it. One look with a
        loss that is not finite is no reason: a GradScaler skips such a step. If other specs were in use when it stopped being
        finite, those of now are not blamed: weights with NaN keep it.
        """
        if loss is None:
            return ""
        if not math.isfinite(loss):
            if self.broke_under is None:
                self.broke_under = specs
                return ""
            return f"the loss was {loss}" if specs and specs == self.broke_under else ""
        self.broke_under = None
        above = loss - self._mean
        if self._looks >= SETTLED and above > max(RISE * abs(self._mean), SPREADS * self._spread):
            return f"the loss rose to {loss:.3g} from a mean of {self._mean:.3g}"
        self._looks += 1
        if self._looks > 1:
            self._spread += max(SPREAD_WEIGHT, 1 / (self._looks - 1)) * (max(0.0, above) - self._spread)
        self._mean += max(WEIGHT, 1 / self._looks) * above
        return ""


@dataclass
class Ban:
    """A spec has hurt `setbacks` times, the last time as `cause` says, and is not tried before the step `until`."""

    until: int
    setbacks: int
    cause: str


class Guard:
    """Which specs hurt, and until when they are not tried again. `budget` is the largest error."""

    def __init__(self, budget: float) -> None:
        self.budget, self.loss = budget, LossWatch()
        self.hurt: dict[str, str] = {}
        """Specs that have hurt since the search began, and how."""
        self.bans: dict[str, Ban] = {}
        """Specs that have ever hurt, in the runs before, too."""
        self._doubted: set[tuple[str, str]] = set()
        """The spec whose present step is measured again, with the kinds of its figures that were beyond their bounds before."""

    def causes(self, figures: Figures) -> dict[str, str]:
        """Return the specs that hurt by these figures, and how. NaN is beyond every bound."""
        found = {
            spec: f"the means of {spec} were off by {error:.2f} of the dense ones, more than {self.budget:g}"
            for spec, error in figures.get("errors", {}).items()
            if not error <= self.budget
        }
        return found | {  # a residual that grows shifts the means, too
            spec: f"the residual of {spec} was {times:.3g} times the gradient, more than {RESIDUAL:g}"
            for spec, times in figures.get("residuals", {}).items()
            if not times <= RESIDUAL
        }

    def confirmed(self, spec: str, figures: Figures) -> Figures | None:
        """Return the figures of a step that count; None if the next step is to be measured, too, before any do.

        A step of small gradients after one of large ones has figures that are large for once: the residual is that of the
        step before, and its mean contains it. Those of a codec that hurts are as large in the next step. So a figure beyond its
        bound counts only if the same one was beyond it in the step before.
        """
        beyond = {(spec, kind) for kind, of in figures.items() if spec in self.causes({kind: of})}
        before, self._doubted = {one for one in self._doubted if one[0] == spec}, set()
        if not beyond or not all(math.isfinite(one) for of in figures.values() for one in of.values()):
            return figures
        if not before:
            self._doubted = beyond
            return None
        return {kind: of for kind, of in figures.items() if (spec, kind) not in beyond - before}

    def checked(self, trials: Iterable[Trial], figures: Figures, step: int) -> list[Trial]:
        """Return trials with the worst errors and residuals so far, and how those have hurt that may not be tried."""
        found = [replace(t, hurt=self.cause(t.spec, step) or t.hurt) for t in trials]
        for t in found:
            if t.spec in figures["errors"]:
                t.error = worse(figures["errors"][t.spec], t.error)
            if t.spec in figures["residuals"]:
                t.residual = worse(figures["residuals"][t.spec], t.residual)
        return found

    def blame(self, loss: str, specs: Iterable[str]) -> dict[str, str]:
        """Return the last, coarsest of the specs that were in use, and what was wrong with the loss; nothing if nothing was."""
        if not loss:
            return {}
        broke_under = self.loss.broke_under
        self.loss.forget()  # or it would be wrong under the next spec, too
        self.loss.broke_under = broke_under  # weights with NaN keep it: no other spec is blamed
        *_, coarsest = specs
        return {coarsest: f"{loss} under {coarsest}"}

    def ban(self, causes: Mapping[str, str], step: int) -> None:
        """Do not try these specs again for a while."""
        for spec, cause in causes.items():
            before = self.bans[spec].setbacks if spec in self.bans else 0
            self.bans[spec] = Ban(step + RETRY * 2**before, before + 1, cause)
        self.hurt |= causes

    def kept(self, step: int) -> dict[str, dict[str, Any]]:
        """Return the ban of each spec that has hurt; `until` counts the steps from now on."""
        return {spec: vars(replace(ban, until=max(0, ban.until - step))) for spec, ban in self.bans.items()}

    def restore(self, kept: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Continue from what `kept` returned."""
        for spec, saved in kept.items():
            ban = Ban(**saved)
            self.bans[spec] = replace(ban, until=step + ban.until)

    def ends(self) -> list[int]:
        """Return the steps at which specs that have hurt may be tried again."""
        return [ban.until for ban in self.bans.values()]

    def allows(self, spec: str, step: int) -> bool:
        """Return whether a spec may be tried."""
        return not self.cause(spec, step)

    def cause(self, spec: str, step: int) -> str:
        """Return how a spec has hurt that may not be tried; "" if it may."""
        ban = self.bans.get(spec)
        return ban.cause if ban is not None and ban.until > step else ""
