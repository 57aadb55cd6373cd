"""randomk: which values it sends, how long the others wait, sums of payloads, and what ranks make of different draws."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from battery import EXAMPLES, gradient, normal, same_bits
from hypothesis import given
from hypothesis import strategies as st
from ranks import outcome, run
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.codecs.random_k import RandomK
from commpress.comm.encoder import Encoder
from commpress.comm.exchange import EXCHANGES, Labels, Wire
from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.comm.failure import OtherMessageError
from commpress.comm.feedback import Feedback
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

CPU = torch.device("cpu")
RATIOS = st.floats(0.002, 1)


def sent(codec: RandomK, n: int, draw: int) -> Tensor:
    """How often a draw sends each of n values."""
    drawn = codec.drawn(draw)
    return drawn.decode(drawn.encode(torch.ones(n)), n)


@EXAMPLES
@given(RATIOS, st.integers(1, 3000), st.integers(0, 2**40))
def test_each_value_is_sent_once_in_a_turn_so_the_draws_are_unbiased(ratio: float, n: int, turn: int) -> None:
    codec = RandomK(ratio)
    _, widths = codec._strata(n, CPU)
    for width in widths.unique().tolist()[:2]:
        total = sum(sent(codec, n, turn * width + d) for d in range(min(width, 40)))
        mine = (widths == width).repeat_interleave(widths)
        assert isinstance(total, Tensor)
        assert total[mine].max() == 1
        assert width > 40 or total[mine].min() == 1


@EXAMPLES
@given(RATIOS, st.integers(1, 5000), st.integers(0, 2**60))
def test_the_share_is_the_one_that_was_asked_for(ratio: float, n: int, draw: int) -> None:
    codec = RandomK(ratio)
    k = int(sent(codec, n, draw).count_nonzero())
    assert k == codec.kept(n)
    assert ratio * n * 0.99 - 1 <= k <= ratio * n * 1.01 + 1


def test_draws_send_other_places_and_turns_begin_elsewhere() -> None:
    codec = RandomK(0.01)
    first, next_turn = sent(codec, 64_000, 0), sent(codec, 64_000, 100)
    assert (first * sent(codec, 64_000, 1)).sum() == 0
    assert (first * next_turn).sum() < 40  # of 640; by chance 6.4
    places = codec.define_positions(codec.encode(torch.ones(64_000)), 64_000) % 100
    counts = torch.bincount(places, minlength=100)
    assert ((counts - 6.4).square() / 6.4).sum() < 160  # chi squared of 99 degrees: 149 at 0.1 %


@EXAMPLES
@given(RATIOS, st.integers(1, 3000), st.integers(0, 2**50), st.integers(1, 5))
def test_the_mean_of_payloads_is_the_payload_of_the_mean(ratio: float, n: int, draw: int, count: int) -> None:
    codec = RandomK(ratio).drawn(draw)
    xs = [torch.round(8 * normal(n, seed)) * count for seed in range(count)]  # whole numbers: sums are exact
    payloads = torch.cat([codec.encode(x) for x in xs])
    mean = codec.mean(payloads, n, count)
    assert torch.allclose(mean, codec.decode(codec.encode(torch.stack(xs).mean(dim=0)), n), rtol=1e-6, atol=1e-6)


def test_payloads_of_different_draws_have_the_right_mean() -> None:
    n, draws = 9000, (3, 3, 8)
    xs = [gradient(n, seed) for seed in range(3)]
    payloads = torch.cat([RandomK(0.1, draw=d).encode(x) for d, x in zip(draws, xs, strict=True)])
    expected = sum(x * sent(RandomK(0.1), n, d) for d, x in zip(draws, xs, strict=True)) / 3
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(RandomK(0.1).mean(payloads, n, 3), expected)


def test_nan_spoils_its_stratum_and_no_other() -> None:
    codec, x = RandomK(0.1), torch.ones(6400)
    x[1234] = torch.inf
    spoilt = codec.decode(codec.encode(x), 6400).isnan().nonzero().view(-1)
    assert spoilt.tolist() == list(range(1230, 1240))


def test_clear_sets_what_was_sent_to_0() -> None:
    codec, values = RandomK(0.1, draw=5), torch.ones(5000)
    coding.clear(codec, codec.encode(values), values)
    assert torch.equal(values, 1 - sent(codec, 5000, 5))


def test_a_spec_names_no_draw() -> None:
    assert str(RandomK(0.1, draw=7)) == "randomk(0.1)"
    assert RandomK(0.1).drawn(7) == RandomK(0.1, draw=7)
    assert parse("int4").drawn(7) == parse("int4")


# --- among ranks ---------------------------------------------------------------------------------------------------


def with_other_draws(exchange: str, same: bool) -> Tensor | str:
    """The sum of three means of ranks that draw by one number each, or the error of the sum."""
    wire, labels = Wire(dist.group.WORLD, CPU), Labels()  # type: ignore[arg-type]
    total = torch.zeros(5000)
    for step in range(3):
        codec, x = parse("randomk(0.1)").drawn(step if same else step + 10 * wire.rank), gradient(5000, wire.rank)
        try:
            for transfer in EXCHANGES[exchange].run(x, Encoder(codec), wire, labels.next("a bucket")):
                transfer.wait()
        except OtherMessageError as error:
            return str(error)
        total += x
    return total


@pytest.mark.parametrize("exchange", ["one_shot", "two_shot"])
def test_ranks_that_drew_by_different_numbers_still_get_one_right_mean(exchange: str) -> None:
    results = run(2, with_other_draws, exchange, False)
    assert same_bits(results[0], results[1])
    expected = torch.zeros(5000)
    cuts = chunk_bounds(5000, 2, 1) if exchange == "two_shot" else [0, 5000]
    for step in range(3):
        for start, stop in pairwise(cuts):
            n, codec = stop - start, RandomK(0.1)
            mean = sum(gradient(5000, r)[start:stop] * sent(codec, n, step + 10 * r) for r in range(2)) / 2
            if exchange == "two_shot":  # without feedback the owner's own draw is all that arrives
                mean = mean * sent(codec, n, step + 10 * int(start > 0))
            expected[start:stop] += mean
    torch.testing.assert_close(results[0], expected)


def test_a_sum_of_different_draws_is_refused() -> None:
    for text in run(2, with_other_draws, "all_reduce", False):
        assert isinstance(text, str)
        assert "a bucket" in text
    first, second = run(2, with_other_draws, "all_reduce", True)
    assert same_bits(first, second)


def draws_of(spec: str, exchange: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Means of six steps, and of the last three once more after a restart from the state behind the third."""
    runs = []
    state = None
    for first in (0, 3):
        session, means = replicas_session(spec, dist.group.WORLD, CPU, exchange=exchange), []  # type: ignore[arg-type]
        if state is not None:
            session.load_state_dict(state)
        for step in range(first, 6):
            x = gradient(5000, 10 * step + session.rank)
            means.append(session.step_buffer.submit(x, (Segment("p", 5000),), 0, last=True).wait())  # type: ignore[union-attr]
            if step == 2 and state is None:
                state = session.state_dict()
        runs.append(means)
    return runs[0], runs[1]


