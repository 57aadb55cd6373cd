"""A search for the spec with the shortest steps: tried in turns, decided by all ranks' figures, and checked later.

    none  not counted | none A B | none A B | none A B | A ................ | A ................ ...
                           ^ ranked        ^ one is far     ^ chosen             ^ the ranks look: are the steps still
                                             behind: dropped                       as long as they were? Else from `none` on

On a noisy machine a median of a few steps cannot decide between close specs. So a spec replaces a gentler one only if it was
faster in each round (it may lose one of five). If that is open, further rounds follow. Close specs meet again in a `duel.py`.

A spec must also not hurt (`guard.py`): its error and its residual are measured in steps that are not timed, and the ranks
compare their losses, if they know them. A spec that hurts is dropped. If it was the chosen one, a gentler one takes its place;
a later search may try it again.

The steps of a turn are timed from one to the next; the first of each turn is not counted. If a spec has steps of several kinds
that repeat (its `period`), whole periods replace steps, and the mean step of a period counts. The ranks compare at the same
steps, by the figures of all, which are sent during one more step, so that no rank waits for them. A search has no clock and no
process group: its owner gives it the seconds of a step, and the ranks' figures.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from commpress.comm.again import SHARE, Again
from commpress.comm.choice import Choice, Trial, joined
from commpress.comm.duel import CLOSE, Duel, rivals_of
from commpress.comm.guard import BUDGET, Guard, of_same_codec
from commpress.comm.said import Figures, Said, fastest_turns, mean_loss, mean_medians, means, medians, quickest, worst

PLAIN = "none"
SKIPPED, CHECKED, TIMED = "skipped", "checked", "timed"
"""Kinds of steps: the first after another spec, whose residual it sends; one whose error is measured; one that counts."""
WARM_UP = 3
"""Steps at the start that are not counted: DDP rebuilds its buckets after the first; caches and connections are cold."""
FIRST_TURN = 3
TURN = 3
"""Steps of a turn, of which the first is not timed. The first turn of a spec has one more, in which its error is measured."""
ROUNDS = 3
"""The fewest rounds; by chance alone one spec in eight is ahead in each of three."""
LATEST = 50
"""The most steps (or periods, if those are longer) from the start of a search to the end of a round that may still begin."""
FORGIVEN = 5
"""After this many rounds a spec may have lost one of them."""
MOST = 2
"""The number of specs that are tried against `none`."""
HOPELESS = 1.3
"""A spec is not tried if its predicted step takes this times as long as that of `none`."""
FAR_BEHIND = 1.25
"""A spec is dropped after a round if its fastest step takes this times as long as the best spec's."""
WORTH = 0.98
"""A spec is chosen only if its steps take less than this share of the time of any gentler spec's."""
LOOK = 16
"""The fewest steps from one check to the next."""


