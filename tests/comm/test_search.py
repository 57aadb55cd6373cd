"""The search of `auto`, on a clock of its own: what it chooses, when, that all ranks choose the same, and what that costs."""

import random

import pytest
from search_world import DOES_NOT, PAYS, SPECS, Errors, Seconds, World, hurts, link, predicted

from commpress.comm.choice import cause_of
from commpress.comm.search import LATEST, LOOK, PLAIN


def test_the_fastest_is_chosen_within_fifty_steps() -> None:
    world = World(PAYS, predicted=predicted(PAYS)).run(50)
    assert world.chosen == "int4"
    assert world.searches[0].choices[0].step <= 50
    before = world.time
    world.run(150)  # int8 is close behind, so they meet again
    assert world.specs[-50:] == ["int4"] * 50
    assert world.time - before < 150 * 0.3 * 1.02


def test_what_chance_has_decided_is_decided_again_by_longer_turns() -> None:
    near = link(none=0.265, bf16=0.259, int8=0.234, int4=0.222)
    worlds = [World(shaken(near, seed, 0.1), predicted=predicted(near)).run(300) for seed in range(60)]
    first = [world.searches[0].choices[0].spec for world in worlds]
    assert first.count("int4") < 50
    assert [world.chosen for world in worlds].count("int4") >= 55
    lost = [sum(near(spec, 0) for spec in world.specs[50:]) / (250 * 0.222) for world in worlds]
    assert sum(of > 1.03 for of in lost) <= 6


def test_between_specs_that_are_as_fast_a_duel_finds_the_gentler_one() -> None:
    same = link(none=0.5, bf16=0.5, int8=0.3, int4=0.299)
    worlds = [World(shaken(same, seed, 0.04), predicted=predicted(same)).run(250) for seed in range(30)]
    assert [world.chosen for world in worlds].count("int8") >= 27


def test_what_was_not_tried_but_predicted_to_be_as_fast_has_its_chance() -> None:
    near = link(none=0.3, bf16=0.266, int8=0.242, int4=0.229)
    said = {PLAIN: 1.0, "bf16": 0.78, "int8": 0.77, "int4": 0.775}
    world = World(near, predicted=said, errors=lambda spec, step: 0.1).run(300)
    assert world.searches[0].choices[0].spec == "int8"  # predicted to be the fastest, then bf16: int4 is not tried
    assert world.chosen == "int4"
    trials = {trial.spec: (trial.measured, trial.error) for trial in world.searches[0].choices[-1].trials}
    assert trials["int4"] == (pytest.approx(0.229), 0.1)


def test_what_was_predicted_to_be_as_fast_and_is_far_behind_leaves_at_once() -> None:
    said = {PLAIN: 1.0, "bf16": 0.78, "int8": 0.77, "int4": 0.775}
    world = World(link(none=0.3, bf16=0.266, int8=0.242, int4=0.6), predicted=said).run(300)
    assert world.chosen == "int8"
    assert world.specs.count("int4") < LOOK


def test_what_was_not_tried_and_hurts_is_not_chosen() -> None:
    near = link(none=0.3, bf16=0.266, int8=0.242, int4=0.229)
    said = {PLAIN: 1.0, "bf16": 0.78, "int8": 0.77, "int4": 0.775}
    world = World(near, predicted=said, errors=lambda spec, step: 0.9 if spec == "int4" else 0.1).run(280)
    assert world.chosen == "int8"
    assert world.specs.count("int4") == 3  # one behind another spec, and two that are looked into
    trials = {trial.spec: (trial.measured, trial.error) for trial in world.searches[0].choices[-1].trials}
    assert trials["int4"] == (None, 0.9)


PIECES = " in 4 MB"


def in_pieces(near: Seconds, times: float) -> World:
    """A world in which specs may also be sent in pieces, predicted to be faster, which take `times` as long."""

    def seconds(spec: str, step: int) -> float:
        return near(spec.removesuffix(PIECES), step) * (times if spec.endswith(PIECES) else 1.0)

    said = {}
    for spec, share in predicted(near).items():
        said |= {spec: share} | ({spec + PIECES: 0.95 * share} if spec != PLAIN else {})
    return World(seconds, predicted=said, codec=lambda spec: spec.removesuffix(PIECES), errors=lambda spec, step: 0.1)


