"""`commpress search`: what it prints and leaves, how it goes on, and what it refuses."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, run_command
from ranks import run

from commpress.launch import records, report

PROBLEMS = '''
"""Problems to search."""
import math
from commpress.model.search import Problem, Space

SPACE = Space({"width": (8, 16, 32), "kind": ("3x3", "5x5"), "depth": (1, 2, 3)})


def quality(trial):
    return trial.choice["width"] * (1 + (trial.choice["kind"] == "5x5")) / 64


def size(choice):
    return choice["width"] * choice["depth"]


def easy():
    return Problem(SPACE, quality, size, final=lambda trial: 2 * quality(trial))


def broken():
    def breaks(trial):
        raise RuntimeError("no memory")

    return Problem(SPACE, breaks, size)


def interrupted():
    def stops(trial):
        if trial.number == 3:
            raise KeyboardInterrupt
        return quality(trial)

    return Problem(SPACE, stops, size, name="problems:easy")


def hopeless():
    return Problem(SPACE, lambda trial: math.nan, size)


def fails():
    raise OSError("no data")


def none():
    return 3
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of problems, which is where the command runs."""
    (tmp_path / "problems.py").write_text(PROBLEMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("problems", None)


def searched(*flags: object, problem: str = "easy") -> Ended:
    return run_command("search", "--space", f"problems:{problem}", "--out", "found", *flags)


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("found/search.json").read_text())
    return found


def test_it_prints_the_front_and_leaves_a_record_and_a_picture(place: Path) -> None:
    code, out, err = searched("--trials", 10, "--finalists", 2)
    assert (code, err) == (0, "")
    assert "trial 10/10" in out
    assert "tpe looked for the front of quality and size: 10 trials, 10 judged to the end." in out
    found = record()
    assert len(found["rows"]) == 10
    assert len(found["finals"]) == 2
    rows = {row["number"]: row for row in found["rows"]}
    for number in found["front"]:
        choice = ", ".join(f"{name} = {option}" for name, option in rows[number]["choice"].items())
        assert choice in out
    for number, value in found["finals"].items():
        assert value == 2 * rows[int(number)]["quality"]
    page = Path("found/front.html").read_text()
    assert "Search: problems:easy" in page
    assert page.count('class="figure"') == 1
    assert records.kind(records.read(place / "found" / "search.json")) == records.SEARCHED


def test_the_same_command_goes_on_and_h_says_which_is_best(place: Path) -> None:
    flags = ("--strategy", "nsga2", "--beta", 0.01, "--seed", 3)
    assert searched("--trials", 5, *flags).code == 0
    five = record()["rows"]
    assert searched("--trials", 9, *flags).code == 0
    found = record()
    assert found["rows"][:5] == five  # seconds, too: none ran again
    assert len(found["rows"]) == 9
    h = {row["number"]: row["quality"] - 0.01 * row["size"] for row in found["rows"]}
    assert h[found["best"]] == max(h.values())
    code, _, err = searched("--trials", 9, *flags, "--seed", 4)
    assert code == 1
    assert err.count("\n") == 1
    assert "found: the search there has seed 3, this one 4" in err
    code, _, err = searched("--trials", 9, *flags, problem="hopeless")  # over the same options
    assert code == 1
    assert "found: the search there has problem 'problems:easy', this one 'problems:hopeless'" in err


def test_ctrl_c_loses_the_trial_under_way_alone(place: Path) -> None:
    code, _, err = searched("--trials", 9, problem="interrupted")
    assert (code, err) == (130, "stopped; the same command goes on with the trials in found\n")
    done = searched("--trials", 9)
    assert done.code == 0
    assert done.out.startswith("trial 3/9")


def test_all_choices(place: Path) -> None:
    done = searched("--trials", 50, "--strategy", "random")
    assert done.code == 0
    assert "There is no choice that was not tried." in done.out
    assert len(record()["rows"]) == 3 * 2 * 3


def on_a_rank(folder: Path) -> Ended:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    return searched("--trials", 10)


def test_ranks_share_a_search_and_rank_0_alone_speaks(place: Path) -> None:
    assert searched("--trials", 10).code == 0
    alone = record()
    for path in (place / "found").glob("*.*"):
        path.unlink()
    first, second = run(2, on_a_rank, place)
    assert (first.code, second.code) == (0, 0)
    assert "looked for the front" in first.out
    assert (second.out, first.err, second.err) == ("", "", "")
    together = record()
    for found in (alone, together):
        for row in found["rows"]:
            del row["seconds"]
    assert together == alone


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--space", "problems"), "--space problems: expected module:factory"),
        (("--space", "problems:gone"), "--space problems:gone: problems has no gone"),
        (("--space", "no_such_module:x"), "--space no_such_module:x: no_such_module cannot be imported"),
        (("--space", "problems:fails"), "--space problems:fails: the call fails: OSError: no data"),
        (
            ("--space", "problems:none"),
            "--space problems:none: returns a int, expected a commpress.model.search.Problem",
        ),
        (("--space", "problems:broken"), "RuntimeError: no memory"),
        (("--space", "problems:hopeless", "--trials", 3), "--space problems:hopeless: no trial has a finite quality"),
        (("--space", "problems:broken", "--finalists", 1), "--finalists 1: the Problem has no `final`"),
        (("--trials", 0), "--trials 0: expected a whole number of at least 1"),
        (("--together", 0), "--together 0: expected a whole number of at least 1"),
        (("--together", 1, "--strategy", "nsga2"), "--together 1: expected a whole number of at least 2"),
        (("--beta", "nan"), "--beta nan: expected a finite number of at least 0"),
        (("--alpha", 0.0), "--alpha 0: expected a --beta above 0 with it"),
        (("--alpha", 2.0), "--alpha 2: has an effect only with --beta"),
        (("--out", "problems.py"), "--out problems.py: cannot write to problems.py: Not a directory"),
    ],
    ids=str,
)
def test_what_cannot_be_is_a_sentence(place: Path, flags: tuple[object, ...], words: str) -> None:
    code, _, err = searched(*flags)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_without_optuna_it_names_the_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = searched()
    assert done.code == 1
    assert done.err.endswith(": found no optuna, expected it; pip install 'commpress[search]'\n")
    assert not (place / "found").exists()


def test_without_a_space() -> None:
    done = run_command("search")
    assert done.code == 1
    assert done.err == "error: --space: expected module:factory, such as my_project.search:problem\n"


def test_a_report_has_a_section_for_each_search(place: Path) -> None:
    searched("--trials", 4)
    found = records.read(place / "found" / "search.json")
    page = report.page([found, {**found, "problem": "<b>"}])
    assert page.count("<h2>Search: ") == 2
    assert "<h2>Search: &lt;b&gt;</h2>" in page


@pytest.mark.slow
def test_the_example_finds_networks_that_read_most_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(Path(__file__).parents[2])
    flags = ("--trials", 12, "--finalists", 2, "--out", tmp_path)
    done = run_command("search", "--space", "examples.search:problem", *flags)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "search.json").read_text())
    assert max(row["quality"] for row in found["rows"]) > 0.85
    assert min(found["finals"].values()) > 0.85
    assert len(found["front"]) >= 2
