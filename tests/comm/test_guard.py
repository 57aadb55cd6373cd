"""The guard of `auto`, on a clock of its own: what hurts gives way on all ranks, with a cause, and comes back."""

import random
import re

import pytest
from search_world import DOES_NOT, PAYS, Errors, Losses, Seconds, World, hurts, predicted

from commpress.comm.choice import cause_of
from commpress.comm.search import LOOK, PLAIN, Search

HURT = "the means of {} were off by 0.90 of the dense ones, more than 0.5"


def resumed(search: Search, seconds: Seconds, errors: Errors) -> World:
    """Ranks that go on from what a search has kept."""
    world, kept = World(seconds, predicted=predicted(PAYS), errors=errors), search.kept(began=False)
    for one in world.searches:
        one.restore(kept, began=False)
    return world


def test_what_hurts_later_gives_way_to_a_gentler_spec_with_a_cause() -> None:
    world = World(PAYS, predicted=predicted(PAYS), errors=hurts(100)).run(200)
    first, second = world.searches[0].choices
    assert (first.spec, first.cause) == ("int4", "")
    assert second.spec == "int8"
    assert second.cause == "the means of int4 were off by 0.90 of the dense ones, more than 0.5"
    assert 100 <= second.step <= 100 + LOOK + 3
    assert "int4" not in world.specs[second.step :]


def test_one_step_beyond_the_budget_is_looked_at_again_and_does_not_count() -> None:
    """As a step of small gradients after one of large ones, whose residual it sends."""

    def now_and_then(spec: str, step: int) -> float:
        return 0.9 if spec == "int4" and step % 2 else 0.1

    world = World(PAYS, predicted=predicted(PAYS), errors=now_and_then).run(2000)
    assert [choice.spec for choice in world.searches[0].choices] == ["int4"]
    assert [choice.cause for choice in world.searches[0].choices] == [""]
    assert max(trial.error or 0.0 for trial in world.searches[0].choices[0].trials) == 0.1


def test_a_run_that_goes_on_does_not_try_it_earlier_and_remembers_how_often_it_has_hurt() -> None:
    before = World(PAYS, predicted=predicted(PAYS), errors=hurts(100)).run(200).searches[0]
    ban = before.kept(began=False)["guard"]["int4"]
    assert 150 < ban["until"] < 300
    assert ban["setbacks"] == 1
    assert ban["cause"] == HURT.format("int4")
    world = resumed(before, PAYS, hurts(0)).run(1200)
    tried = [step for step, spec in enumerate(world.specs) if spec == "int4"]
    assert min(tried) >= ban["until"]
    assert len(tried) == 3  # it hurts again, and for 600 steps it is not tried
    assert world.searches[0].guard.bans["int4"].setbacks == 2


def test_a_run_that_goes_on_says_what_has_hurt_as_the_unbroken_one_does() -> None:
    """Two specs hurt; then the steps drift, and both runs search while these may not be tried."""
    both_hurt: Errors = lambda spec, step: 0.9 if step >= 100 and spec in ("int8", "int4") else 0.1  # noqa: E731
    seconds: Seconds = lambda spec, step: (PAYS if step < 200 else DOES_NOT)(spec, step)  # noqa: E731
    world = World(seconds, predicted=predicted(PAYS), errors=both_hurt).run(200)
    again = resumed(world.searches[0], DOES_NOT, lambda spec, step: both_hurt(spec, step + 200)).run(100)
    unbroken, other = (w.searches[0].choices for w in (world.run(100), again))
    both = f"{HURT.format('int8')}; {HURT.format('int4')}"
    for choices in (unbroken, other):
        assert choices[-1].spec == PLAIN
        assert {t.spec: t.hurt for t in choices[-1].trials if t.hurt} == {s: HURT.format(s) for s in ("int8", "int4")}
        assert [row[-1] for row in choices[-1].rows()] == ["chosen", "", "hurt", "hurt"]
        assert cause_of(choices) == both
    assert [choice.cause for choice in other] == [both]  # the run that goes on tells it with its first choice
    assert other[0].step > 200  # steps are those of the run


