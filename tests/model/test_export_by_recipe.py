"""[export] of a recipe: what the scheduler writes at the end of a run, and what it refuses at the beginning."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.model import Recipe, RecipeError, Scheduler, stored
from commpress.model.distillation import PROJECTIONS, add_projections
from commpress.model.export import FORMATS, NEEDS
from commpress.model.export.by_recipe import export_by
from commpress.model.recipe.sections import Format

STEPS = 3
QUANTIZE = [{"start": 1, "bits": 8, "activations": "static"}]


def trained(*formats: str, **more: Any) -> Scheduler:
    """A network that has taken its steps by a recipe, alone or under DDP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    found = Recipe.of({"quantize": QUANTIZE, "export": {"formats": formats, **more}})
    optimizer, wrapped, session = torch.optim.AdamW(model.parameters()), model, None
    if dist.is_initialized() and dist.get_world_size() > 1:
        wrapped = DistributedDataParallel(model)
        session = commpress.attach(wrapped, "none")
    scheduler = Scheduler(found, model, optimizer, session=session, example_inputs=(torch.randn(1, 16),))
    for _ in range(STEPS):
        wrapped(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return scheduler


def test_the_formats_of_a_recipe_are_those_of_export() -> None:
    assert set(Format.__args__) == set(FORMATS)
    assert set(NEEDS) <= set(FORMATS)


@pytest.mark.slow
def test_the_files_are_written_as_training_left_the_model_and_one_format_does_not_hinder_others(tmp_path: Path) -> None:
    scheduler = trained("torchao", "safetensors", "integer", folder="out/files")
    with pytest.raises(
        ValueError, match="export: torchao cannot be written: ValueError: export to torchao: Sequential"
    ):
        scheduler.finish(tmp_path)
    record = json.loads((tmp_path / "out" / "files" / "export.json").read_text())
    assert [row["format"] for row in record["rows"]] == ["safetensors", "integer"]
    assert len(record["failed"]) == 1
    content = stored.load(tmp_path / "out" / "files" / "model.safetensors")
    assert set(content.integers) == {"0.weight", "2.weight"}
    assert set(content.ranges) == {"0", "2"}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def test_projections_of_a_distillation_are_left_out_and_an_older_file_of_what_fails_is_removed(tmp_path: Path) -> None:
    model, x = Small(), torch.randn(2, 4)
    add_projections(model, {"layer": (4, 8)})
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "integer.safetensors").write_text("of another run")
    section = Recipe.of({"export": {"formats": ("safetensors", "integer")}}).export
    assert section is not None
    written, failed = export_by(section, model, tmp_path, (x,))
    assert [each.format for each in written] == ["safetensors"]
    assert [each.split()[0] for each in failed] == ["integer"]
    assert {each.name for each in (tmp_path / "exported").iterdir()} == {"model.safetensors", "export.json"}
    content = stored.load(tmp_path / "exported" / "model.safetensors")
    assert set(content.state_dict()) == {"layer.weight", "layer.bias"}
    assert hasattr(model, PROJECTIONS)


def refused() -> list[str]:
    def end_early() -> None:
        scheduler = trained("safetensors")
        scheduler._pruner.done = 0
        scheduler.finish("nowhere")

    said = [outcome(end_early)]
    found, importlib.util.find_spec = importlib.util.find_spec, lambda name, package=None: None  # type: ignore[assignment]
    try:
        for formats in (("safetensors", "onnx"), ("executorch",)):
            lacks = dist.get_rank() == 0  # the first rank writes: the others hear of it
            importlib.util.find_spec = (lambda name, package=None: None) if lacks else found  # type: ignore[assignment]
            said.append(outcome(lambda formats=formats: trained(*formats)))
    finally:
        importlib.util.find_spec = found
    return said


def written(folder: Path) -> list[str]:
    return [each.path.name for each in trained("safetensors").finish(folder / f"rank{dist.get_rank()}")]


@pytest.mark.slow
def test_the_first_rank_writes_and_a_missing_package_is_refused_before_training_on_all(tmp_path: Path) -> None:
    assert run(2, written, tmp_path) == [["model.safetensors"], []]
    assert [each.name for each in tmp_path.iterdir()] == ["rank0"]
    for early, onnx, executorch in run(2, refused):
        assert "quantize[0].start: 1, but the run has 0 steps" in early
        assert (
            "export.formats: export to onnx: found no onnxruntime, expected it; pip install 'commpress[export]'" in onnx
        )
        assert "found no executorch, expected it; pip install 'commpress[executorch]'" in executorch


def test_example_inputs_are_asked_for_at_once() -> None:
    model = nn.Linear(2, 2)
    recipe = Recipe.of({"export": {"formats": ("onnx",)}})
    with pytest.raises(TypeError, match=r"the recipe has an \[export\], expected example_inputs=, a tuple"):
        Scheduler(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"formats": "onnx"}, "export.formats: expected a list, got 'onnx': write ['onnx']"),
        ({"formats": ()}, "export.formats: expected at least one"),
        ({"formats": ("tflite",)}, "export.formats[0]: expected 'safetensors', 'onnx', 'pt2e', 'executorch'"),
        ({"formats": ("onnx",), "folder": "../x"}, "export.folder: expected a folder inside the run's"),
        ({"formats": ("onnx",), "folder": "/x"}, "export.folder: expected a folder inside the run's"),
        ({"formats": ("onnx",), "out": "x"}, "export.out: unknown key, expected one of formats, folder"),
        ({}, "export.formats: missing"),
    ],
)
def test_a_section_that_makes_no_sense_names_its_key(found: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.of({"export": found})
    assert said in str(error.value)