def test_pieces_are_tried_only_of_the_chosen_spec_and_replace_it_if_they_are_faster() -> None:
    world = in_pieces(PAYS, 0.9).run(250)
    assert world.searches[0].choices[0].spec == "int4"
    assert not any(spec.endswith(PIECES) for spec in world.specs[: world.searches[0].choices[0].step])
    assert world.chosen == f"int4{PIECES}"
    trials = {trial.spec: trial.measured for trial in world.searches[0].choices[-1].trials}
    assert trials[f"int4{PIECES}"] == pytest.approx(0.27)
    assert trials[f"bf16{PIECES}"] is None


def test_pieces_that_are_no_faster_leave_whole_buckets_and_cost_little() -> None:
    world = in_pieces(PAYS, 1.08).run(300)
    assert world.chosen == "int4"
    assert world.specs[-50:] == ["int4"] * 50
    with_pieces = [took for spec, took in zip(world.specs, [0.3 * 0.08] * 300, strict=True) if spec.endswith(PIECES)]
    assert sum(with_pieces) < 0.01 * world.time


def test_a_codec_that_hurts_in_pieces_is_not_chosen_whole() -> None:
    world = in_pieces(PAYS, 0.9).run(250)
    world.errors = lambda spec, step: 0.9 if spec.startswith("int4") else 0.1
    world.run(60)
    assert not world.chosen.startswith("int4")
    cause = next(choice.cause for choice in world.searches[0].choices if choice.cause)
    assert f"the means of int4{PIECES} were off by 0.90" in cause
    assert not any(spec == "int4" for spec in world.specs[-40:])


def test_a_codec_that_hurts_while_it_is_tried_is_named_once() -> None:
    world = in_pieces(PAYS, 0.9)
    world.errors = lambda spec, step: 0.9 if spec.startswith("int4") else 0.1
    world.run(60)
    choice = world.searches[0].choices[0]
    assert choice.spec == "int8"
    assert choice.cause == "the means of int4 were off by 0.90 of the dense ones, more than 0.5"