@dataclass
class Search:
    """A search among specs and `none`. `predict` ranks them from each rank's figures at the end of the plain steps.

    `predict` returns the seconds of a step by spec, the gentlest spec first, `none` included; it is the same on all ranks.
    """

    predict: Callable[[Sequence[Said], float], Mapping[str, float]]
    budget: float = BUDGET
    period: Callable[[str], int] = lambda spec: 1
    """The number of steps after which the kinds of a spec's steps repeat; the mean of that many counts. It is 1 for `none`."""
    codec: Callable[[str], str] = lambda spec: spec
    """The codec of a spec. A spec with another name than its codec is only compared with the chosen one, in a duel."""
    holds: bool = False
    """While True no spec is tried: the plain steps go on, and their last turn counts."""
    choices: list[Choice] = field(default_factory=list)
    """The choices so far, in order."""
    steps: int = 0
    """Steps of the run that have ended."""

    def __post_init__(self) -> None:
        self._state = "warm up"
        self._steps_to_come = deque([(PLAIN, SKIPPED)] * WARM_UP)
        self._tried: list[str] = [PLAIN]
        self._predicted: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}
        self._exchanges: dict[str, list[float]] = {}
        """Seconds of the exchanges of the same steps, as far as they are known."""
        self._figures: Figures = {}
        """The largest errors and residuals since the search began, or since the last check."""
        self.guard = Guard(self.budget)
        self._rivals: list[str] = []
        """Specs that are still to meet the chosen one in a duel."""
        self._duel: Duel | None = None
        self._round = 0
        self._longest = 1
        """The longest period of the specs that this search has tried, dropped ones included."""
        self._again = Again()

    @property
    def choice(self) -> Choice | None:
        """The last choice; None before the first one."""
        return self.choices[-1] if self.choices else None

    @property
    def spec(self) -> str:
        """The spec of the present step, or of the next one between steps."""
        return self._steps_to_come[0][0]

    @property
    def named(self) -> str:
        """The spec that a report names: the last choice; before the first choice, the spec of the present step."""
        return self.choices[-1].spec if self.choices else self.spec

    @property
    def state(self) -> str:
        """One of "warm up", "plain", "trying", "chosen"."""
        return self._state

    @property
    def checks(self) -> bool:
        """Whether error and residual of the present step are to be measured."""
        return self._steps_to_come[0][1] == CHECKED

    def note_loss(self, loss: float | Tensor) -> None:
        """Note the loss of a step on this rank; a tensor has no dimensions."""
        self.guard.loss.add(loss)

    def expect_another_loss(self) -> None:
        """Compare the coming losses with each other only: another phase of training begins."""
        self.guard.loss.forget()

    def kept(self, began: bool) -> dict[str, Any]:
        """Return what a run that goes on needs to know: the steps, with one that `began` and is not counted yet, and bans."""
        return {"step": self.steps + began, "guard": self.guard.kept(self.steps + began)}

    def restore(self, kept: Mapping[str, Any], began: bool) -> None:
        """Continue from what `kept` returned. A search that has begun keeps its own count of steps."""
        if not self.steps:
            self.steps = max(0, kept["step"] - began)
        self.guard.restore(kept["guard"], self.steps + began)

    def note(
        self, seconds: float, error: float | None = None, residual: float | None = None, exchange: float | None = None
    ) -> bool:
        """Note the seconds of a step, and if they were measured the error of its means, the residual, and the seconds in which
        an exchange was running.

        Returns whether the ranks must compare now: they exchange their figures during one more step, which does not count, and
        call `compare` after it.
        """
        self.steps += 1
        spec, kind = self._steps_to_come.popleft()
        self._again.count(spec)
        if kind == TIMED:
            self._seconds.setdefault(spec, []).append(seconds)
            if exchange is not None:
                self._exchanges.setdefault(spec, []).append(exchange)
        found = {key: {spec: of} for key, of in (("errors", error), ("residuals", residual)) if of is not None}
        sure = self.guard.confirmed(spec, found) if kind == CHECKED else found
        if sure is None:
            self._steps_to_come.appendleft((spec, CHECKED))
        elif sure:
            self._figures = worst([self._figures, sure])
            if hurt := self.guard.causes(sure):  # all ranks hold the same figures, so all find this at the same step
                hurt = of_same_codec(hurt, self._order(), self.codec)
                left = [one for one in self._steps_to_come if one[0] not in hurt]
                self._steps_to_come = deque(left if self._state == "trying" else ())
                if self._state == "trying":
                    self.guard.ban(hurt, self.steps)
        if self._steps_to_come:
            return False
        if self._state == "warm up" or (self._state == "plain" and self.holds):
            self._state = "plain"
            self._again.begin(self.steps)
            self._begin([(PLAIN, TIMED)] * FIRST_TURN)
            return False
        self._steps_to_come = deque([(PLAIN if spec in self.guard.causes(self._figures) else spec, SKIPPED)])
        return True

    def said(self) -> dict[str, object]:
        """Return what this rank tells the others: figures since the search began, or since the last check, by spec, and the
        mean of its losses since it told them last."""
        exchanges = medians(self._exchanges, self.period)
        told = {"medians": self.medians(), "turns": self.turns(), "exchanges": exchanges}
        return {**told, **self._figures, "loss": self.guard.loss.mean()}

    def medians(self) -> dict[str, float]:
        """Return the median seconds of a step, by spec."""
        return medians(self._seconds, self.period)

    def turns(self) -> dict[str, list[float]]:
        """Return the fastest step of each turn in the rounds so far, by spec: a pause of the machine does not shift it."""
        each, of = TURN - 1, means(self._seconds, self.period)  # steps, or periods
        rounds = {spec: seconds[-(self._round + 1) * each :] for spec, seconds in of.items()}
        return {spec: [min(s[i : i + each]) for i in range(0, len(s), each)] for spec, s in rounds.items()}

    def compare(self, everyone: Sequence[Said]) -> None:
        """Continue with what each rank has `said`, and with the seconds that its last comparison took (`asked`).

        They were sent one step ago: the step during which they arrived ends here.
        """
        self.steps += 1
        self._again.count(self.spec)
        in_use = self._in_use() if self._state == "chosen" else ()
        wrong = self.guard.loss.note(mean_loss(everyone), in_use)
        if wrong and not in_use:  # of which of the specs in turn is not known
            self.guard.loss.forget()
        if self._state == "plain":
            self._rank(everyone)
        elif self._state == "trying":
            self._end_round(everyone)
        else:
            self._look(everyone, wrong)

    def _begin(self, steps: Sequence[tuple[str, str]], keep: bool = False) -> None:
        self._steps_to_come = deque(step for step in steps for _ in range(self.period(step[0])))
        if not keep:
            self._seconds, self._exchanges, self._figures = {}, {}, {}

    def _rank(self, everyone: Sequence[Said]) -> None:
        plain, self._again.ranked = mean_medians(everyone)[PLAIN], self.steps
        self._predicted = dict(self.predict(everyone, plain))
        whole = [s for s in self._predicted if self.codec(s) == s != PLAIN]
        others = [s for s in whole if self._predicted[s] < HOPELESS * plain]
        others = [s for s in others if self.guard.allows(s, self.steps)]
        self._tried = [PLAIN, *sorted(others, key=lambda s: (not self._may_be_worth(s), self._predicted[s]))[:MOST]]
        self._longest = max(map(self.period, self._tried))
        self._round, self.guard.hurt = 0, {}
        if len(self._tried) == 1:
            self._choose(everyone)
            return
        self._state = "trying"
        self._next_round()

    def _may_be_worth(self, spec: str) -> bool:
        """Whether a spec's predicted step is shorter than those of all gentler specs; by how much is measured."""
        order = list(self._predicted)
        gentler = [self._predicted[one] for one in order[: order.index(spec)] if self.codec(one) == one]
        return self._predicted[spec] < min(gentler)

    def _next_round(self) -> None:
        timed = [TIMED] * (TURN - 1)
        steps = []
        for spec in self._tried if self._round else self._tried[1:]:  # the plain steps were the first turn of `none`
            first = [SKIPPED, CHECKED] if self._round == 0 and spec != PLAIN else [SKIPPED]
            steps += [(spec, kind) for kind in (*first, *timed)]
        self._begin(steps, keep=True)

    def _end_round(self, everyone: Sequence[Said]) -> None:
        turns, self._round = fastest_turns(everyone), self._round + 1
        within = [spec for spec in self._tried if spec not in self.guard.hurt]
        best = min(min(turns[spec]) for spec in within)
        self._tried = [spec for spec in within if min(turns[spec]) < FAR_BEHIND * best]
        still_open = self._round < ROUNDS
        if not still_open:  # else only the undecided specs go on
            contenders = [self._best(everyone), *self._ahead_by_median(everyone)]
            turns_and_telling = TURN * sum(map(self.period, contenders)) + 1
            ends = self.steps - self._again.since + turns_and_telling
            still_open = len(contenders) > 1 and ends <= LATEST * self._longest
            self._tried = [spec for spec in self._tried if spec in contenders] if still_open else self._tried
        if still_open and len(self._tried) > 1:
            self._next_round()
        else:
            self._choose(everyone)

    def _lead(self, spec: str, gentler: str, everyone: Sequence[Said]) -> tuple[bool, bool]:
        """Whether a spec's steps are shorter by as much as is worth it, and whether it was ahead in the rounds."""
        if gentler not in self._tried:
            return True, True  # the gentler one was dropped: far behind, or beyond the budget
        found, turns = mean_medians(everyone), fastest_turns(everyone)
        lost = sum(mine >= other for mine, other in zip(turns[spec], turns[gentler], strict=True))
        return found[spec] < WORTH * found[gentler], lost <= len(turns[spec]) // FORGIVEN

    def _gentlest_first(self) -> list[str]:
        return [spec for spec in self._order() if spec in self._tried]

    def _best(self, everyone: Sequence[Said]) -> str:
        """Return the spec that leads over all gentler ones. Of two equally fast specs the gentler one wins."""
        best, *others = self._gentlest_first()
        for spec in others:
            if all(self._lead(spec, best, everyone)):
                best = spec
        return best

    def _ahead_by_median(self, everyone: Sequence[Said]) -> list[str]:
        """Return the specs whose steps are shorter than the best one's, but which were not ahead in the rounds."""
        best, order = self._best(everyone), self._gentlest_first()
        return [spec for spec in order[order.index(best) + 1 :] if self._lead(spec, best, everyone) == (True, False)]

    def _choose(self, everyone: Sequence[Said]) -> None:
        found, best = mean_medians(everyone), self._best(everyone)
        trials = [Trial(spec, self._predicted.get(spec), found.get(spec), step=self.steps) for spec in self._order()]
        trials = self.guard.checked(trials, worst(everyone), self.steps)
        before = self.codec(self.choices[-1].spec) if self.choices else ""
        # the first choice tells what the runs before have found, too
        causes = self.guard.hurt.values() if self.choices else [t.hurt for t in trials]
        self.choices.append(Choice(best, self.steps, trials, joined(causes)))
        self._again.found(self.steps, self.choices[-1], before, quickest(everyone).get(best))
        self._state = "chosen"
        self._rivals = self._close_to(best, found)
        self._next_duel()
        self._watch(everyone, found[best])

    def _close_to(self, best: str, found: Mapping[str, float]) -> list[str]:
        """Return the specs that are to meet the best one in a duel: close ones, and untried ones that were predicted to be as
        fast, or as pieces faster.

        If `none` is the best one, the predictions were wrong, and untried specs are left out.
        """
        near = [s for s in found if s != best and found[s] < CLOSE * self._limit(best, s) * found[best]]
        leads = self._predicted[best] if best in self._predicted and best != PLAIN else 0.0
        untried = [s for s in self._predicted if s not in found and self.codec(s) in (s, best)]
        ahead = [s for s in untried if self._predicted[s] < leads * (1 / WORTH if self.codec(s) == s else WORTH)]
        return [s for s in sorted(near, key=found.__getitem__) + ahead if self.guard.allows(s, self.steps)]

    def _watch(self, everyone: Sequence[Said], seconds: float) -> None:
        spec = self.choices[-1].spec
        asked = max(float(str(said.get("asked", 0.0))) for said in everyone)
        interval = max(LOOK, math.ceil(asked / SHARE / seconds))
        turns = (spec,) if self._duel is None else self._duel.turns()
        steps = []
        for turn in turns:
            known = turn == PLAIN or (turn != spec and self.choices[-1].error(turn) is not None)
            first = [SKIPPED] if known else [SKIPPED, CHECKED]
            timed = math.ceil(interval / len(turns) / self.period(turn))
            steps += [(turn, kind) for kind in (*first, *[TIMED] * timed)]
        self._begin(steps)

    def _next_duel(self) -> None:
        """Match the chosen spec with its next rival."""
        self._duel, chosen = None, self.choices[-1].spec
        if self._rivals:
            rival = self._rivals.pop(0)
            self._duel = Duel(chosen, rival, self._limit(chosen, rival))

    def _limit(self, chosen: str, rival: str) -> float:
        """Return the share of the chosen spec's seconds below which a rival wins, so that the gentler of two equals wins."""
        order = self._order()
        return WORTH if order.index(chosen) < order.index(rival) else 1 / WORTH

    def _in_use(self) -> tuple[str, ...]:
        """Return the chosen spec and its rival in a duel, the gentlest first."""
        in_use = (self.choices[-1].spec,) if self._duel is None else self._duel.turns()
        return tuple(sorted(in_use, key=self._order().index))

    def _end_bout(self, duel: Duel, everyone: Sequence[Said]) -> None:
        """Count a bout; after the last one the winner is the choice."""
        if not duel.count(mean_medians(everyone)):
            return
        choice, seconds = self.choices[-1], duel.seconds()
        choice.trials = choice.with_seconds(seconds, self.steps)
        if duel.winner() != choice.spec:
            self.choices.append(Choice(duel.winner(), self.steps, choice.trials))
            self._again.compare_with(self.choices[-1], quickest(everyone).get(duel.winner()))
            left = rivals_of(duel.winner(), self._rivals, choice.trials, self.codec, WORTH)
            self._rivals = [spec for spec in left if self.guard.allows(spec, self.steps)]
        self._next_duel()

    def _look(self, everyone: Sequence[Said], wrong: str) -> None:
        """Compare steps, figures and losses. `wrong` says what is wrong with the loss, if anything is."""
        choice = self.choices[-1]
        hurt = self.guard.blame(wrong, self._in_use())
        hurt = of_same_codec(hurt | self.guard.causes(worst(everyone)), self._order(), self.codec)
        hurt.pop(PLAIN, None)  # it is the gentlest: a loss that rises under it is not a codec's
        self.guard.ban(hurt, self.steps)
        choice.trials = self.guard.checked(choice.trials, worst(everyone), self.steps)
        then = choice.seconds(choice.spec)
        if choice.spec in hurt:
            self._back_off(everyone)
            return
        assert then is not None
        if hurt:  # a rival, whose turn has ended
            self._next_duel()
            self._watch(everyone, then)
            return
        now = mean_medians(everyone)[choice.spec]
        exchange, comes_back = quickest(everyone).get(choice.spec), self.guard.ends()
        if self._again.is_due(self.steps, choice, now, exchange, comes_back):
            self._state, self._duel = "plain", None
            self._again.begin(self.steps)
            self._begin([(PLAIN, SKIPPED)] + [(PLAIN, TIMED)] * (TURN - 1))
            return
        if self._duel is not None:
            self._end_bout(self._duel, everyone)
        self._watch(everyone, now)

    def _order(self) -> list[str]:
        """Return all specs, the gentlest first."""
        return list(dict.fromkeys([PLAIN, *self._predicted]))

    def _back_off(self, everyone: Sequence[Said]) -> None:
        """Choose the fastest of the tried specs that are gentler and have not hurt, at worst `none`."""
        before, order, hurt = self.choices[-1], self._order(), self.guard.hurt
        gentler = order[: order.index(before.spec)]
        left = {t.spec: t.measured for t in before.trials if t.measured is not None and t.spec in gentler}
        spec = min((one for one in left if one not in hurt), key=left.__getitem__)
        self.choices.append(Choice(spec, self.steps, before.trials, hurt[before.spec]))
        self._duel = None
        self._watch(everyone, left[spec])
