"""One recipe file from the search to the exported file, with a model of one's own, killed in the middle and gone on with."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from commands import run_command
from ranks import outcome, run

from commpress.launch import checkpoint, demo, endings, export, judge, recipe_search, recipes, run_state, tasks, train
from commpress.model import Recipe, stored

pytestmark = pytest.mark.usefixtures("ranks_of_our_own")
TASK = '''
"""A network that leaves something open, and batches of a small task."""
import torch
from torch import nn

from commpress.model import search

TRUTH = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def part(seed, count):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(32, 32, generator=generator)
        yield x, (x @ TRUTH).argmax(1)


def batches():
    return list(part(1, 40)), list(part(2, 4))


def layer(activation):
    return nn.Sequential(nn.Linear(32, 64), activation)


def build():
    width = search.Width([16, 32, 64], nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return nn.Sequential(search.OneOf({"relu": layer(nn.ReLU()), "tanh": layer(nn.Tanh())}), width, nn.Linear(64, 8))


def plain():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def wide():
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 8))


def taught():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in part(1, 100):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def number():
    return 3
'''
BEGINNING = """
[search]
trials = 4
steps = 6
together = 2
beta = 0.1

[distil]
start = 2
teacher = "whole_task:plain"

[traffic]
spec = "int8"

[export]
formats = ["safetensors"]
"""
ENTRIES = (
    BEGINNING
    + """
[[prune]]
start = 4
end = 8
every = 2
amount = 0.5

