"""When the buckets of plain steps are ready: medians, the slowest rank, and figures that fit into a message."""

from unittest import mock

from commpress.comm import plain_steps
from commpress.comm.cost import MOST_BUCKETS
from commpress.comm.plain_steps import Part, PlainSteps, slowest_ready, told
from commpress.comm.segments import Segment


def stepped(*steps: tuple[float, ...]) -> PlainSteps:
    """Steps whose buckets are ready at these seconds."""
    found = PlainSteps()
    for times in steps:
        found.begin_step()
        with mock.patch.object(plain_steps, "perf_counter", side_effect=times):
            for i in range(len(times)):
                found.note(
                    [Part((Segment(f"{i}.weight", 8),), 8, 4, None), Part((Segment(f"{i}.bias", 2),), 0, 4, None)]
                )
        found.end_step()
    return found


def test_the_median_of_the_steps_counts_from_the_first_bucket_on() -> None:
    assert stepped((7.0, 8.0, 9.5), (17.0, 18.5, 19.0), (27.0, 29.0, 34.0)).ready() == [0.0, 1.5, 2.5]


def test_steps_of_another_layout_do_not_count() -> None:
    found = stepped((7.0, 8.0, 9.5), (17.0, 18.5))
    assert (len(found), found.ready()) == (2, [0.0, 1.5])
    assert [(i, part.values) for i, part in found.parts()] == [(0, 8), (1, 8)]  # nothing is sent of the biases


def test_a_step_in_which_nothing_is_noted_leaves_what_is_known() -> None:
    found = stepped((7.0, 8.0, 9.5), ())
    assert (len(found), found.ready()) == (3, [0.0, 1.0, 2.5])


def test_all_ranks_wait_for_the_slowest() -> None:
    assert slowest_ready([[0.0, 2.0, 3.0], [0.0, 1.0, 9.0]], 3, most=5.0) == [0.0, 2.0, 5.0]
    assert slowest_ready([[0.0, 2.0, 3.0], []], 3, most=5.0) == []


def test_of_very_many_buckets_each_rank_tells_a_few_figures() -> None:
    n = 2 * MOST_BUCKETS
    figures = stepped(tuple(map(float, range(n)))).ready()
    assert figures == [float(i) for i in range(1, n, 2)]
    assert slowest_ready([figures], n, most=1e9) == [float(i | 1) for i in range(n)]


def test_a_line_says_when_buckets_are_ready() -> None:
    assert told([0.0, 0.0123]) == "buckets: 2, ready 0, 12.3 ms after the first one in the plain steps\n"
    assert "buckets: 9, the last one ready 80 ms" in told([0.01 * i for i in range(9)])
    assert told([]) == told([0.0]) == ""
