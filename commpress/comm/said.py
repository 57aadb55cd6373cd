"""The figures that the ranks of a search exchange at the end of a turn, and their common result."""

import math
import statistics
from collections.abc import Mapping, Sequence

Said = Mapping[str, object]
"""What one rank has said: `medians`, `turns` and `errors` by spec, and more that its prediction takes."""


def worst_errors(everyone: Sequence[Said]) -> dict[str, float]:
    """The largest error by spec that any rank has seen."""
    found: dict[str, float] = {}
    for said in everyone:
        errors = said.get("errors", {})
        assert isinstance(errors, Mapping)
        for spec, error in errors.items():
            found[spec] = error if math.isnan(error) else max(error, found.get(spec, 0.0))
    return found


def fastest_turns(everyone: Sequence[Said]) -> dict[str, list[float]]:
    """The mean of the ranks' fastest steps of each turn, by spec."""
    turns: dict[str, list[list[float]]] = {}
    for said in everyone:
        mine = said["turns"]
        assert isinstance(mine, Mapping)
        for spec, seconds in mine.items():
            turns.setdefault(spec, []).append(seconds)
    return {spec: [statistics.fmean(of) for of in zip(*ranks, strict=True)] for spec, ranks in turns.items()}


def mean_medians(everyone: Sequence[Said]) -> dict[str, float]:
    """The mean of the ranks' medians, by spec: they wait for each other, so they have nearly the same."""
    medians = [said["medians"] for said in everyone]
    assert all(isinstance(mine, Mapping) for mine in medians)
    return {spec: statistics.fmean(mine[spec] for mine in medians) for spec in medians[0]}  # type: ignore[attr-defined, index]
