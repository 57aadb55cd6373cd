"""The figures of the benchmark of `auto`: medians and means by phase, losses of equal steps, and the two bounds."""

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import auto


def way(name: str, *phases: list[float], session: Any = None) -> Any:
    """A way whose steps took so long in each phase; its loss falls by 1 with each step."""
    return SimpleNamespace(
        name=name, seconds=list(phases), losses=[1000.0 - i for i in range(sum(map(len, phases)))], session=session
    )


def found(**bf16: float) -> list[dict[str, Any]]:
    """The rows of all ways: auto takes 100 steps, 50 of them searching, the others 40; bf16 is twice as fast as plain DDP."""
    report = SimpleNamespace(sent_bytes=1200, steps=100)
    searched = way(auto.AUTO, [0.4] * 50 + [0.1] * 50, session=SimpleNamespace(report=lambda: report))
    others = {auto.PLAIN: 0.4, auto.HOOKED: 0.05, "none": 0.42, "bf16": 0.2, "int8": 0.15, "int4": 0.1} | bf16
    return auto.rows([*(way(name, [seconds] * 40) for name, seconds in others.items()), searched])


def test_the_rows_have_means_and_medians_of_all_steps_and_of_those_once_auto_has_settled() -> None:
    *others, row = found()
    assert (row["name"], row["steps"], row["sent_bytes"]) == ("auto", [100], 12)
    assert row["means"] == [pytest.approx(0.25)]
    assert row["medians"] == [pytest.approx(0.25)]
    assert row["settled"] == [0.1]
    assert all(other["sent_bytes"] is None for other in others)


def test_the_same_share_of_a_shorter_way_counts_as_settled() -> None:
    slower = way("int4", [0.3] * 20 + [0.2] * 20)
    row, _ = auto.rows([slower, way(auto.AUTO, [0.1] * 100)])
    assert row["settled"] == [0.2]  # the second half, as steps 50 to 100 of auto


def test_the_losses_are_of_equal_steps() -> None:
    for row in found():
        assert row["loss_at"] == 40  # the fewest steps of a way
        assert row["loss"] == statistics.fmean(1000 - i for i in range(40 - auto.LAST, 40))


def test_a_phase_has_figures_of_its_own() -> None:
    plain, row = auto.rows([way(auto.PLAIN, [0.4] * 9, [4.0] * 3), way(auto.AUTO, [0.1] * 60, [0.2] * 60)])
    assert (plain["steps"], plain["medians"], plain["means"]) == ([9, 3], [0.4, 4.0], [pytest.approx(0.4), 4.0])
    assert row["settled"] == [0.1, 0.2]


def test_the_bounds_are_against_the_better_of_plain_and_bf16_and_the_best_fixed_spec() -> None:
    bounds = auto.bounds(found())
    assert bounds["whole"] == pytest.approx(0.25 / 0.2)
    assert bounds["settled"] == pytest.approx(0.1 / 0.1)  # not against torch's hook, which is no way to train
    assert auto.bounds(found(bf16=0.8))["whole"] == pytest.approx(0.25 / 0.4)
    assert auto.bounds(found(int4=0.125))["settled"] == pytest.approx(0.1 / 0.125)


def test_phases_of_the_bounds_weigh_by_the_steps_of_auto() -> None:
    names = (auto.PLAIN, *auto.FIXED)
    others = [way(name, [0.4] * 3, [0.8] * 9) for name in names]
    bounds = auto.bounds(auto.rows([*others, way(auto.AUTO, [0.2] * 100, [0.4] * 100)]))
    assert bounds == {"whole": pytest.approx(0.5), "settled": pytest.approx(0.5)}
