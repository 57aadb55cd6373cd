"""The training program by a recipe: phases in the record, restarts in each of them, forks, the small file."""

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import run_command
from ranks import outcome, run
from shared import filled
from stopped import stop_at
from torch import nn

from commpress.launch import checkpoint, recipes, train
from commpress.launch.model import GPT, Shape
from commpress.model import stored
from commpress.model.export import by_recipe

pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

STEPS = 24
TINY = {
    "layers": 1,
    "width": 64,
    "heads": 2,
    "context": 32,
    "batch": 4,
    "steps": STEPS,
    "warmup_steps": 2,
    "threads": 1,
}
COMMON = {**TINY, "lr": 1e-2, "eval_every": 12, "eval_batches": 2}
RECIPE = """
[[prune]]
start = 4
end = 12
every = 4
amount = 0.8

[[quantize]]
start = 16
bits = {bits}

[distil]
start = 2
teacher = "{teacher}"
weight = 0.5
end = 20

[traffic]
spec = "int4"
"""
BREAKS = {"ddp": (2, 10, 14, 18), "fsdp": (10, 18), "ddp:EF21Muon": (10, 18)}
"""By strategy, and the optimizer if it is not AdamW, after which steps a run is stopped, one break after another: what one of
them loses, its end shows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, recipes, a teacher, and a run that stopped early."""
    return filled(tmp_path_factory, "recipe", fill)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Runs under DDP that go on by a recipe where another run stopped."""
    return filled(tmp_path_factory, "forks", lambda out: run(2, fork_all, folder, out, timeout=240))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Callable[[str], Path]:
    """By one of BREAKS the folder with its run in one go and its run with breaks."""

    def made(way: str) -> Path:
        return filled(tmp_path_factory, way, lambda out: run(2, whole_and_cut, folder, out, way, timeout=240))

    return made


def fill(folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    for bits in (8, 4):
        (folder / f"int{bits}.toml").write_text(RECIPE.format(bits=bits, teacher=folder / "teacher"))
    run(2, teach_and_begin, folder, timeout=240)


def teach_and_begin(folder: Path) -> None:
    common = {**COMMON, "data": folder / "text.txt"}
    assert train.train(train.Settings(**{**common, "width": 96, "out": folder / "teacher"}))
    early = train.Settings(**{**common, "recipe": folder / "int8.toml", "out": folder / "early"})
    stop_at(14, functools.partial(train.train, early))


def fork_all(folder: Path, out: Path) -> None:
    common = {**COMMON, "data": folder / "text.txt"}
    chosen = {
        **common,
        "recipe": folder / "int4.toml",
        "compress": "int4",
        "out": out / "fork",
        "fork": folder / "early",
    }
    assert train.train(train.Settings(**chosen))
    (out / "late.toml").write_text("[[prune]]\nstart = 20\namount = 0.5\n")
    plain = train.Settings(**common, out=out / "plain")
    stop_at(15, functools.partial(train.train, plain))
    assert train.train(train.Settings(**common, recipe=out / "late.toml", out=out / "pruned", fork=out / "plain"))


def whole_and_cut(folder: Path, out: Path, way: str) -> None:
    """Train by the recipe of 8 bits in one go, and again with breaks."""
    parallel, _, optimizer = way.partition(":")
    chosen = {
        **COMMON,
        "data": folder / "text.txt",
        "parallel": parallel,
        "optimizer": optimizer or "AdamW",
        "recipe": folder / "int8.toml",
        "compress": "int4",
    }
    assert train.train(train.Settings(**chosen, out=out / way))
    cut, done = train.Settings(**chosen, out=out / f"{way}-cut"), 0
    for step in BREAKS[way]:
        stop_at(step - done, functools.partial(train.train, cut))
        assert checkpoint.load_shared(out / f"{way}-cut")["step"] == step
        cut, done = train.Settings(**{**vars(cut), "resume": True}), step
    assert train.train(cut)


@pytest.mark.slow
@pytest.mark.parametrize("way", BREAKS)
def test_the_record_tells_phases_and_the_small_file(runs: Callable[[str], Path], way: str) -> None:
    folder = runs(way)
    record = json.loads((folder / way / "record.json").read_text())
    phases = record["report"]["phases"]
    assert list(phases) == [
        *("dense", "distil", "prune + distil", "pruned + distil", "pruned + int8 + distil", "pruned + int8"),
    ]
    assert [of["steps"] for of in phases.values()] == [2, 2, 8, 4, 4, 4]
    dense, late = (phases[name]["dense_bytes"] / phases[name]["sent_bytes"] for name in ("dense", "pruned + int8"))
    assert late > 1.4 * dense
    small = record["small_model"]
    assert small["bytes"] == (folder / way / "model.safetensors").stat().st_size
    assert small["validation_loss"] == pytest.approx(record["final_validation_loss"], abs=1e-6)
    assert small["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert record["recipe"]["prune"] == [{"start": 4, "end": 12, "every": 4, "amount": 0.8}]
    weights = stored.load(folder / way / "model.safetensors").state_dict()
    model = GPT(Shape(1, 64, 2, 32))
    model.load_state_dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):  # codes of 8 bits, most of them 0
            assert int((module.weight == 0).sum()) > 0.2 * module.weight.numel(), name


@pytest.mark.slow
@pytest.mark.parametrize("way", BREAKS)
def test_a_run_that_was_stopped_in_its_phases_ends_the_same(runs: Callable[[str], Path], way: str) -> None:
    folder = runs(way)
    whole, cut = (checkpoint.load_shared(folder / name) for name in (way, f"{way}-cut"))
    torch.testing.assert_close(whole["model"], cut["model"], rtol=0, atol=0)
    for loss in ("train_loss", "validation_loss"):
        assert [row[loss] for row in whole["curve"]] == [row[loss] for row in cut["curve"]]
    files = [(folder / name / "model.safetensors").read_bytes() for name in (way, f"{way}-cut")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_fork_goes_on_by_another_recipe(folder: Path, forks: Path, runs: Callable[[str], Path]) -> None:
    made = (forks / "fork", runs("ddp") / "ddp")
    fork, straight = (checkpoint.load_shared(path) for path in made)
    assert fork["step"] == STEPS
    assert [row["train_loss"] for row in fork["curve"]][:17] == [row["train_loss"] for row in straight["curve"]][:17]
    assert fork["curve"][-1]["validation_loss"] != straight["curve"][-1]["validation_loss"]
    four, eight = (json.loads((path / "record.json").read_text())["small_model"] for path in made)
    assert four["bytes"] < 0.85 * eight["bytes"]
    assert (folder / "early" / "latest").read_text() == "step-00000014\n"  # as it was


@pytest.mark.slow
def test_a_run_without_a_recipe_goes_on_by_one(forks: Path) -> None:
    record = json.loads((forks / "pruned" / "record.json").read_text())
    assert record["small_model"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert record["steps_done"] == STEPS


BUDGET = "[budget]\nstart = 4\nend = 10\nevery = 2\nmax_mb = 0.05\nmax_loss = 0.5\nformat = 'safetensors'\n"


def under_a_budget(folder: Path) -> str:
    """A run under a budget in one go, and one that is stopped behind the step at which it chose; a fork from there."""
    if dist.get_rank() == 0:
        (folder / "budget.toml").write_text(BUDGET)
    dist.barrier()
    chosen = {**COMMON, "data": folder / "text.txt", "recipe": folder / "budget.toml", "compress": "int8"}
    assert train.train(train.Settings(**chosen, out=folder / "whole"))
    stop_at(7, functools.partial(train.train, train.Settings(**chosen, out=folder / "cut")))
    fork = {**chosen, "fork": folder / "cut", "out": folder / "fork"}
    told = outcome(lambda: train.train(train.Settings(**fork)))
    assert train.train(train.Settings(**chosen, out=folder / "cut"))  # the same command
    return told


@pytest.mark.slow
def test_a_budget_is_held_in_a_run_that_goes_on_and_against_the_model_of_the_step_at_which_it_chose(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    for told in run(2, under_a_budget, tmp_path, timeout=240):
        assert "it is at step 7, expected a budget.start above that, got 4" in told
    whole, cut = (checkpoint.load_shared(tmp_path / name) for name in ("whole", "cut"))
    torch.testing.assert_close(whole["model"], cut["model"], rtol=0, atol=0)
    assert whole["chosen"] == cut["chosen"]
    assert whole["chosen"]["recipe"]["quantize"]
    judged = json.loads((tmp_path / "cut" / "judged" / "judgement.json").read_text())
    (row,) = judged["rows"]
    assert row["small"]["bytes"] <= 50_000 < row["dense"]["bytes"]
    curve = [each["validation_loss"] for each in whole["curve"] if each["validation_loss"]]
    assert curve[0] > row["quality"]["dense_loss"] > curve[-1] - 0.5
    assert json.loads((tmp_path / "cut" / "ending.json").read_text()) == {
        "what": "ending",
        "steps": STEPS,
        "missed": [],
    }


def refused(folder: Path) -> list[str]:
    chosen = {**COMMON, "data": folder / "text.txt", "out": folder / "no"}
    (folder / "none.toml").write_text('[distil]\nteacher = "nowhere"\n')
    (folder / "long.toml").write_text("[[prune]]\nstart = 4\nend = 99\namount = 0.5\n")
    (folder / "odd.toml").write_text('[[prune]]\nstart = 4\namount = 0.5\nparameters = ["blocks.9.*"]\n')
    (folder / "short.toml").write_text((folder / "int8.toml").read_text().replace("start = 16", "start = 13"))
    (folder / "spec.toml").write_text('[traffic]\nspec = "int5"\n')
    (folder / "other.toml").write_text("[[prune]]\nstart = 4\namount = 0.5\n")
    wishes: list[dict[str, Any]] = [
        {"recipe": folder / "none.toml"},
        {"recipe": folder / "long.toml"},
        {"recipe": folder / "odd.toml"},
        {"recipe": folder / "odd.toml", "parallel": "diloco"},
        {"recipe": folder / "missing.toml"},
        {"recipe": folder / "other.toml", "fork": folder / "early", "compress": "int4"},
        {"fork": folder / "early", "resume": True},
        {"fork": folder / "early", "seed": 9, "recipe": folder / "int8.toml"},
        {"fork": folder / "early", "compress": "int4"},
        {"fork": folder / "early", "recipe": folder / "short.toml", "steps": 14},
        {"recipe": folder / "spec.toml"},
    ]
    return [outcome(lambda w=w: train.train(train.Settings(**{**chosen, **w}))) for w in wishes]


def test_what_cannot_be_is_said_on_all_ranks(folder: Path) -> None:
    for told in run(2, refused, folder):
        expected = (
            "distil.teacher: no checkpoint in nowhere",
            "prune[0].end: 99, but the run has 24 steps",
            "prune[0].parameters: 'blocks.9.*' matches nothing, known: ",
            "expected --parallel ddp, fsdp or deepspeed, got diloco",
            "No such file",
            "by step 14 prune[0] has begun, and the saved run had another entry than this recipe",
            "expected only one of them",
            "has --seed 0, this one --seed 9",
            "that run has a recipe, this one none; expected --recipe",
            "it is at step 14, expected --steps above that",
            "traffic.spec: ",
        )
        for sentence, part in zip(told, expected, strict=True):
            assert part in sentence


def test_a_recipe_may_say_specs_by_parameter(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[traffic.spec]\n"*.bias" = "none"\n"blocks.0.*" = "int8"\n"*" = "auto"\n')
    found = recipes.with_specs(train.Settings(recipe=recipe, steps=STEPS))
    assert list((found.gradients if isinstance(found.gradients, dict) else {}).items()) == [
        *(("*.bias", "none"), ("blocks.0.*", "int8"), ("*", "auto")),
    ]
    for text, said in (
        ('"*.wieght" = "int8"', "traffic.spec: '*.wieght': decides for none of"),
        ('"*" = "int5"', "traffic.spec: '*': spec 'int5': unknown codec 'int5'"),
        ('"*" = 4', "traffic.spec: expected text in quotes, or a table of texts by patterns of names, got {'*': 4}"),
        ('blocks.bias = "none"', "traffic.spec: expected text in quotes, or a table of texts by patterns of names"),
    ):
        recipe.write_text(f"[traffic.spec]\n{text}\n")
        with pytest.raises(train.TrainingError) as error:
            recipes.with_specs(train.Settings(recipe=recipe, steps=STEPS))
        assert said in str(error.value)
        assert str(recipe) in str(error.value)


def test_the_recipe_says_what_travels_unless_a_flag_does(tmp_path: Path) -> None:
    recipe = tmp_path / "traffic.toml"
    recipe.write_text('[traffic]\nspec = "int8"\nparameters = "bf16"\n')
    by_recipe = recipes.with_specs(train.Settings(recipe=recipe, steps=STEPS))
    assert (by_recipe.compress, by_recipe.parameters) == ("int8", "bf16")
    plain = recipes.with_specs(train.Settings())
    assert (plain.compress, plain.parameters) == ("auto", "none")
    for flag, given, said in (
        ("compress", "int4", "--compress int4: the recipe has traffic.spec 'int8'"),
        ("parameters", "none", "--parameters none: the recipe has traffic.parameters 'bf16'"),
    ):
        with pytest.raises(train.TrainingError, match=re.escape(said)):
            train.train(train.Settings(recipe=recipe, steps=STEPS, **{flag: given}))
        told = run_command("train", "--recipe", recipe, f"--{flag}", given, "--steps", STEPS)
        assert told.code == 1
        assert f"{said}; leave one of them out" in told.err


def test_what_a_recipe_exports_is_written_when_the_run_ends_and_once_more_if_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text('[[prune]]\nstart = 1\namount = 0.5\n[export]\nformats = ["safetensors", "integer"]\n')
    settings = {**COMMON, "steps": 2, "data": tmp_path / "text.txt", "recipe": recipe, "out": out, "compress": "none"}
    with pytest.raises(
        train.TrainingError, match=r"export: integer cannot be written: .*; the run itself has finished, in "
    ):
        train.train(train.Settings(**settings))
    before, begins, receipt = capsys.readouterr().out.strip().rpartition("\ncommpress none: sent ")
    assert "model.safetensors" in before
    assert begins
    assert "\n" not in receipt  # it comes last
    own, exported = (stored.load(out / name / "model.safetensors").state_dict() for name in (".", "exported"))
    torch.testing.assert_close(own, exported, rtol=0, atol=0)
    assert json.loads((out / "record.json").read_text())["steps_done"] == 2
    record = out / "exported" / "export.json"
    before = json.loads(record.read_text())
    record.unlink()
    with pytest.raises(train.TrainingError, match="integer cannot be written"):  # it is over, and says so again
        train.train(train.Settings(**settings, resume=True))
    assert not record.exists()
    (out / "ending.json").write_text('{"steps": 2}')  # damaged
    with pytest.raises(train.TrainingError, match="integer cannot be written"):
        train.train(train.Settings(**settings))  # the same command
    assert json.loads(record.read_text()) == before
    (out / "ending.json").unlink()
    with monkeypatch.context() as full:
        full.setattr(by_recipe, "export", no_space)
        with pytest.raises(train.TrainingError, match=r"safetensors cannot be written: OSError: .* No space left"):
            train.train(train.Settings(**settings))
    assert not (out / "ending.json").exists()  # once more, it may be written
    (out / "ending.json").write_text(json.dumps({"steps": 4, "missed": []}))  # of a training that went as far before
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "step", no_space)
        with pytest.raises(train.TrainingError, match="No space left"):
            train.train(train.Settings(**{**settings, "steps": 4}))
    assert not (out / "ending.json").exists()


def no_space(*arguments: Any, **named: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_format_whose_package_is_missing_ends_the_run_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text('[export]\nformats = ["onnx"]\n')
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "onnxruntime" else found(name, *of)
    )
    said = "recipe.toml: export.formats: export to onnx: found no onnxruntime, expected it; pip install 'commpress[export]'"
    with pytest.raises(train.TrainingError, match=re.escape(said)):
        train.train(train.Settings(recipe=tmp_path / "recipe.toml", steps=2, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
