"""A search: the same trials by any number of workers and through a kill -9, and bad ones given up early."""

import math
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Died, run
from tiers import slowly

from commpress.model.search import STRATEGIES, Problem, Pruned, Result, SearchError, Space, Trial, Weights, search
from commpress.model.search.strategies import library

SPACE = Space(
    {"a": (0, 1, 2, 3, 4), "b": ("x", "y"), "c": (None, True, 2.5), "d": (1, 2)},
    {"d": {"b": ["y"]}},
)
WEIGHTS = Weights(1.0, 0.1)
TRIALS = 14


def quality(trial: Trial) -> float:
    """Best at a = 3, b = y, c = True, and a little noise of the trial's own seed."""
    c = trial.choice
    noise = 0.01 * torch.rand((), dtype=torch.float32).item()
    return 5.0 - abs(float(c["a"] or 0) - 3) + (c["b"] == "y") + (c["c"] is True) + noise  # type: ignore[arg-type]


def size(choice: dict[str, Any]) -> float:
    return 10.0 * float(choice["a"]) + float(choice["d"])


PROBLEM = Problem(SPACE, quality, size)


def sought(strategy: str, folder: Path | None = None, problem: Problem = PROBLEM, **settings: Any) -> Result:
    return search(problem, **{"strategy": strategy, "trials": TRIALS, "folder": folder, **settings})


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["front", "h"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trials_follow_from_the_seed_and_no_choice_comes_twice(strategy: str, weights: Weights | None) -> None:
    first = sought(strategy, weights=weights)
    assert first == sought(strategy, weights=weights)
    assert first.trials[:9] == sought(strategy, weights=weights, trials=9).trials
    assert first.trials != sought(strategy, weights=weights, seed=1).trials
    assert [tried.number for tried in first.trials] == list(range(TRIALS))
    choices = [tried.choice for tried in first.trials]
    assert not [choice for i, choice in enumerate(choices) if choice in choices[:i]]
    assert all(choice == SPACE.canonical(choice) for choice in choices)
    assert all(tried.size == size(tried.choice) for tried in first.trials)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_ends_when_all_choices_were_tried(strategy: str) -> None:
    found = sought(strategy, trials=100)
    assert len(found.trials) == 5 * (1 + 2) * 3  # d counts beside y alone
    best = max(found.trials, key=lambda tried: tried.quality or 0.0)
    assert found.best == best
    assert best.choice == {"a": 3, "b": "y", "c": True, "d": best.choice["d"]}
    assert best in found.front


@pytest.mark.parametrize("strategy", ["tpe", "nsga2"])
def test_it_learns_from_trials_more_than_chance_does(strategy: str) -> None:
    """Three seeds of 40 trials among 5^8 choices."""
    space = Space({f"x{i}": (0, 1, 2, 3, 4) for i in range(8)})

    def score(trial: Trial) -> float:
        return -float(sum(abs(int(option or 0) - 3) for option in trial.choice.values()))

    def best(strategy: str, seed: int) -> float:
        settings = {"strategy": strategy, "trials": 40, "seed": seed, "weights": Weights(1.0)}
        found = search(Problem(space, score, lambda choice: 0.0), together=8, **settings).best  # type: ignore[arg-type]
        assert found is not None
        assert found.quality is not None
        return found.quality

    learnt, chance = ([best(way, seed) for seed in range(3)] for way in (strategy, "random"))
    assert statistics.mean(learnt) > statistics.mean(chance), (learnt, chance)


# --- folders, workers, ends --------------------------------------------------------------------------------------


def shared(strategy: str, folder: Path, weights: Weights | None) -> tuple[Result, list[int]]:
    """A search on this rank, and which trials it did. Its first one waits until each rank has one."""
    own = []

    def together(trial: Trial) -> float:
        own.append(trial.number)
        (folder / f"rank-{dist.get_rank()}").touch()
        while len(list(folder.glob("rank-*"))) < dist.get_world_size():
            time.sleep(0.01)
        return quality(trial)

    return sought(strategy, folder, Problem(SPACE, together, size), weights=weights), own


@pytest.mark.parametrize(
    ("strategy", "world_size", "weights"),
    slowly(
        [("random", 2, None), ("tpe", 2, WEIGHTS), ("nsga2", 2, None), ("tpe", 3, None)],
        quick=[("tpe", 2, WEIGHTS), ("nsga2", 2, None)],
    ),
)
def test_ranks_share_the_trials_and_come_to_what_one_comes_to(
    tmp_path: Path, strategy: str, world_size: int, weights: Weights | None
) -> None:
    alone = sought(strategy, weights=weights)
    by_rank = run(world_size, shared, strategy, tmp_path / "search", weights)
    assert all(found == alone for found, _ in by_rank)
    done = [number for _, own in by_rank for number in own]
    assert sorted(done) == list(range(TRIALS))
    assert all(own for _, own in by_rank)


def killed_in(number: int, ranks: tuple[int, ...], strategy: str, folder: Path) -> Result:
    """A search in which these ranks are killed while they do a trial of this number or a later one."""

    def deadly(trial: Trial) -> float:
        if trial.number >= number and dist.get_rank() in ranks:
            os.kill(os.getpid(), signal.SIGKILL)
        if trial.number >= number:
            time.sleep(0.3)  # the other one gets a trial, too
        return quality(trial)

    return sought(strategy, folder, Problem(SPACE, deadly, size))


@pytest.mark.parametrize("strategy", slowly(STRATEGIES, quick=("tpe",)))
def test_the_same_trials_after_kill_9_when_the_search_is_resumed(tmp_path: Path, strategy: str) -> None:
    folder = tmp_path / "search"
    assert run(2, killed_in, 6, (0, 1), strategy, folder, fresh=True) == [Died(-signal.SIGKILL)] * 2
    left = sought(strategy, folder, trials=6)
    assert left == sought(strategy, trials=6)
    assert sought(strategy, folder) == sought(strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_trials_by_who_is_left_after_kill_9(tmp_path: Path, strategy: str) -> None:
    left, died = run(2, killed_in, 6, (1,), strategy, tmp_path / "search", fresh=True)
    assert died == Died(-signal.SIGKILL)
    assert left == sought(strategy)


def test_a_longer_search_goes_on_with_the_trials_that_are_there(tmp_path: Path) -> None:
    done: list[int] = []

    def counted(trial: Trial) -> float:
        done.append(trial.number)
        return quality(trial)

    problem = Problem(SPACE, counted, size)
    assert sought("tpe", tmp_path, problem, trials=6) == sought("tpe", trials=6)
    assert sought("tpe", tmp_path, problem) == sought("tpe")
    assert done == list(range(TRIALS))
    assert sought("tpe", tmp_path, problem, trials=5) == sought("tpe", trials=5)


def test_half_a_line_of_a_write_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    sought("random", tmp_path, trials=5)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"cut o')
    assert sought("random", tmp_path) == sought("random")
    assert sought("random", tmp_path) == sought("random")  # the file is whole again


def test_the_journal_is_optunas(tmp_path: Path) -> None:
    """Which its own tools read: states, options and both objectives."""
    sought("random", tmp_path, Problem(SPACE, lambda t: math.nan if t.number == 2 else quality(t), size))
    optuna = library()
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2 + ["FAIL"] + ["COMPLETE"] * (TRIALS - 3)
    assert study.trials[0].params == sought("random").trials[0].choice


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "has seed 0, this one 1"),
        ({"strategy": "tpe"}, "has strategy 'random', this one 'tpe'"),
        ({"together": 5}, "has together 4, this one 5"),
        ({"weights": WEIGHTS}, "has weights None, this one {'alpha': 1.0, 'beta': 0.1}"),
        ({"problem": Problem(Space({"a": (1, 2)}), quality, size)}, "has space {'a': [0, 1, 2, 3, 4]"),
        ({"problem": Problem(Space({**SPACE}), quality, size)}, "has conditions"),
        ({"problem": Problem(SPACE, quality, size, name="another")}, "has problem '', this one 'another'"),
    ],
)
def test_a_folder_of_another_search_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    sought("random", tmp_path, trials=1)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the words follow
        sought(**{"strategy": "random", "folder": tmp_path, **change})
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