def test_a_search_that_finds_the_same_codec_again_waits_twice_as_long_also_if_its_pieces_had_won() -> None:
    def shaky(times: float) -> World:
        near = in_pieces(PAYS, times)
        steady = near.seconds
        near.seconds = lambda spec, step: steady(spec, step) * (1.4 if step // 60 % 2 else 1.0)
        return near.run(2500)

    whole, pieces = shaky(1.08), shaky(0.9)
    assert pieces.chosen == f"int4{PIECES}"
    assert pieces.specs.count(PLAIN) <= 1.3 * whole.specs.count(PLAIN)


def test_what_hurts_in_a_duel_is_out_of_it() -> None:
    near = link(none=0.5, bf16=0.5, int8=0.3, int4=0.29)
    world = World(near, predicted=predicted(near), errors=hurts(45)).run(200)
    assert world.chosen == "int8"
    assert "int4" not in world.specs[100:]


def test_a_link_that_changes_during_a_duel_is_noticed() -> None:
    def seconds(spec: str, step: int) -> float:
        return (PAYS if step < 60 else link(none=0.1, bf16=0.11, int8=0.2, int4=0.2))(spec, step)

    world = World(seconds, predicted=predicted(PAYS)).run(150)
    assert world.chosen == PLAIN


def test_the_first_steps_are_plain_training() -> None:
    world = World(PAYS).run(6)
    assert world.specs == [PLAIN] * 6


@pytest.mark.parametrize("gain", [0.0, 0.01, -0.05])
def test_nothing_is_compressed_where_that_does_not_pay(gain: float) -> None:
    seconds = link(**{spec: 1.0 if spec == PLAIN else 1.0 - gain for spec in SPECS})
    assert World(seconds).run(60).chosen == PLAIN


def test_it_costs_little_to_find_out_that_compression_does_not_pay() -> None:
    world = World(DOES_NOT, predicted=predicted(DOES_NOT)).run(300)
    assert world.chosen == PLAIN
    assert world.time < 300 * 0.2 * 1.01


def test_a_wrong_prediction_is_found_out() -> None:
    world = World(DOES_NOT, predicted={PLAIN: 1.0, "bf16": 0.9, "int8": 0.5, "int4": 0.4}).run(60)
    assert set(world.specs) == {PLAIN, "int4", "int8"}
    assert world.chosen == PLAIN


def test_what_cannot_pay_is_not_tried() -> None:
    world = World(PAYS, predicted={PLAIN: 1.0, "bf16": 1.5, "int8": 2.0, "int4": 1.4}).run(300)
    assert set(world.specs) == {PLAIN}
    assert world.chosen == PLAIN


def test_what_is_far_behind_is_dropped_after_a_round() -> None:
    slow = link(none=10.0, bf16=5.0, int8=1.1, int4=1.0)
    world = World(slow, predicted=predicted(slow)).run(60)
    assert world.chosen == "int4"
    # warm-up, its turn of the first round, and a step behind it in which the ranks tell each other
    assert world.specs.count(PLAIN) == 3 + 3 + 1
    trials = {trial.spec: trial.measured for trial in world.searches[0].choices[0].trials}
    assert trials == {"none": 10.0, "bf16": None, "int8": pytest.approx(1.1), "int4": 1.0}


def test_ranks_whose_clocks_differ_choose_the_same() -> None:
    for seed in range(20):
        world = World(link(none=1.0, bf16=0.98, int8=0.97, int4=0.985), ranks=4, noise=0.2)
        world.random.seed(seed)
        world.run(200)  # asserts that they do at every step
        assert world.chosen in SPECS


@pytest.mark.parametrize("noise", [0.05, 0.1])
def test_noise_does_not_hide_a_clear_gain(noise: float) -> None:
    for seed in range(20):
        world = World(PAYS, noise=noise, predicted=predicted(PAYS))
        world.random.seed(seed)
        assert world.run(60).chosen in ("int4", "int8")


def shaken(seconds: Seconds, seed: int, by: float) -> Seconds:
    """Steps of a busy machine: all ranks see the same longer or shorter one."""
    noise = random.Random(seed)
    return lambda spec, step: seconds(spec, step) * noise.uniform(1 - by, 1 + by)


def test_specs_that_are_as_fast_are_seldom_taken_for_noise() -> None:
    same = link(**dict.fromkeys(SPECS, 1.0))
    chosen = [World(shaken(same, seed, 0.1)).run(80).chosen for seed in range(100)]
    assert chosen.count(PLAIN) > 60


def test_a_lead_of_a_tenth_is_found_in_such_noise() -> None:
    ahead = link(none=1.0, bf16=1.0, int8=0.98, int4=0.9)
    fast = [World(shaken(ahead, seed, 0.1), predicted=predicted(ahead)).run(80) for seed in range(100)]
    assert [world.chosen for world in fast].count(PLAIN) < 15
    assert all(world.searches[0].choices[0].step <= 50 for world in fast)
    assert len({world.searches[0].choices[0].step for world in fast}) > 1  # further rounds where it was open


def test_pauses_between_steps_change_nothing() -> None:
    world = World(lambda spec, step: PAYS(spec, step) * (50 if step % 10 == 9 else 1), predicted=predicted(PAYS))
    assert world.run(400).chosen == "int4"
    assert len(world.searches[0].choices) == 1


SLOW = link(none=5.0, bf16=2.6, int8=1.4, int4=0.8)


def test_a_link_that_slows_down_is_noticed_and_one_that_recovers_too() -> None:
    def seconds(spec: str, step: int) -> float:
        return (SLOW if 100 <= step < 300 else DOES_NOT)(spec, step)

    world = World(seconds, predicted=predicted(PAYS)).run(180)
    assert [choice.spec for choice in world.searches[0].choices] == [PLAIN, "int4"]
    assert world.specs[150:180] == ["int4"] * 30
    world.run(220)
    assert world.chosen == PLAIN
    assert world.specs[-50:] == [PLAIN] * 50


@pytest.mark.parametrize("before", [DOES_NOT, PAYS])
def test_a_link_that_slows_down_is_noticed_also_after_tens_of_thousands_of_steps(before: Seconds) -> None:
    world = World(lambda spec, step: (before if step < 30_000 else SLOW)(spec, step), predicted=predicted(PAYS))
    world.run(30_000)
    searched = world.searches[0].choices[-1].step
    world.run(200)
    assert world.searches[0].choices[-1].step > searched
    assert world.chosen == "int4"
    assert world.specs[30_100:] == ["int4"] * 100


def test_a_link_that_slows_down_is_noticed_also_after_a_spec_that_hurts_was_tried_again_and_again() -> None:
    always: Errors = lambda spec, step: 0.9 if spec == "int4" else 0.1  # noqa: E731
    seconds: Seconds = lambda spec, step: (PAYS if step < 30_000 else DOES_NOT)(spec, step)  # noqa: E731
    world = World(seconds, predicted=predicted(PAYS), errors=always).run(30_200)
    assert world.chosen == PLAIN


HIDDEN = link(none=0.194, bf16=0.194, int8=0.194, int4=0.192)
"""Steps of a long backward, which hides the exchange."""
SHOWS = link(none=0.230, bf16=0.219, int8=0.203, int4=0.192)
"""The same on a link a tenth as fast."""


def with_exchanges(before: float, after: float, since: int = 500) -> World:
    """A long backward on a link that slows down, where the exchanges of `none` take so many seconds."""
    return World(
        lambda spec, step: (HIDDEN if step < since else SHOWS)(spec, step),
        predicted=predicted(SHOWS),
        exchanges=lambda spec, step: (before if step < since else after) / (1 if spec == PLAIN else 8),
    )


def test_a_link_that_slows_down_behind_a_long_backward_is_noticed_by_the_exchanges() -> None:
    world = with_exchanges(0.012, 0.065).run(450)
    assert world.chosen == PLAIN
    world.run(300)
    assert world.chosen == "int4"
    assert world.specs[600:].count("int4") > 100


def test_exchanges_that_are_a_small_share_of_a_step_may_swing() -> None:
    world = with_exchanges(0.001, 0.008)
    world.seconds = HIDDEN
    world.run(450)
    choices = len(world.searches[0].choices)
    assert len(world.run(1500).searches[0].choices) == choices


def test_exchanges_that_drift_and_change_nothing_are_looked_into_ever_more_rarely() -> None:
    swings: Seconds = lambda spec, step: 0.06 * (3 if step // 200 % 2 else 1)  # noqa: E731
    world = World(PAYS, predicted=predicted(PAYS), exchanges=swings).run(4000)
    assert {choice.spec for choice in world.searches[0].choices} == {"int4"}
    assert len(world.searches[0].choices) < 12
    assert world.time < 1.03 * 4000 * 0.3


@pytest.mark.parametrize("steps", [500, 1000, 2000, 4000])
def test_what_hurts_is_tried_again_only_where_that_takes_a_hundredth_of_the_time(steps: int) -> None:
    far = link(none=6.0, bf16=3.1, int8=1.6, int4=0.95)
    world = World(far, predicted=predicted(far), errors=lambda spec, step: 0.9 if spec == "int4" else 0.1).run(60)
    assert world.chosen == "int8"
    before = world.time
    world.run(steps)
    assert world.time - before < 1.01 * steps * 1.6


def test_a_duel_that_was_dear_delays_the_next_search() -> None:
    world = in_pieces(PAYS, 20.0).run(7000)
    assert [choice.spec for choice in world.searches[0].choices] == ["int4"]


def test_the_winner_of_a_duel_meets_its_own_pieces_and_no_others() -> None:
    def near(spec: str, step: int) -> float:
        later = 0.24 if step < 60 else 0.229  # the search finds int4 as fast as int8, and the duel finds it ahead
        return link(none=0.3, bf16=0.266, int8=0.242, int4=later)(spec, step)

    said = {PLAIN: 1.0, "bf16": 0.85, f"bf16{PIECES}": 0.9, "int8": 0.79, f"int8{PIECES}": 0.75}
    said |= {"int4": 0.7, f"int4{PIECES}": 0.66}
    world = in_pieces(near, 0.9)
    for search in world.searches:
        search.predict = lambda everyone, plain: {spec: share * plain for spec, share in said.items()}
    world.run(400)
    assert world.searches[0].choices[0].spec == "int8"
    assert world.chosen == f"int4{PIECES}"
    won = next(choice.step for choice in world.searches[0].choices if choice.spec == "int4")
    assert f"int8{PIECES}" not in world.specs[won:]


def test_pieces_that_are_not_measured_again_do_not_keep_a_cause() -> None:
    """Time alone decides against a codec once it was measured whole and did not hurt."""
    world = in_pieces(lambda spec, step: (PAYS if step < 400 else DOES_NOT)(spec, step), 1.08)
    world.errors = lambda spec, step: 0.9 if spec.startswith("int4") and 100 <= step < 200 else 0.1
    world.run(300)
    assert cause_of(world.searches[0].choices).startswith("the means of int4")
    assert world.run(1500).chosen == PLAIN
    assert cause_of(world.searches[0].choices) == ""


def test_steps_that_swing_are_looked_into_less_and_less_also_if_a_duel_overrules_each_search() -> None:
    def seconds(spec: str, step: int) -> float:
        searching = world.searches[0]._state == "trying"  # then int8 leads, and in the duel after it int4
        near = {"none": 6.0, "bf16": 3.0, "int8": 0.95, "int4": 0.96 if searching else 0.90}
        return near[spec] * (1.5 if step // 200 % 2 else 1.0)

    world = World(seconds, predicted={"none": 1.0, "bf16": 0.5, "int8": 0.158, "int4": 0.15})
    world.run(6000)
    assert {choice.spec for choice in world.searches[0].choices} >= {"int8", "int4"}
    assert world.specs.count(PLAIN) < 0.01 * 6000


def test_exchanges_are_compared_with_those_of_the_search_not_of_the_first_look_after_it() -> None:
    world = with_exchanges(0.06, 0.18)
    world.asked = 3.0  # the ranks look every thousand steps
    world.run(40)
    slow = world.exchanges
    world.exchanges = lambda spec, step: 0.18
    searched = len(world.searches[0].choices)
    world.run(3000)
    assert slow is not None
    assert len(world.searches[0].choices) > searched


def test_steps_that_swing_by_themselves_are_looked_into_less_and_less() -> None:
    def seconds(spec: str, step: int) -> float:
        return PAYS(spec, step) * (1.5 if step // 200 % 2 else 1.0)

    world = World(seconds, predicted=predicted(PAYS)).run(4000)
    steps = [choice.step for choice in world.searches[0].choices]
    assert {choice.spec for choice in world.searches[0].choices} == {"int4"}
    assert len(steps) < 12
    ideal = sum(seconds("int4", step) for step in range(4000))
    assert world.time < 1.03 * ideal


@pytest.mark.parametrize("leads", [("int4", "int8"), ("int4", "int8", "bf16")])
def test_steps_that_swing_are_looked_into_less_and_less_also_if_another_codec_leads_each_time(
    leads: tuple[str, ...],
) -> None:
    def seconds(spec: str, step: int) -> float:
        swing = step // 200
        ahead = 0.9 if spec == leads[swing % len(leads)] else 1.0
        return {"none": 6.0}.get(spec, 1.0) * ahead * (1.5 if swing % 2 else 1.0)

    world = World(seconds, predicted={"none": 1.0, "bf16": 0.162, "int8": 0.16, "int4": 0.155}).run(4000)
    assert {choice.spec for choice in world.searches[0].choices} >= set(leads[:2])
    assert world.specs.count(PLAIN) < 0.015 * 4000


def test_a_link_that_changes_every_few_hundred_steps_is_followed_at_once_at_first_both_ways() -> None:
    def seconds(spec: str, step: int) -> float:
        return (SLOW if step // 300 % 2 else DOES_NOT)(spec, step)

    world = World(seconds, predicted=predicted(PAYS)).run(1200)
    for swing, spec in enumerate((PLAIN, "int4", PLAIN, "int4")):
        assert world.specs[300 * swing + 100 : 300 * (swing + 1)].count(spec) > 190


def test_looking_takes_at_most_a_hundredth_of_the_time() -> None:
    world = World(link(**dict.fromkeys(SPECS, 0.002)), asked=0.001).run(5000)
    assert world.asks * 0.001 < 0.011 * 5000 * 0.002


def test_it_looks_again_after_thousands_of_steps() -> None:
    world = World(PAYS, predicted=predicted(PAYS)).run(7000)
    assert len(world.searches[0].choices) == 3
    assert world.time < 7000 * 0.3 * 1.01


def test_what_leaves_the_error_budget_while_it_is_tried_is_not_chosen() -> None:
    world = World(PAYS, predicted=predicted(PAYS), errors=lambda spec, step: 0.9 if spec == "int4" else 0.1).run(60)
    assert world.chosen == "int8"
    assert world.specs.count("int4") == 3  # the first step after another spec does not count, and two do
    errors = {trial.spec: trial.error for trial in world.searches[0].choices[0].trials}
    assert errors["int8"] == 0.1


def every_fourth(mean: float) -> Seconds:
    """Steps of `int4` that exchange in every fourth step, and take so long in the mean."""
    return lambda spec, step: PAYS(spec, step) if spec != "int4" else 4 * mean - 0.3 if step % 4 == 0 else 0.1


@pytest.mark.parametrize(("mean", "chosen"), [(0.29, "int4"), (0.34, "int8")])
def test_steps_that_take_turns_count_by_their_mean(mean: float, chosen: str) -> None:
    ahead = {PLAIN: 1.0, "bf16": 1.4, "int8": 0.5, "int4": 0.4}
    world = World(every_fourth(mean), predicted=ahead, period=lambda spec: 4 if spec == "int4" else 1).run(200)
    assert world.chosen == chosen
    trials = {trial.spec: trial.measured for trial in world.searches[0].choices[0].trials}
    assert trials["int4"] == pytest.approx(mean)
    assert len(world.searches[0].choices) == 1  # a look takes whole periods, too


def test_long_periods_have_as_many_rounds_as_single_steps() -> None:
    noise = random.Random(3)
    blurred = [noise.uniform(0.92, 1.08) for _ in range(400)]
    both = {PLAIN: 1.0, "bf16": 1.4, "int8": 0.5, "int4": 0.45}
    pair = link(none=0.7, bf16=0.7, int8=0.32, int4=0.3)
    found = []
    for seed in range(40):
        shift = 7 * seed
        seconds: Seconds = lambda spec, step, s=shift: pair(spec, step) * blurred[(step // 4 + s) % 400]  # noqa: E731
        found.append(World(seconds, predicted=both, period=lambda spec: 1 if spec == PLAIN else 4).run(300))
    assert max(world.searches[0].choices[0].step for world in found) > 100  # where it was open, it went on
    assert max(world.searches[0].choices[0].step for world in found) <= 6 + 4 * LATEST


def test_while_a_search_is_held_the_plain_steps_go_on() -> None:
    world = World(lambda spec, step: PAYS(spec, step) * (3 if step < 20 else 1), predicted=predicted(PAYS))
    for search in world.searches:
        search.holds = True
    world.run(40)
    assert set(world.specs) == {PLAIN}
    for search in world.searches:
        search.holds = False
    world.run(60)
    assert world.chosen == "int4"
    trials = {trial.spec: trial.measured for trial in world.searches[0].choices[0].trials}
    assert trials[PLAIN] == pytest.approx(0.7)  # the last of them count


@pytest.mark.parametrize("first", range(10))
def test_a_pause_now_and_then_as_of_a_validation_shifts_no_spec(first: int) -> None:
    near = link(none=0.7, bf16=0.45, int8=0.32, int4=0.3)
    world = World(
        lambda spec, step: near(spec, step) + (20.0 if step % 10 == first else 0.0),
        predicted=predicted(near),
        errors=lambda spec, step: 0.1,
    ).run(300)
    assert world.chosen == "int4"
    measured = {t.spec: t.measured for t in world.searches[0].choices[-1].trials if t.measured}
    assert measured == {spec: pytest.approx(near(spec, 0)) for spec in measured}
