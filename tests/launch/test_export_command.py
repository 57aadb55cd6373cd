"""`commpress export`: what it prints and leaves of a run and of one's own model, and what it refuses."""

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from commands import run_command
from hostile import Payload

from commpress.launch.export import Format
from commpress.model import stored
from commpress.model.export import FORMATS

MODELS = '''
"""Models to export."""
import torch
from torch import nn

from commpress.model import Recipe, prepare, quantization, ranges


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def trained():
    model = build()
    prepare(model, Recipe.load("recipe.toml"))
    quantization.enable(model)
    nn.init.normal_(model[0].weight)
    model(torch.randn(64, 16))
    ranges.learn(model)
    return model


def inputs():
    return (torch.randn(8, 16, generator=torch.Generator().manual_seed(0)),)


def tensor():
    return inputs()[0]


def fails():
    raise OSError("no data")


def none():
    return 3
'''
RECIPE = '[[quantize]]\nactivations = "static"\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of models and a recipe, which is where the command runs."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("models", None)


@pytest.mark.slow
def test_a_run_of_train_is_exported_as_its_recipe_left_it(place: Path) -> None:
    (place / "text.txt").write_text("All that is gold does not glitter. " * 200)
    size = ("--layers", 1, "--width", 32, "--heads", 2, "--context", 16, "--batch", 2, "--eval-batches", 1)
    code, _, err = run_command(
        *("train", "--data", "text.txt", "--recipe", "recipe.toml", "--steps", 4, "--out", "run", *size)
    )
    assert code == 0, err
    code, out, err = run_command("export", "run", "--formats", "safetensors", "pt2e", "--out", "out")
    assert code == 0, err
    assert {each.name for each in (place / "out").iterdir()} == {"model.safetensors", "model.pt2", "export.json"}
    assert "out/model.pt2" in out
    record = json.loads((place / "out" / "export.json").read_text())
    assert [row["format"] for row in record["rows"]] == ["safetensors", "pt2e"]
    for row in record["rows"]:
        assert row["bytes"] == (place / "out" / row["path"]).stat().st_size
    assert record["rows"][1]["difference"] < 1e-3
    run, exported = (stored.load(place / folder / "model.safetensors") for folder in ("run", "out"))
    assert run.integers.keys() == exported.integers.keys()
    for name, codes in run.integers.items():
        assert torch.equal(codes.values, exported.integers[name].values)


@pytest.mark.parametrize("how", ["stored", "saved", "checkpoint"])
def test_a_model_of_ones_own_has_the_values_of_its_file(place: Path, how: str) -> None:
    import models

    model, recipe = models.trained(), ("--recipe", "recipe.toml")
    if how == "stored":
        stored.save("state.safetensors", model)
        recipe = ()  # the file says it
    else:
        torch.save(model.state_dict() if how == "saved" else {"model": model.state_dict()}, "state.pt")
    state = next(place.glob("state.*"))
    flags = ("--model", "models:build", "--example", "models:inputs", "--state", state, *recipe)
    code, _, err = run_command("export", *flags, "--formats", "integer", "pt2e", "--out", "out")
    assert code == 0, err
    found = torch.export.load("out/model.pt2").module()(*models.inputs())
    torch.testing.assert_close(found, model.eval()(*models.inputs()), rtol=0, atol=1e-4)


def test_a_model_without_a_file_is_as_its_factory_made_it(place: Path) -> None:
    code, out, err = run_command(
        "export", "--model", "models:trained", "--example", "models:inputs", "--formats", "integer"
    )
    assert code == 0, err
    assert "runs/exported/integer.safetensors" in out


def refusals() -> list[tuple[tuple[str, ...], str]]:
    own, example = ("--model", "models:build"), ("--example", "models:inputs")
    return [
        ((), "expected the folder of a run, or --model module:factory"),
        (
            ("run", *own, *example),
            "--example models:inputs: has an effect only with --model, without the folder of a run",
        ),
        ((*own, *example, "--data", "models:data"), "--data models:data: has an effect only with the folder of a run"),
        (("run", "--state", "x.pt"), "--state x.pt: has an effect only with --model"),
        (("nowhere",), "nowhere: there is no checkpoint, expected the folder of a run of `commpress train`"),
        (own, "--example: expected module:function, such as my_project.models:inputs"),
        (("--model", "models:none", *example), "--model models:none: returns a int, expected a torch.nn.Module"),
        (("--model", "models:gone", *example), "--model models:gone: models has no gone"),
        ((*own, "--example", "models:tensor"), "--example models:tensor: returns a Tensor, expected a tuple"),
        ((*own, "--example", "models:fails"), "--example models:fails: the call fails: OSError: no data"),
        ((*own, *example, "--state", "gone.pt"), "No such file or directory: 'gone.pt'"),
        ((*own, *example, "--state", "recipe.toml"), "--state recipe.toml: not a file of torch.save, or damaged"),
        (
            (*own, *example, "--state", "other.pt"),
            "--state other.pt: Error(s) in loading state_dict for Sequential: Missing",
        ),
        ((*own, *example, "--state", "text.safetensors"), "text.safetensors: not a safetensors file, or damaged"),
        ((*own, *example, "--recipe", "recipe.toml"), "'0': no range of inputs has been learned"),
        ((*own, *example, "--formats", "integer"), "Linear of '0' has no integer form"),
        ((*own, *example, "--out", "recipe.toml"), "--out recipe.toml: cannot write to recipe.toml: Not a directory"),
    ]


@pytest.mark.parametrize("case", range(17))
def test_what_cannot_be_is_told_in_a_sentence(place: Path, case: int) -> None:
    flags, message = refusals()[case]
    torch.save({"0.weight": torch.zeros(1)}, "other.pt")
    (place / "text.safetensors").write_text(MODELS)
    code, _, err = run_command("export", *flags)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(place.glob("runs/exported/*"))


@pytest.mark.parametrize("name", ["state.pt", "state.pickle", "model.safetensors"])
def test_a_hostile_pickle_for_a_state_is_refused_and_runs_nothing(place: Path, name: str) -> None:
    made = place / "made"
    if name == "state.pt":
        torch.save({"0.weight": Payload(made)}, name)
    else:
        Path(name).write_bytes(pickle.dumps(Payload(made)))
    flags = ("--model", "models:build", "--example", "models:inputs", "--formats", "integer")
    code, _, err = run_command("export", *flags, "--state", name)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{name}: not a" in err
    assert not made.exists()


def test_the_command_knows_all_formats() -> None:
    assert set(get_args(Format)) == set(FORMATS)