# --- trials that fail or are given up ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_has_no_finite_quality_is_never_on_the_front(strategy: str) -> None:
    problem = Problem(SPACE, lambda trial: math.nan if trial.choice["b"] == "y" else quality(trial), size)
    found = sought(strategy, problem=problem, trials=20)
    states = {tried.state for tried in found.trials}
    assert states == {"done", "failed"}
    for tried in found.trials:
        assert (tried.state == "failed") == (tried.choice["b"] == "y") == (tried.quality is None)
    assert all(tried.choice["b"] == "x" for tried in found.front)


def test_a_trial_behind_the_median_of_those_no_larger_is_given_up() -> None:
    """Each choice has a size of its own, and quality falls with size: whoever has four smaller ones before it is behind."""
    space = Space({"n": tuple(range(12))})
    reached = []

    def judge(trial: Trial) -> float:
        for step in (1, 2):
            trial.report(step, -trial.size * step)
        reached.append(trial.number)
        return -trial.size

    found = search(Problem(space, judge, lambda choice: float(choice["n"] or 0)), trials=12, strategy="random")
    pruned = [tried for tried in found.trials if tried.state == "pruned"]
    for tried in found.trials:
        before = found.trials[: tried.number // 4 * 4]  # of earlier rounds
        assert (tried in pruned) == (sum(other.size <= tried.size for other in before) >= 4)
    assert reached == [tried.number for tried in found.trials if tried.state == "done"]
    assert 0 < len(pruned) < 8
    assert all(list(tried.curve) == [1] and tried.quality is None for tried in pruned)


def test_with_weights_h_is_compared() -> None:
    before = search(
        Problem(Space({"n": (0, 1, 2, 3)}), lambda t: t.report(1, 1.0) or 1.0, lambda c: float(c["n"]))
    ).trials
    assert Trial(4, {"n": 0}, 9.0, 0, before, None).report(1, 1.0) is None
    with pytest.raises(Pruned, match="trial 4: 1 at step 1, below the median of 4 trials"):
        Trial(4, {"n": 0}, 9.0, 0, before, Weights(1.0, 1.0)).report(1, 1.0)
    with pytest.raises(Pruned):
        Trial(4, {"n": 0}, 9.0, 0, before, None).report(1, math.nan)
    assert Trial(4, {"n": 0}, 0.5, 0, before, None).report(1, 0.0) is None  # one of them is no larger: too few
    trial = Trial(4, {"n": 0}, 9.0, 0, before, None)
    trial.report(3, 1.0)
    with pytest.raises(ValueError, match="step 3 after step 3"):
        trial.report(3, 1.0)


def test_an_error_names_trial_and_choice_and_what_was_done_stays(tmp_path: Path) -> None:
    def breaks(trial: Trial) -> float:
        if trial.number == 3:
            raise RuntimeError("no memory")
        return quality(trial)

    with pytest.raises(SearchError, match=r"^trial 3, \{'a': .*\}: RuntimeError: no memory$"):
        sought("random", tmp_path, Problem(SPACE, breaks, size))
    assert sought("random", tmp_path) == sought("random")
    with pytest.raises(SearchError, match=r"trial 0, .*: TypeError: .*'NoneType'"):
        sought("random", problem=Problem(SPACE, lambda trial: None, size))  # type: ignore[arg-type,return-value]
    with pytest.raises(SearchError, match=r"trial 0, .*: its size is nan, expected a finite number"):
        sought("random", problem=Problem(SPACE, quality, lambda choice: math.nan))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["front", "h"])
