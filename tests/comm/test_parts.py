"""A bucket in parts and pieces: what is cut where, and when all of it has arrived."""

from hypothesis import given
from hypothesis import strategies as st

from commpress.comm.parts import pieces, when_all_end
from commpress.comm.segments import Segment, sizes


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30), st.integers(1, 3000))
def test_pieces_are_a_bucket_s_segments_in_their_order(numbers: list[int], values: int) -> None:
    segments = tuple(Segment(f"w{i}", n) for i, n in enumerate(numbers))
    found = pieces(segments, values)
    assert tuple(segment for piece in found for segment in piece) == segments
    assert all(found)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(1000, 4000))
def test_pieces_of_small_segments_are_about_as_long_as_asked(numbers: list[int], values: int) -> None:
    segments = tuple(Segment(f"w{i}", n) for i, n in enumerate(numbers))
    *found, last = [sum(sizes(piece)) for piece in pieces(segments, values)]
    assert all(values <= n < values + 100 for n in found)
    assert not found or values / 2 <= last < 1.5 * values + 100


def test_a_segment_that_is_longer_than_a_piece_stays_whole() -> None:
    long, before, behind = Segment("long", 10_000), Segment("before", 10), Segment("behind", 10)
    assert pieces((before, long, behind), 1000) == [(before, long, behind)]
    assert pieces((before, long, behind, long), 1000) == [(before, long), (behind, long)]


def test_all_parts_must_arrive_and_the_first_error_ends_them() -> None:
    told: list[BaseException | None] = []
    ended = when_all_end(3, told.append)
    ended(None)
    ended(None)
    assert told == []
    ended(None)
    assert told == [None]
    error = RuntimeError("lost")
    ended = when_all_end(3, told.append)
    ended(error)
    ended(RuntimeError("another"))
    ended(None)
    assert told == [None, error]
