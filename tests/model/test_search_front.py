"""The objective and the Pareto front: no point of the front is dominated, and every other point is."""

import math
from dataclasses import dataclass

import pytest
from battery import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st

from commpress.model.search import Weights, front
from commpress.model.search.objective import spread


@dataclass(frozen=True)
class Point:
    quality: float | None
    size: float


def dominates(a: Point, b: Point) -> bool:
    """Whether a is at least as good as b in both, and better in one. What has no quality is behind all that has one."""
    one, other = (-math.inf if x.quality is None else x.quality for x in (a, b))
    return one >= other and a.size <= b.size and (one > other or a.size < b.size)


NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
POINTS = st.lists(st.builds(Point, st.one_of(st.none(), NUMBERS), NUMBERS), max_size=20)


@given(points=POINTS)
@EXAMPLES
def test_no_point_of_the_front_is_dominated_and_every_other_is_or_is_equal(points: list[Point]) -> None:
    best = front(points)
    assert not any(dominates(other, point) for point in best for other in points)
    for point in points:
        if point.quality is not None and point not in best:
            assert any(dominates(other, point) for other in best)
    assert len(set(best)) == len(best)
    assert [point.size for point in best] == sorted({point.size for point in best})


@given(points=POINTS, alpha=st.floats(0.01, 10), beta=st.floats(0.01, 10))
@EXAMPLES
def test_the_largest_h_is_on_the_front(points: list[Point], alpha: float, beta: float) -> None:
    weights = Weights(alpha, beta)
    values = {point: weights.of(point.quality, point.size) for point in points if point.quality is not None}
    if values:
        assert max(values.values()) == pytest.approx(max(values[point] for point in front(points)))


def test_of_equal_points_the_first_is_taken() -> None:
    twins = [Point(1.0, 2.0), Point(1.0, 2.0)]
    assert front(twins)[0] is twins[0]
    assert not dominates(*twins)


def test_a_spread_has_both_ends() -> None:
    points = [Point(float(i), float(i)) for i in range(7)]
    assert spread(points, 3) == [points[0], points[3], points[6]]
    assert spread(points, 1) == [points[6]]
    assert spread(points, 0) == []
    assert spread(points, 9) == points


@pytest.mark.parametrize(
    ("alpha", "beta", "words"),
    [(-1.0, 0.0, "alpha -1.0"), (1.0, float("nan"), "beta nan"), (0.0, 0.0, "alpha 0 and beta 0")],
)
def test_weights_that_make_no_sense(alpha: float, beta: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Weights(alpha, beta)
