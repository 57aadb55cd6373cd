"""The result of a search: the chosen spec, and all tried ones."""

from dataclasses import dataclass


@dataclass
class Trial:
    """One spec: its predicted step and the median of its measured steps, in seconds, and its largest measured error;
    None if there is none."""

    spec: str
    predicted: float | None = None
    measured: float | None = None
    error: float | None = None


@dataclass
class Choice:
    """The result of a search or a check: `spec`, chosen at the end of step `step` among the tried ones.

    `cause` names the error of the spec before it, if that one was replaced because it exceeded the error budget.
    """

    spec: str
    step: int
    trials: list[Trial]
    cause: str = ""

    def seconds(self, spec: str) -> float | None:
        """Return the measured step of a spec; None if it was not tried."""
        return next((trial.measured for trial in self.trials if trial.spec == spec), None)

    def error(self, spec: str) -> float | None:
        """Return the largest error of a spec; None if none was measured."""
        return next((trial.error for trial in self.trials if trial.spec == spec), None)
