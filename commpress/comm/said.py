"""The figures that the ranks of a search exchange at the end of a turn, and what they make of them together."""

import math
import statistics
from collections.abc import Mapping, Sequence

Said = Mapping[str, object]
"""One rank's figures: those of `Search.said`, and further ones that the prediction needs."""
Figures = Mapping[str, Mapping[str, float]]
"""What was measured of specs, `errors` and `residuals`, each by spec."""


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