def test_a_search_that_goes_back_keeps_its_own_count_of_steps() -> None:
    world = World(PAYS, predicted=predicted(PAYS), errors=hurts(0, 100)).run(100)
    search = world.searches[0]
    kept, step = search.kept(began=False), world.run(100).searches[0].steps
    search.restore(kept, began=False)
    assert search.steps == step
    assert search.kept(began=False)["guard"] == kept["guard"]


@pytest.mark.parametrize("began", [False, True])
def test_a_state_that_is_loaded_before_or_after_the_first_step_brings_its_count(began: bool) -> None:
    search = World(PAYS, predicted=predicted(PAYS)).searches[0]
    kept = {"step": 1000, "guard": {"int4": {"until": 50, "setbacks": 1, "cause": "it hurt"}}}
    search.restore(kept, began)
    assert search.kept(began) == kept


def test_only_what_is_still_not_tried_is_told() -> None:
    """int4 may be tried again before int8, and then takes longer than `none`."""
    all_hurt: Errors = lambda spec, step: 0.9 if 100 <= step < 200 else 0.1  # noqa: E731
    world = World(
        lambda spec, step: (PAYS if step < 200 else DOES_NOT)(spec, step), predicted=predicted(PAYS), errors=all_hurt
    ).run(200)
    for search in world.searches:
        search.guard.bans["int8"].until = 10**9
    world.run(800)
    assert world.chosen == PLAIN
    assert cause_of(world.searches[0].choices) == HURT.format("int8")


def test_it_comes_back_when_it_hurts_no_more() -> None:
    world = World(PAYS, predicted=predicted(PAYS), errors=hurts(100, 300)).run(1500)
    assert [choice.spec for choice in world.searches[0].choices] == ["int4", "int8", "int4"]


def test_what_leaves_only_none_is_told_until_all_have_been_measured_again() -> None:
    """All specs hurt for a while; when they come back, they take longer than `none`."""
    all_hurt: Errors = lambda spec, step: 0.9 if 100 <= step < 200 else 0.1  # noqa: E731
    world = World(
        lambda spec, step: (PAYS if step < 200 else DOES_NOT)(spec, step), predicted=predicted(PAYS), errors=all_hurt
    )
    choices = world.searches[0].choices
    assert cause_of(world.run(90).searches[0].choices) == ""
    world.run(200)  # the plain steps drift, and the search that begins has only `none` left
    assert [choice.spec for choice in choices][-1] == PLAIN
    assert choices[-1].cause == ""
    assert cause_of(choices) == f"{HURT.format('int8')}; {HURT.format('int4')}"
    world.run(400)  # both are tried again
    assert world.chosen == PLAIN
    assert cause_of(choices) == ""


def test_what_hurts_for_ever_is_tried_ever_more_rarely() -> None:
    world = World(PAYS, predicted=predicted(PAYS), errors=hurts(100)).run(12_000)
    assert world.chosen == "int8"
    tried = [step for step, spec in enumerate(world.specs) if spec == "int4" and step > 150]
    times = tried[::3]  # three steps each
    assert len(times) >= 4
    times = times[1:]  # the first one waits for the search before to be paid
    assert all(c - b > 1.5 * (b - a) for a, b, c in zip(times, times[1:], times[2:], strict=False))


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_is_beyond_every_budget(error: float) -> None:
    bad: Errors = lambda spec, step: error if step > 60 else 0.1  # noqa: E731
    world = World(PAYS, predicted=predicted(PAYS), errors=bad).run(200)
    assert world.chosen == PLAIN  # first int4, then int8, have left it
    assert [choice.spec for choice in world.searches[0].choices] == ["int4", "int8", PLAIN]


