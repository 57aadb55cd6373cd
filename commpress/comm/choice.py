"""The result of a search: the chosen spec, and all tried ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from commpress.notice import warn

HEAD = ("spec", "predicted ms a step", "measured ms a step", "error", "residual", "")
"""The head of the table of a choice."""
PIECE = 4_000_000
"""The bytes of a piece of a bucket, about, where `auto` sends pieces."""
IN_PIECES = f" in {PIECE / 1e6:g} MB"
"""What is added to the name of a spec whose buckets are sent in pieces."""


def without_pieces(name: str) -> str:
    """Return the spec of a candidate of `auto`, such as `int4` of `int4 in 4 MB`."""
    return name.removesuffix(IN_PIECES)


@dataclass
class Trial:
    """One spec: its predicted step and the median of its measured steps, in seconds, and its largest measured error and
    residual; None if there is none. `hurt` says how it hurt, if it was replaced or dropped for that, or if the search might not
    try it since it had hurt before; else it is empty. `step` is the last step of the search or the duel whose seconds these
    are."""

    spec: str
    predicted: float | None = None
    measured: float | None = None
    error: float | None = None
    residual: float | None = None
    hurt: str = ""
    step: int | None = None


@dataclass
class Choice:
    """The result of a search or a check: `spec`, chosen at the end of step `step` among the tried ones.

    `cause` says how other specs hurt, if that decided: the one before it, or some that were tried, or, where a run goes on with
    its first choice, some that may not be tried.
    """

    spec: str
    step: int
    trials: list[Trial]
    cause: str = ""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Choice":
        """Return the choice of a report's dict."""
        return cls(**{**saved, "trials": [Trial(**trial) for trial in saved["trials"]]})

    def trial(self, spec: str) -> Trial | None:
        """Return the trial of a spec; None if the search did not know it."""
        return next((trial for trial in self.trials if trial.spec == spec), None)

    def seconds(self, spec: str) -> float | None:
        """Return the measured step of a spec; None if it was not tried."""
        return None if (trial := self.trial(spec)) is None else trial.measured

    def error(self, spec: str) -> float | None:
        """Return the largest error of a spec; None if none was measured."""
        return None if (trial := self.trial(spec)) is None else trial.error

    def with_seconds(self, found: Mapping[str, float], step: int) -> list[Trial]:
        """Return the trials, those of these specs with new seconds, measured up to `step`."""
        return [replace(t, measured=found[t.spec], step=step) if t.spec in found else t for t in self.trials]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of a table of the trials, under `HEAD`: the prediction beside the measurement."""
        return [
            (t.spec, _ms(t.predicted), _ms(t.measured), _figure(t.error), _figure(t.residual), self._became(t))
            for t in self.trials
        ]

    def _became(self, trial: Trial) -> str:
        if trial.spec == self.spec:
            return "chosen"
        if trial.hurt:
            return "hurt"
        return "not tried" if trial.measured is None else ""


def cause_of(choices: Sequence[Choice]) -> str:
    """Return how specs hurt that the last choice does without; "" if time alone has decided.

    They count as good again once a later search might try them and they did not hurt.
    """
    return joined(trial.hurt for trial in choices[-1].trials) if choices else ""


def joined(causes: Iterable[str]) -> str:
    """Return different causes in one line, without empty ones."""
    return "; ".join(dict.fromkeys(filter(None, causes)))


def history(choices: Sequence[Choice]) -> str:
    """Return all choices in one line: int4 at step 33, int8 at step 120 (the means of int4 were off by ...)."""
    return ", ".join(f"{one.spec} at step {one.step}" + (f" ({one.cause})" if one.cause else "") for one in choices)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def warn_of(choices: Iterable[Choice], speaks: bool) -> None:
    """Warn of each of these choices that was made because a spec hurt, and why. `speaks`: on this rank."""
    for choice in choices:
        if choice.cause:
            warn(f"commpress: {choice.cause}; from step {choice.step} on {choice.spec}", speaks)
