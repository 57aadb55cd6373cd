"""`commpress shrink`: a budget that is met, one that is not, and flags that make no sense."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import Ended, run_command
from ranks import run

from commpress.model import Recipe

pytestmark = pytest.mark.usefixtures("ranks_of_our_own")
TASK = '''
"""A trained network, and batches of a task that it knows."""
import torch
from torch import nn

TRUTH = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def part(seed, count):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(64, 32, generator=generator)
        yield x, (x @ TRUTH).argmax(1)


def batches():
    return list(part(1, 40)), list(part(2, 4))


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in part(1, 40):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def poisoned():
    training, held_out = batches()
    training[1] = (training[1][0] * float("nan"), training[1][1])
    return training, held_out


def one_part():
    return list(part(1, 4))


def number():
    return 3
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a task, which is where the command runs."""
    (tmp_path / "shrink_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("shrink_task", None)


def shrunk(*flags: object, model: str = "trained", data: str = "batches") -> Ended:
    return run_command(
        *("shrink", "--model", f"shrink_task:{model}", "--data", f"shrink_task:{data}", "--out", "out", *flags)
    )


@pytest.mark.slow
def test_a_budget_is_met_by_the_exported_file(place: Path) -> None:
    pytest.importorskip("onnxruntime")
    code, out, err = shrunk("--max-mb", 0.12, "--max-ms", 50, "--max-loss", "20%", "--steps", 60, "--lr", 1e-3)
    assert code == 0, err
    record = json.loads(Path("out/judgement.json").read_text())
    (row,) = record["rows"]
    assert row["runtime"] == "onnxruntime"
    assert row["small"]["bytes"] == Path("out/small/model.onnx").stat().st_size <= 120_000
    assert row["dense"]["bytes"] > 250_000
    assert row["quality"]["small_loss"] <= 1.2 * row["quality"]["dense_loss"]
    assert re.search(r"step 60/60: loss .* \[int8\]", out)
    assert Path("out/small/model.onnx").exists()
    chosen = Recipe.load("out/recipe.yaml")
    assert chosen.budget is not None
    assert chosen.budget.settled
    assert [(entry.bits, entry.activations) for entry in chosen.quantize] == [(8, "static")]


def poisoned_shrink(place: Path) -> Ended:
    os.environ["COMMPRESS_HOST"] = f"host {dist.get_rank()}"
    flags = ("--compress", "int4", "--steps", 4, "--out", place / "out")
    return shrunk("--recipe", place / "late.toml", *flags, data="poisoned")


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_and_names_it(place: Path) -> None:
    Path("late.toml").write_text("[budget]\nmax_mb = 0.2\nstart = 2\nend = 3\nformat = 'safetensors'\n")
    (code, _, said), (as_well, _, silent) = run(2, poisoned_shrink, place, timeout=30)
    assert (code, as_well, silent) == (1, 1, "")
    why = "--lr is probably too high, or int4 too coarse"
    assert said == f"error: step 1: the loss is not finite on rank 1 (host 1); {why}\n"


@pytest.mark.slow
def test_a_loss_beyond_the_budget_ends_with_its_value_and_code_1(place: Path) -> None:
    code, _, err = shrunk("--max-mb", 0.03, "--max-loss", "0%", "--steps", 10, "--format", "safetensors")
    assert code == 1
    assert re.search(
        r"error: the budget is not met: max_loss 0: the loss of model.safetensors is \d\.\d+, [\d.]+% above the dense",
        err,
    )
    assert Path("out/judgement.html").exists()


def test_a_size_that_no_setting_reaches_ends_before_the_training(place: Path) -> None:
    code, out, err = shrunk("--max-mb", 0.001, "--format", "safetensors")
    assert code == 1
    assert re.search(r"budget.max_mb: 0.001 MB cannot be met, the closest of model.safetensors is 0\.0\d+ MB", err)
    assert err.count("\n") == 1
    assert "step" not in out


@pytest.mark.slow
def test_structure_goes_where_integers_and_zeros_alone_are_too_large(place: Path) -> None:
    pytest.importorskip("onnxruntime")
    limits = ("--max-mb", 0.02, "--max-ms", 50, "--max-loss", "99%", "--steps", 200, "--lr", 3e-3)
    code, _, err = shrunk(*limits)
    assert code == 1
    assert "budget.max_mb: 0.02 MB cannot be met, the closest of model.onnx is 0.0" in err
    code, out, err = shrunk(*limits, "--structure", "75%")
    assert code == 0, err
    said = r"0\.\d+ of '[02]'.* removed before training: from 76,296 to \d\d,\d+ parameters, .* ms, the loss on the batches"
    assert re.search(said, out)
    removed = json.loads(Path("out/structure.json").read_text())
    record = json.loads(Path("out/judgement.json").read_text())
    assert record["structure"] == {key: removed[key] for key in ("removed", "before", "after")}
    assert removed["before"]["parameters"] == 76_296
    assert removed["removed"].keys() <= {"0", "2"}
    assert all(0 < share <= 0.75 for share in removed["removed"].values())
    first, second = (256 - round(256 * removed["removed"].get(name, 0.0)) for name in ("0", "2"))
    assert removed["after"]["parameters"] == 33 * first + (first + 1) * second + 8 * second + 8
    assert removed["shapes"]["tensors"]["2.weight"] == [second, first]
    (row,) = record["rows"]
    assert row["small"]["bytes"] <= 20_000 < row["dense"]["bytes"]
    assert removed["before"]["bytes"] == pytest.approx(row["dense"]["bytes"], rel=0.02)
    chosen = Recipe.load("out/recipe.yaml").budget
    assert chosen is not None
    assert (chosen.structure, chosen.removed, chosen.settled) == (0.75, removed["removed"], True)
    assert "removed before training" in Path("out/judgement.html").read_text()


def test_structure_that_is_not_enough_ends_before_the_training(place: Path) -> None:
    code, out, err = shrunk("--max-mb", 0.001, "--structure", "50%", "--format", "safetensors")
    assert code == 1
    said = (
        r"budget.max_mb: 0.001 MB cannot be met, the closest of model.safetensors is 0\.0\d+ MB, with 0.5 of each width"
    )
    assert re.search(said, err)
    assert err.count("\n") == 1
    assert "step" not in out


@pytest.mark.parametrize(
    ("flags", "how", "said"),
    [
        ((), {}, "expected some of --max-mb, --max-ms, --max-loss, or --recipe"),
        (("--max-loss", "1"), {}, "--max-loss '1': expected a percentage below 100, such as 0.1%"),
        (("--max-mb", 1, "--structure", "1"), {}, "--structure '1': expected a percentage below 100"),
        (("--max-loss", "1%", "--structure", "50%"), {}, "budget.structure: is removed for max_mb or max_ms"),
        (("--max-mb", 0), {}, "budget.max_mb: expected greater than 0, got 0.0"),
        (("--max-mb", 1, "--steps", 0), {}, "--steps 0: expected a whole number from 1 on"),
        (("--max-mb", 1), {"model": "number"}, "--model shrink_task:number: returns a int, expected a torch.nn.Module"),
        (("--max-mb", 1), {"data": "number"}, "--data shrink_task:number: expected (training, held_out)"),
        (("--max-mb", 1), {"data": "one_part"}, "--data shrink_task:one_part: expected (training, held_out)"),
        (("--max-mb", 1), {"model": "nothing"}, "--model shrink_task:nothing: shrink_task has no nothing"),
    ],
)
def test_what_makes_no_sense_ends_with_a_sentence(
    place: Path, flags: tuple[object, ...], how: dict[str, str], said: str
) -> None:
    code, _, err = shrunk(*flags, **how)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_recipe_has_the_limits_itself(place: Path) -> None:
    Path("none.toml").write_text("[[prune]]\nstart = 1\namount = 0.5\n")
    assert "none.toml: has no [budget], expected one" in shrunk("--recipe", "none.toml").err
    Path("some.toml").write_text("[budget]\nmax_mb = 0.001\nend = 3\nformat = 'safetensors'\n")
    assert "has the limits, expected no --max-mb" in shrunk("--recipe", "some.toml", "--max-mb", 1).err
    assert "0.001 MB cannot be met" in shrunk("--recipe", "some.toml", "--steps", 5).err
    assert "budget.end: 3, but the run has 3 steps" in shrunk("--recipe", "some.toml", "--steps", 3).err


@pytest.mark.slow
def test_a_format_that_fails_comes_behind_the_judgement(place: Path) -> None:
    Path("some.toml").write_text(
        "[budget]\nmax_mb = 0.03\nmax_loss = 0.0\nformat = 'safetensors'\n[export]\nformats = ['integer']\n"
    )
    code, _, err = shrunk("--recipe", "some.toml", "--steps", 10)
    assert code == 1
    assert re.search(r"error: the budget is not met: max_loss .*; export: integer cannot be written", err)
    assert {"judgement.json", "recipe.yaml", "small"} <= {each.name for each in Path("out").iterdir()}


def test_a_recipe_with_a_search_or_another_spec_is_refused(place: Path) -> None:
    Path("some.toml").write_text("[search]\n[budget]\nmax_mb = 1\n[traffic]\nspec = 'int8'\n")
    assert "some.toml: has a [search], which `commpress train` makes" in shrunk("--recipe", "some.toml").err
    Path("some.toml").write_text("[budget]\nmax_mb = 1\n[traffic]\nspec = 'int8'\n")
    assert (
        "--compress int4: the recipe has traffic.spec 'int8'"
        in shrunk("--recipe", "some.toml", "--compress", "int4").err
    )


@pytest.mark.slow
def test_the_example_meets_the_budget_that_it_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxruntime")
    root = Path(__file__).parents[2]
    line = re.search(r"commpress (shrink .*)", (root / "examples" / "shrink.py").read_text())
    assert line is not None
    monkeypatch.chdir(root)
    words = [word for word in line[1].split() if word not in ("--max-ms", "0.3")]  # others' work makes calls slow
    code, out, err = run_command(*words, "--steps", 100, "--out", tmp_path / "out")
    assert code == 0, err
    assert "model.onnx is" in out
    assert (tmp_path / "out" / "small" / "model.onnx").stat().st_size <= 450_000
