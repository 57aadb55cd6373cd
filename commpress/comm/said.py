"""The figures that the ranks of a search exchange at the end of a turn, and what they make of them together."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

Said = Mapping[str, object]
"""One rank's figures: those of `Search.said`, and further ones that the prediction needs."""
Figures = Mapping[str, Mapping[str, float]]
"""What was measured of specs, `errors` and `residuals`, each by spec."""

PAUSE = 3.0
"""A step that takes this times the lower median contains a pause of training; of two steps it would shift the median."""


def means(of: Mapping[str, Sequence[float]], period: Callable[[str], int]) -> dict[str, list[float]]:
    """Return the mean of each period of a spec's figures, by spec; `period` is the number of steps of one."""
    each = {spec: period(spec) for spec in of}
    return {
        spec: [statistics.fmean(figures[i : i + each[spec]]) for i in range(0, len(figures), each[spec])]
        for spec, figures in of.items()
    }


def medians(of: Mapping[str, Sequence[float]], period: Callable[[str], int]) -> dict[str, float]:
    """Return the median of the periods of a spec's figures, by spec, without pauses, as for a validation."""
    found = means(of, period)
    lows = {spec: statistics.median_low(figures) for spec, figures in found.items()}
    return {spec: statistics.median(f for f in found[spec] if f <= PAUSE * low) for spec, low in lows.items()}


def worse(one: float, other: float | None) -> float:
    """Return the larger of two figures; NaN is the largest, None the smallest."""
    return one if other is None or math.isnan(one) else max(other, one)


def worst(everyone: Sequence[Said | Figures]) -> Figures:
    """Return the largest `errors` and `residuals` that any rank has seen, by spec."""
    found: dict[str, dict[str, float]] = {"errors": {}, "residuals": {}}
    for said in everyone:
        for key, of in found.items():
            figures = said.get(key, {})
            assert isinstance(figures, Mapping)
            of |= {spec: worse(figure, of.get(spec)) for spec, figure in figures.items()}
    return found


def mean_loss(everyone: Sequence[Said]) -> float | None:
    """Return the mean of the ranks' losses; None if none has told one."""
    losses = [float(str(loss)) for said in everyone if (loss := said.get("loss")) is not None]
    return sum(losses) / len(losses) if losses else None  # of infinities with two signs: NaN


def fastest_turns(everyone: Sequence[Said]) -> dict[str, list[float]]:
    """Return the mean over the ranks of the fastest step of each turn, in seconds, by spec."""
    turns: dict[str, list[list[float]]] = {}
    for said in everyone:
        mine = said["turns"]
        assert isinstance(mine, Mapping)
        for spec, seconds in mine.items():
            turns.setdefault(spec, []).append(seconds)
    return {spec: [statistics.fmean(of) for of in zip(*ranks, strict=True)] for spec, ranks in turns.items()}


def mean_medians(everyone: Sequence[Said]) -> dict[str, float]:
    """Return the mean of the ranks' medians, in seconds, by spec. Ranks wait for each other, so their medians nearly agree."""
    medians = [said["medians"] for said in everyone]
    assert all(isinstance(mine, Mapping) for mine in medians)
    return {spec: statistics.fmean(mine[spec] for mine in medians) for spec in medians[0]}  # type: ignore[attr-defined, index]


def quickest(everyone: Sequence[Said]) -> dict[str, float]:
    """Return the seconds of a step's exchanges on the rank where they are shortest, by spec, as far as all ranks know them.

    That is the rank whose backward ends last. On the others they contain the wait for it.
    """
    found: dict[str, list[float]] = {}
    for said in everyone:
        mine = said.get("exchanges", {})
        assert isinstance(mine, Mapping)
        for spec, seconds in mine.items():
            found.setdefault(spec, []).append(seconds)
    return {spec: min(of) for spec, of in found.items() if len(of) == len(everyone)}