@pytest.mark.parametrize("exchange", [None, "all_reduce"])
def test_each_step_draws_anew_and_a_restart_goes_on_with_the_next_draw(exchange: str | None) -> None:
    for whole, again in run(2, draws_of, "randomk(0.1)", exchange):
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], again, strict=True))
        assert len({tuple(mean.nonzero().view(-1).tolist()) for mean in whole}) == 6


def restored_behind_other_draws() -> tuple[str, str]:
    """What ranks say to a state of another number of draws on rank 1 alone, and to one that only rank 1 has."""
    said = []
    for only_one in (False, True):
        session = replicas_session("randomk(0.1)", dist.group.WORLD, CPU)  # type: ignore[arg-type]
        x = gradient(5000, session.rank)
        session.step_buffer.submit(x, (Segment("p", 5000),), 0, last=True).wait()  # type: ignore[union-attr]
        state = session.state_dict()
        if session.rank == 1 and not only_one:
            state["memories"][0][0]["draws"] = 7
        if session.rank == 0 and only_one:
            state = session.state_dict() | {"memories": [[]]}
        said.append(outcome(partial(session.load_state_dict, state)))
    return said[0], said[1]


def test_a_state_with_other_draws_on_one_rank_is_refused_on_all() -> None:
    # before a sum: on an accelerator nothing compares the draws there
    for other, none in run(2, restored_behind_other_draws):
        assert "cannot restore: rank 1's state has layouts" in other
        assert "'draws': 7" in other
        assert "cannot restore: rank 1's state has layouts" in none


def test_a_new_layout_goes_on_with_the_largest_number() -> None:
    feedback = Feedback(2)
    one, other = (feedback.memory((Segment(name, 10),), True, None, CPU) for name in "ab")
    assert [one.next_draw(), one.next_draw(), other.next_draw()] == [0, 1, 0]
    assert feedback.memory((Segment("a", 10), Segment("b", 10)), True, None, CPU).next_draw() == 2
    restored = Feedback(2)
    restored.load_state_dict(feedback.state_dict(), CPU)
    assert restored.memory((Segment("a", 10), Segment("b", 10)), True, None, CPU).next_draw() == 3


def test_values_are_coded_in_turn() -> None:
    codec, x = parse("randomk(0.25)|int8"), gradient(5000)
    exact = replace(codec, values=parse("none"))  # type: ignore[type-var]
    found, kept = codec.decode(codec.encode(x), 5000), exact.decode(exact.encode(x), 5000)
    assert (found[kept == 0] == 0).all()
    assert not codec.linear
    assert exact.linear
    assert ((found - kept).norm() / kept.norm()) < 0.02