def test_what_hurts_while_it_is_tried_is_told_with_its_cause_and_tried_again_later() -> None:
    world = World(PAYS, predicted=predicted(PAYS), errors=hurts(0, 100)).run(1500)
    first, second = world.searches[0].choices
    assert (first.spec, second.spec) == ("int8", "int4")
    assert first.cause == "the means of int4 were off by 0.90 of the dense ones, more than 0.5"
    assert first.step + 280 <= second.step <= first.step + 1200


def test_a_drift_does_not_bring_back_what_hurts_before_its_time() -> None:
    def swings(spec: str, step: int) -> float:
        return PAYS(spec, step) * (1.5 if step // 70 % 2 else 1)

    world = World(swings, predicted=predicted(PAYS), errors=hurts(50)).run(320)
    tried = [step for step, spec in enumerate(world.specs) if spec == "int4"]
    assert max(tried) < 100


def test_a_residual_that_grows_gives_way_to_a_gentler_spec_with_a_cause() -> None:
    grows: Errors = lambda spec, step: 0.1 if step < 100 or spec != "int4" else 0.1 * 1.2 ** (step - 100)  # noqa: E731
    world = World(PAYS, predicted=predicted(PAYS), errors=lambda spec, step: 0.1, residuals=grows).run(200)
    first, second = world.searches[0].choices
    assert (first.spec, second.spec) == ("int4", "int8")
    assert re.fullmatch(r"the residual of int4 was [\d.]+ times the gradient, more than 3", second.cause)
    assert second.step <= 100 + 2 * LOOK + 5
    assert {t.spec: t.hurt for t in second.trials} == {PLAIN: "", "bf16": "", "int8": "", "int4": second.cause}
    assert all((t.residual or 0.0) > 3 for t in second.trials if t.hurt)


def test_one_step_of_a_large_residual_does_not_count() -> None:
    now_and_then: Errors = lambda spec, step: 9.0 if spec == "int4" and step % 2 else 0.1  # noqa: E731
    world = World(PAYS, predicted=predicted(PAYS), residuals=now_and_then).run(2000)
    assert [(choice.spec, choice.cause) for choice in world.searches[0].choices] == [("int4", "")]


def test_an_error_and_a_residual_that_are_too_large_in_different_steps_do_not_count() -> None:
    odd: Errors = lambda spec, step: 9.0 if spec == "int4" and step % 2 else 0.1  # noqa: E731
    even: Errors = lambda spec, step: 9.0 if spec == "int4" and step % 2 == 0 else 0.1  # noqa: E731
    world = World(PAYS, predicted=predicted(PAYS), errors=odd, residuals=even).run(2000)
    assert [(choice.spec, choice.cause) for choice in world.searches[0].choices] == [("int4", "")]
    assert world.specs.count("int4") > 1800


def jumps(at: int, to: float, until: int = 10**9) -> Losses:
    """A loss of about 2, and higher from a step on under int4."""
    return lambda spec, step, rank: (to if spec == "int4" and at <= step < until else 2.0) + 0.1 * rank


def test_a_loss_that_rises_gives_way_to_a_gentler_spec_and_comes_back() -> None:
    world = World(PAYS, predicted=predicted(PAYS), losses=jumps(150, 5.0, 300)).run(1500)
    first, second, third = world.searches[0].choices
    assert (first.spec, second.spec, third.spec) == ("int4", "int8", "int4")
    assert re.fullmatch(r"the loss rose to [\d.]+ from a mean of 2.1 under int4", second.cause)
    assert 150 <= second.step <= 150 + 2 * LOOK + 5
    assert 280 <= third.step - second.step <= 1200
    assert all(choice.cause == "" for choice in (first, third))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_on_one_rank_is_one_for_all(loss: float) -> None:
    broken: Losses = lambda spec, step, rank: loss if 100 <= step < 140 and rank == 2 else 2.0  # noqa: E731
    first, second = World(PAYS, predicted=predicted(PAYS), losses=broken).run(200).searches[0].choices
    assert (first.spec, second.spec, second.cause) == ("int4", "int8", f"the loss was {loss} under int4")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_one_step_whose_loss_is_not_finite_is_no_reason(loss: float) -> None:
    """A GradScaler skips it. Infinities of two signs at once are no reason either."""
    broken: Losses = lambda spec, step, rank: (-loss if rank else loss) if step == 100 else 2.0  # noqa: E731
    choices = World(PAYS, predicted=predicted(PAYS), losses=broken).run(200).searches[0].choices
    assert [(choice.spec, choice.cause) for choice in choices] == [("int4", "")]


def test_a_loss_that_rises_in_another_phase_is_the_usual_one_there() -> None:
    world = World(PAYS, predicted=predicted(PAYS), losses=lambda spec, step, rank: 2.0 if step < 150 else 9.0).run(150)
    for search in world.searches:
        search.expect_another_loss()
    world.run(400)
    assert [(choice.spec, choice.cause) for choice in world.searches[0].choices] == [("int4", "")]


def test_a_loss_that_rises_while_specs_are_tried_is_not_blamed_on_the_chosen_one() -> None:
    slower: Errors = lambda spec, step: PAYS(spec, step) * (1.5 if step >= 200 else 1)  # noqa: E731
    since = [10**9]
    losses: Losses = lambda spec, step, rank: 2.0 if step < since[0] else 9.0  # noqa: E731
    world = World(slower, predicted=predicted(PAYS), losses=losses).run(203)
    while world.searches[0].state != "trying":
        world.run(1)
    since[0] = len(world.specs) + 2
    world.run(400)
    assert {choice.cause for choice in world.searches[0].choices} == {""}


def test_a_loss_that_stops_being_finite_while_specs_are_tried_is_not_blamed_on_the_chosen_one() -> None:
    """A spec that was tried may have done it, and weights that are NaN stay so under each."""
    nan = float("nan")
    world = World(PAYS, predicted=predicted(PAYS), losses=lambda spec, step, rank: 2.0 if step < 15 else nan).run(300)
    assert {choice.cause for choice in world.searches[0].choices} == {""}
    assert world.chosen == "int4"


def test_a_loss_that_was_finite_again_under_the_chosen_spec_is_its_own() -> None:
    nan = float("nan")
    broken: Losses = lambda spec, step, rank: nan if 15 <= step < 60 or 200 <= step < 240 else 2.0  # noqa: E731
    world = World(PAYS, predicted=predicted(PAYS), losses=broken).run(300)
    assert [choice.cause for choice in world.searches[0].choices if choice.cause] == ["the loss was nan under int4"]


def test_weights_that_stay_nan_are_blamed_on_the_spec_that_was_in_use_when_they_broke_and_on_no_other() -> None:
    world = World(
        PAYS, predicted=predicted(PAYS), losses=lambda spec, step, rank: 2.0 if step < 200 else float("nan")
    ).run(1200)
    assert {choice.cause for choice in world.searches[0].choices} == {"", "the loss was nan under int4"}


def test_a_loss_that_falls_or_swings_is_no_reason() -> None:
    noise = random.Random(1)
    for loss in (
        lambda spec, step, rank: 10 * 0.99**step * noise.uniform(0.5, 1.5),
        lambda spec, step, rank: noise.uniform(-1, 1),
        lambda spec, step, rank: 2 + 0.6 * (step // 100 % 2),
        lambda spec, step, rank: 2.0 if rank == 1 else None,
    ):
        world = World(PAYS, predicted=predicted(PAYS), losses=loss).run(1500)
        assert [(choice.spec, choice.cause) for choice in world.searches[0].choices] == [("int4", "")]


def test_a_loss_that_rises_without_compression_is_no_codec_s() -> None:
    rises: Losses = lambda spec, step, rank: 2.0 if step < 100 else 50.0  # noqa: E731
    world = World(DOES_NOT, predicted=predicted(DOES_NOT), losses=rises).run(400)
    assert [(choice.spec, choice.cause) for choice in world.searches[0].choices] == [(PLAIN, "")]
