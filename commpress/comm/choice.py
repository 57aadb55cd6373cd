"""The outcome of a search: the spec that was chosen, beside all that were tried."""

from dataclasses import dataclass


@dataclass
class Trial:
    """One spec: the step that was predicted for it and the median of those that it took, in seconds, and the largest error that
    was seen; None where there is none."""

    spec: str
    predicted: float | None = None
    measured: float | None = None
    error: float | None = None


@dataclass
class Choice:
    """The outcome of a search, or of a look: `spec` was chosen at the end of step `step`, among these.

    `cause` says why it took the place of another one, if that has left the error budget.
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
