"""The figures that the ranks of a search exchange at the end of a turn, and what they make of them together."""

import math
import statistics
from collections.abc import Mapping, Sequence

Said = Mapping[str, object]
"""One rank's figures: `medians`, `turns` and `errors` by spec, and further ones that the prediction needs."""


def worst_errors(everyone: Sequence[Said]) -> dict[str, float]:
    """Return the largest error that any rank has seen, by spec."""
    found: dict[str, float] = {}
    for said in everyone:
        errors = said.get("errors", {})
        assert isinstance(errors, Mapping)
        for spec, error in errors.items():
            found[spec] = error if math.isnan(error) else max(error, found.get(spec, 0.0))
    return found


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