[[quantize]]
start = 9
activations = "static"
"""
)
FORMATS = ('["safetensors"]', '["safetensors", "integer", "onnx"]')
LIMITS = "max_mb = 0.02\nmax_loss = 0.5\nformat = 'safetensors'\n"
WHOLE = {
    "chosen": BEGINNING.replace(*FORMATS) + "[budget]\nstart = 4\nend = 8\nevery = 2\n" + LIMITS,
    "by hand": ENTRIES.replace(*FORMATS) + "[budget]\n" + LIMITS,
}
"""Files with every section; the entries are chosen by the budget, or are there."""
PRUNE = "[[prune]]\nstart = 1\namount = 0.5\n"
STEPS = 12
SETTINGS: dict[str, Any] = {
    **{"model": "whole_task:build", "data": Path("whole_task:batches"), "recipe": Path("recipe.toml"), "threads": 1},
    **{"steps": STEPS, "warmup_steps": 2, "lr": 3e-3, "eval_every": 4, "checkpoint_every": 3},
}


class Killed(BaseException):
    """As if by kill -9: nobody takes it, nothing is saved."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a task and a recipe, which is where the program runs."""
    (tmp_path / "whole_task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(ENTRIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("whole_task", None)


def trained(out: str, **more: Any) -> bool:
    return train.train(train.Settings(**{**SETTINGS, "out": Path(out), **more}))


@contextlib.contextmanager
def killed_in(owner: Any, name: str, call: int) -> Iterator[None]:
    """The process ends in the so many-th call of a function."""
    function, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return function(*arguments, **named)

    setattr(owner, name, counted)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        setattr(owner, name, function)


def require_same(one: str, other: str) -> None:
    """Both runs have the same values and left the same files."""
    states = [checkpoint.load_shared(Path(each)) for each in (one, other)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    assert states[0]["chosen"] == states[1]["chosen"]
    for name in ("model.safetensors", "exported/model.safetensors"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes()
    searches = [json.loads((Path(each) / "search" / "search.json").read_text()) for each in (one, other)]
    for found in searches:
        for row in found["rows"]:
            del row["seconds"]
    assert searches[0] == searches[1]


def test_a_run_that_is_killed_anywhere_ends_with_the_same_file_by_the_same_command(place: Path) -> None:
    assert trained("whole")
    with killed_in(tasks.Own, "sample", 4):  # of the search's training, whose newest checkpoint is of step 3
        trained("cut")
    with killed_in(run_state.Run, "save", 1):  # at the end of that
        trained("cut")
    with killed_in(recipe_search, "_loss", 3):  # the third trial
        trained("cut")
    assert not checkpoint.exists(Path("cut"))
    with killed_in(tasks.Own, "sample", 8):  # of the run itself
        trained("cut")
    assert checkpoint.load_shared(Path("cut"))["step"] == 6
    with killed_in(endings, "_exported", 1):
        trained("cut")
    assert not Path("cut/exported").exists()
    assert trained("cut")
    require_same("whole", "cut")
    record = json.loads(Path("whole/record.json").read_text())
    assert list(record["report"]["phases"]) == [
        *("dense", "distil", "prune + distil", "pruned + distil", "pruned + int8 + distil"),
    ]
    assert record["small_model"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    choice = checkpoint.load_shared(Path("whole"))["chosen"]["choice"]
    rows = json.loads(Path("whole/search/search.json").read_text())
    assert choice == rows["rows"][rows["best"]]["choice"]
    left = stored.load("whole/exported/model.safetensors").state_dict()
    assert left["1.0.weight"].shape == (choice["1"], 64)


def test_a_search_that_is_asked_to_stop_leaves_a_checkpoint_and_says_how_it_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, drawn = tasks.Own.sample, 0

    def counted(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 2:
            signal.raise_signal(signal.SIGTERM)
        return sample(*arguments)

    monkeypatch.setattr(tasks.Own, "sample", counted)
    assert not trained("out")
    assert "stopped at step 2 of 6; the same command goes on from out/search/training" in capsys.readouterr().out
    assert checkpoint.load_shared(Path("out/search/training"))["step"] == 2
    assert trained("out")
    assert "going on at step 2" in (said := capsys.readouterr().out)
    assert "search: trial 4/4" in said


ONLY_SEARCH = "[search]\ntrials = 4\nsteps = 2\ntogether = 2\nbeta = 0.1\n"


def stopped_in_the_trials(place: Path) -> tuple[str, bool]:
    """What a rank has of a search in whose trials rank 1 alone is asked to stop, and of the same command after that."""
    settings = {**SETTINGS, "recipe": place / "recipe.toml", "steps": 4, "checkpoint_every": 0}
    judged = recipe_search._loss

    def loss(*arguments: Any) -> float:
        if dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return judged(*arguments)

    with mock.patch.object(recipe_search, "_loss", loss):
        said = outcome(lambda: trained(str(place / "out"), **settings))
    return said, trained(str(place / "out"), **settings)


def test_a_stop_of_one_rank_in_the_trials_ends_all_and_the_same_command_goes_on(place: Path) -> None:
    Path("recipe.toml").write_text(ONLY_SEARCH)
    for said, went_on in run(2, stopped_in_the_trials, place):
        assert re.fullmatch(
            r"TrainingError: stopped in the search, after \d trials; run the same command again to go on", said
        ), said
        assert went_on


def test_a_stop_in_the_export_ends_it_and_the_same_command_does_it_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.toml").write_text(PRUNE + "[export]\nformats = ['safetensors']\n")
    settings = {"model": "whole_task:plain", "steps": 3}

    def exported(*_: Any) -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        return ["it has gone on"]

    with monkeypatch.context() as patched:
        patched.setattr(endings, "_exported", exported)
        with pytest.raises(
            train.TrainingError, match=r"asked to stop before rank 0 was done .*run the same command again"
        ):
            trained("out", **settings)
    assert not Path("out/ending.json").exists()
    assert trained("out", **settings)
    assert Path("out/exported/model.safetensors").exists()


def test_a_search_that_another_has_begun_is_refused_with_what_differs_and_the_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.toml").write_text(ONLY_SEARCH.replace("steps = 2", "steps = 0"))
    with killed_in(recipe_search, "_loss", 1):
        trained("out")
    begun = Path("out/search/begun.json")
    for name, value in (("weight_decay", 0.5), ("accumulate", 2), ("warmup_steps", 1)):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(
            train.TrainingError, match=rf"has {flag} .*, this one {value}, by {begun}: expected the same"
        ):
            trained("out", **{name: value})
    build = sys.modules["whole_task"].build

    def other() -> torch.nn.Module:
        model: torch.nn.Module = build()
        torch.nn.init.zeros_(next(model.parameters()))
        return model

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["whole_task"], "build", other)
        with pytest.raises(train.TrainingError, match="the search there has model's first values"):
            trained("out")
    whole = begun.read_text()
    for text, reason in (("", "Expecting value"), ("[]", "holds a list"), (whole[:20], "damaged")):
        begun.write_text(text)
        with pytest.raises(train.TrainingError, match=f"{begun}: damaged: .*") as error:
            trained("out")
        assert reason in str(error.value)
    begun.write_text(whole)
    assert trained("out")


def test_another_recipe_in_the_same_folder_is_refused_in_the_search_and_behind_it(place: Path) -> None:
    with killed_in(recipe_search, "_loss", 1):
        trained("out")
    recipe = Path("recipe.toml")
    recipe.write_text(ENTRIES.replace("trials = 4", "trials = 5"))
    with pytest.raises(
        train.TrainingError, match=r"the search there has recipe .* expected the same, or another --out"
    ):
        trained("out")
    recipe.write_text(ENTRIES)
    with killed_in(tasks.Own, "sample", 5):
        trained("out")
    recipe.write_text(ENTRIES.replace("amount = 0.5", "amount = 0.6"))
    with pytest.raises(train.TrainingError, match=r"has --recipe .* both must be the same"):
        trained("out")


STRUCTURE = """
[budget]
end = 4
every = 2
max_mb = 0.004
max_loss = 9.0
format = "safetensors"
structure = 0.75

[distil]
start = 2
"""
NARROWED = {"model": "whole_task:wide", "compress": "none"}


def test_structure_that_a_budget_removes_is_gone_when_the_run_goes_on_too(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.toml").write_text(STRUCTURE)
    for out, call in (("whole", None), ("cut", 8)):
        if call is not None:
            with killed_in(tasks.Own, "sample", call):
                trained(out, **NARROWED)
        with killed_in(endings, "_ended", 1):
            trained(out, **NARROWED)
    said = capsys.readouterr().out
    assert said.count("of each width removed before training: from 10,504 to ") == 2
    assert "of each width removed" not in said.split("going on at step 6")[1]
    states = [checkpoint.load_shared(Path(each)) for each in ("whole", "cut")]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    assert states[0]["chosen"] == states[1]["chosen"]
    chosen = Recipe.of(states[0]["chosen"]["recipe"]).budget
    assert chosen is not None
    assert chosen.removed is not None
    rows = round(256 * (1 - chosen.removed))
    assert states[0]["model"]["0.weight"].shape == (rows, 32)
    assert Path("whole/model.safetensors").stat().st_size <= 4_000
    model = recipes.model_of_run(Path("whole"), "whole_task:wide")
    assert isinstance(model, torch.nn.Module)
    assert model.get_parameter("0.weight").shape == (rows, 32)


@pytest.mark.slow
def test_a_trained_model_loses_shares_by_width_and_the_same_when_the_run_goes_on(place: Path) -> None:
    Path("recipe.toml").write_text(STRUCTURE)
    taught = {**NARROWED, "model": "whole_task:taught"}
    with killed_in(tasks.Own, "sample", 8):
        trained("cut", **taught)
    for out in ("whole", "cut"):
        with killed_in(endings, "_ended", 1):
            trained(out, **taught)
    states = [checkpoint.load_shared(Path(each)) for each in ("whole", "cut")]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    assert states[0]["chosen"] == states[1]["chosen"]
    chosen = Recipe.of(states[0]["chosen"]["recipe"]).budget
    assert chosen is not None
    assert isinstance(chosen.removed, dict)
    assert len({chosen.removed.get(name, 0.0) for name in ("0", "2")}) == 2
    rows = [n - round(n * chosen.removed.get(name, 0.0)) for name, n in (("0", 96), ("2", 64))]
    assert states[0]["model"]["2.weight"].shape == tuple(reversed(rows))
    assert Path("whole/model.safetensors").stat().st_size <= 4_000
    assert recipes.model_of_run(Path("whole"), "whole_task:taught").get_parameter("2.weight").shape == (
        rows[1],
        rows[0],
    )


@pytest.mark.slow
def test_what_structure_leaves_is_held_against_the_whole_dense_model(place: Path) -> None:
    Path("recipe.toml").write_text(STRUCTURE)
    assert trained("whole", **NARROWED)
    judged = json.loads(Path("whole/judged/judgement.json").read_text())
    rows = round(256 * (1 - judged["structure"]["removed"]))
    assert judged["structure"]["after"]["parameters"] == 41 * rows + 8
    assert judged["rows"][0]["dense"]["bytes"] > 40_000


def test_compression_settings_are_found_before_the_run_and_become_its_entries(place: Path) -> None:
    layers = '[search.layers."0"]\nbits = [8, 4]\nsparsity = [0.0, 0.5]\n[search.layers."2"]\nbits = [8]\n'
    search = "[search]\ntrials = 3\nsteps = 4\nbeta = 1.0\nstart = 2\nend = 4\nevery = 1\n"
    Path("recipe.toml").write_text(search + layers)
    assert trained("out", model="whole_task:plain", compress="none", steps=6)
    found = Recipe.of(checkpoint.load_shared(Path("out"))["chosen"]["recipe"])
    best = json.loads(Path("out/search/search.json").read_text())
    choice = best["rows"][best["best"]]["choice"]
    assert {(entry.bits, entry.start, entry.layers) for entry in found.quantize} == {
        *((choice["0 bits"], 4, ("0",)), (8, 4, ("2",))),
    }
    assert [entry.amount for entry in found.prune] == [0.5] * bool(choice["0 sparsity"])
    model = recipes.model_of_run(Path("out"), "whole_task:plain")
    assert isinstance(model, torch.nn.Module)
    require_code_is_named()
    codes = stored.load("out/model.safetensors").integers
    assert {name: its.bits for name, its in codes.items()} == {"0.weight": choice["0 bits"], "2.weight": 8}


def require_code_is_named() -> None:
    """The run in out/ names a factory and a function: they are called if the caller names them, too."""
    out, own = Path("out"), {"model": "whole_task:plain"}
    calls: list[Any] = [
        lambda **flags: judge.Judge(out, out, runtimes=("torch",), out=Path("judged"), **flags).judged(),
        lambda **flags: export.Export(out, formats=("safetensors",), out=Path("files"), **flags).exported(),
    ]
    said = "of the run in out is made by whole_task"
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"^--model: the model {said}:plain, .* expected --model whole_task:plain$"
        ):
            call()
        with pytest.raises(ValueError, match=r"expected --model whole_task:plain, got whole_task:number$"):
            call(model="whole_task:number")
        with pytest.raises(
            ValueError, match=rf"^--data: the data {said}:batches, .* expected --data whole_task:batches$"
        ):
            call(**own)
    assert calls[1](**own, data="whole_task:batches")  # what is judged starts four programs: the slow tests do that
    recipe = Recipe.of({"distil": {"teacher": "out"}})
    settings = train.Settings(**{**SETTINGS, **own})
    task = tasks.read(settings)
    assert isinstance(recipes.teacher(recipe, task, settings), torch.nn.Module)
    with pytest.raises(ValueError, match=r"distil.teacher: the model of the run in out is made by whole_task:plain"):
        recipes.teacher(recipe, task, train.Settings(**SETTINGS))


@pytest.mark.parametrize(
    ("changes", "recipe", "said"),
    [
        ({"model": "whole_task:plain"}, ENTRIES, "search: space: a Sequential without a OneOf, Depth, Width or Heads"),
        (
            {"model": "whole_task:number"},
            ENTRIES,
            "--model whole_task:number: returns a int, expected a torch.nn.Module",
        ),
        ({"data": None}, ENTRIES, "--data None: expected module:function with --model"),
        ({"data": Path("whole_task:number")}, ENTRIES, "--data whole_task:number: expected (training, held_out)"),
        ({"parallel": "fsdp"}, PRUNE, "--model whole_task:build: expected --parallel ddp, got fsdp"),
        ({"width": 64}, ENTRIES, "--width 64: is only for the built-in GPT and its text, expected none with --model"),
        (
            {},
            ENTRIES.replace("whole_task:plain", "whole_task:number"),
            "distil.teacher: whole_task:number returns a int",
        ),
        ({}, "[search]\nstart = 3\n", "search.start: says when layers are compressed, expected layers with it"),
        (
            {"model": None, "data": None},
            "[search]\nsteps = 2\n",
            "search: space: a GPT without a OneOf, Depth, Width or Heads, expected a choice in it; expected search.layers, or "
            "a --model with choices",
        ),
        (
            {"model": None, "data": None},
            "[budget]\nmax_mb = 1\nstructure = 0.5\n",
            "budget.structure: expected --model",
        ),
        (
            {"model": "whole_task:wide"},
            "[budget]\nmax_mb = 1\nstructure = 0.5\nstart = 2\n",
            "budget.start: structure is removed before the run, expected 0, got 2",
        ),
        ({"model": None, "data": None}, "[budget]\nmax_mb = 1\n", "budget.start: 0, before any training"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    place: Path, changes: dict[str, Any], recipe: str, said: str
) -> None:
    Path("recipe.toml").write_text(recipe)
    with pytest.raises(train.TrainingError) as error:
        trained("out", **changes)
    assert said in str(error.value)
    assert not list(Path().glob("out/search/training/*"))


def started(out: str) -> "subprocess.Popen[bytes]":
    flags = {name.replace("_", "-"): value for name, value in SETTINGS.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    launcher = (*launcher, "--master-addr", "127.0.0.1", "--master-port", str(demo.free_port()))
    command = [*launcher, "-m", "commpress.launch.train", *words, "--out", out]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def kill_when(out: str, there: Callable[[], bool]) -> None:
    """Start the command on two ranks, and kill all of its processes by -9 once something is there."""
    child = started(out)
    try:
        for _ in range(1200):
            if there() or child.poll() is not None:
                break
            time.sleep(0.05)
        assert child.poll() is None
    finally:
        for pid in {child.pid, *children(child.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def children(pid: int) -> set[int]:
    """The processes below one, on Linux."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child, *children(child)}
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it finds processes in /proc")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("how", WHOLE)
def test_the_whole_file_in_one_torchrun_killed_in_search_training_and_end(place: Path, how: str) -> None:
    pytest.importorskip("onnxruntime")
    Path("recipe.toml").write_text(WHOLE[how])
    whole = started("whole")
    fails = how == "chosen"  # integers alone are for static inputs, which no budget of safetensors has
    assert whole.wait(1400) == fails
    ending = json.loads(Path("whole/ending.json").read_text())
    assert [each.split(":")[0] for each in ending["missed"]] == ["export"] * fails
    cut = Path("cut")
    kill_when("cut", lambda: (cut / "search" / "training" / "latest").exists())
    kill_when("cut", lambda: (cut / "latest").exists())
    kill_when("cut", lambda: (cut / "judged" / "small").exists())
    assert not (cut / "ending.json").exists()
    assert started("cut").wait(1400) == fails
    require_same("whole", "cut")
    assert len(json.loads((cut / "ending.json").read_text())["missed"]) == fails
    chosen = Recipe.of(checkpoint.load_shared(cut)["chosen"]["recipe"])
    assert chosen.budget is not None
    assert chosen.budget.settled == fails
    assert chosen.quantize
    judged = json.loads((cut / "judged" / "judgement.json").read_text())["rows"][0]
    assert judged["small"]["bytes"] <= 20_000 < judged["dense"]["bytes"]
    files = {"model.safetensors", "model.onnx", "export.json"} | ({"integer.safetensors"} if not fails else set())
    assert {each.name for each in (cut / "exported").iterdir()} == files
    shutil.rmtree("cut/exported")
    made = ("--model", "whole_task:build", "--data", "whole_task:batches")  # code is called only if the caller names it
    done = run_command("export", "cut", *made, "--formats", "safetensors", "--out", "cut/exported")
    assert done.code == 0, done.err
    assert (Path("whole/exported/model.safetensors")).read_bytes() == (cut / "exported/model.safetensors").read_bytes()
    assert recipes.SMALL in {each.name for each in cut.iterdir()}
    done = run_command("judge", "cut", "cut", *made, "--runtimes", "torch", "--out", "cut/judged again")
    assert done.code == 0, done.err