def test_finalists_are_judged_once_on_their_own(tmp_path: Path, weights: Weights | None) -> None:
    judged = []

    def final(trial: Trial) -> float:
        judged.append(trial.number)
        return 2 * quality(trial)

    problem = Problem(SPACE, quality, size, final=final)
    for _ in range(2):
        found = sought("random", tmp_path, problem, weights=weights, finalists=2)
    assert sorted(judged) == sorted(found.finals)
    assert len(judged) == 2
    numbers = {tried.number: tried for tried in found.front}
    assert set(judged) <= set(numbers)
    if weights is None:
        assert set(judged) == {found.front[0].number, found.front[-1].number}
    else:
        assert found.best is not None
        assert found.best.number in judged
    assert all(value == 2 * (numbers[number].quality or 0.0) for number, value in found.finals.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "tepid"}, "strategy 'tepid': expected one of random, tpe, nsga2"),
        ({"trials": 0}, "trials 0: expected a whole number of at least 1"),
        ({"together": 0}, "together 0: expected a whole number of at least 1"),
        ({"strategy": "nsga2", "together": 1}, "together 1: expected a whole number of at least 2"),
        ({"finalists": 1}, "finalists 1: the problem has no `final`"),
        (
            {"problem": Problem({"a": (1, 2)}, quality, size)},
            "the space of the problem is a dict, expected a commpress",
        ),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sought(**{"strategy": "random", **settings})
