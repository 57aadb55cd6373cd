"""`commpress judge`: what it prints and leaves of exported files and of runs, and what it refuses."""

import contextlib
import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ended, run_command
from hostile import Payload, hostile_pt2

from commpress.launch import judge, records, report, train

FILES = '''
"""Two matrices as ONNX files, and batches for them."""
from pathlib import Path

import numpy
import onnx
import torch
from onnx import helper, numpy_helper


def write(folder, weight):
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", kind, ["rows", 32])],
        [helper.make_tensor_value_info("y", kind, ["rows", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    Path(folder).mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), f"{folder}/model.onnx")


def held_out():
    return [(torch.randn(4, 32), torch.randint(0, 8, (4,))) for _ in range(3)]


def fails():
    raise OSError("no disk")


def number():
    return 3


if not Path("dense").exists():
    w = numpy.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    write("dense", w)
    write("small", w * 0.9)
'''
TINY = {"layers": 1, "width": 64, "heads": 2, "context": 32, "batch": 4, "threads": 1, "eval_batches": 2}
RECIPE = "[[prune]]\nstart = 1\namount = 0.8\n[[quantize]]\nstart = 2\nactivations = 'static'\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two models of one matrix, which is where the command runs."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "judged_files.py").write_text(FILES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    __import__("judged_files")
    yield tmp_path
    sys.modules.pop("judged_files", None)


def judged(*flags: object, data: str = "held_out") -> Ended:
    return run_command("judge", "dense", "small", "--data", f"judged_files:{data}", "--out", "out", *flags)


def test_it_prints_the_figures_and_leaves_record_pictures_and_card(place: Path) -> None:
    code, out, err = judged("--runtimes", "onnxruntime")
    assert (code, err) == (0, "")
    record: dict[str, Any] = json.loads(Path("out/judgement.json").read_text())
    for sentence in record["sentences"]:
        assert f"- {sentence}" in out
    assert re.search(r"onnxruntime +1 ", out)
    page = Path("out/judgement.html").read_text()
    assert page.count('class="figure"') == 2  # no model.safetensors tells bytes by layer
    assert "against the dense one</h2>" in page
    assert Path("small/model_card.md").read_text() == Path("out/model_card.md").read_text()
    again = records.read(place / "out" / "judgement.json")
    assert records.kind(again) == records.JUDGED
    assert report.page_of([again]).count('class="figure"') == 2


@pytest.mark.parametrize(
    ("flags", "data", "said"),
    [
        ((), "missing", "--data judged_files:missing: judged_files has no missing"),
        ((), "fails", "--data judged_files:fails: the call fails: OSError: no disk"),
        ((), "number", "--data judged_files:number: returns a int, expected batches (inputs, targets)"),
        (("--runtimes", "tflite"), "held_out", "expected some of torch, onnxruntime, pt2e, executorch, integer"),
        (
            ("--runtimes", "pt2e"),
            "held_out",
            "no runtime has a form of both models: pt2e, dense: no model.pt2 in dense",
        ),
    ],
)
def test_what_cannot_be_judged_ends_with_a_sentence(place: Path, flags: tuple[str, ...], data: str, said: str) -> None:
    code, _, err = judged(*flags, data=data)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert not Path("out/judgement.json").exists()


def test_files_of_an_export_need_data(place: Path) -> None:
    code, _, err = run_command("judge", "dense", "small")
    assert code == 1
    assert "--data: expected module:function" in err


def test_a_hostile_pt2_is_left_out_with_a_sentence_unless_it_is_asked_for(place: Path) -> None:
    made = place / "made"
    for folder in ("dense", "small"):
        hostile_pt2(place / folder / "model.pt2", made)
    Path("small/transformers").mkdir()
    code, out, err = judged()
    assert (code, err) == (0, "")
    assert not made.exists()
    said = " ".join(out.split())
    assert (
        "Not measured: pt2e, dense and small: loading model.pt2 runs code of whoever wrote it; if you trust them"
        in said
    )
    assert "Not measured: torchao, small: no runtime here takes transformers" in said
    assert re.search(r"onnxruntime +1 ", out)
    assert "loading model.pt2 runs code" in Path("small/model_card.md").read_text()
    with contextlib.suppress(Exception):  # the payload is no example inputs
        torch.export.load("small/model.pt2")
    assert made.exists()


def test_a_hostile_pickle_for_model_safetensors_is_refused(place: Path) -> None:
    made = place / "made"
    Path("small/model.safetensors").write_bytes(pickle.dumps(Payload(made)))
    code, _, err = judged("--runtimes", "onnxruntime")
    assert (code, err.count("\n")) == (1, 1)
    assert "error: small/model.safetensors: not a safetensors file, or damaged" in err
    assert not made.exists()


@pytest.mark.usefixtures("ranks_of_our_own")
@pytest.mark.parametrize("command", [("judge", "run", "run"), ("export", "run"), ("train", "--resume", "--out", "run")])
def test_a_hostile_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    from commpress.launch import checkpoint

    monkeypatch.chdir(tmp_path)
    made, run = tmp_path / "made", Path("run")
    shared = {"identity": {**TINY, "steps": 9}, "model": Payload(made), "durations": [], "curve": [], "traffic": {}}
    checkpoint.write(run, 4, 0, shared, {"session": None})  # its checksum is right
    checkpoint.publish(run, 4)
    code, _, err = run_command(*command)
    assert code == 1
    assert "run/step-00000004/checkpoint.pt: damaged: Weights only load failed" in err
    assert not made.exists()
    torch.load(run / "step-00000004" / "checkpoint.pt", weights_only=False)
    assert made.exists()


def trained(folder: Path, steps: int, recipe: Path | None = None) -> None:
    flags = {**TINY, "steps": steps, "recipe": recipe, "out": folder, "data": Path(__file__).parents[1]}
    train.train(train.Settings(**{**flags, "warmup_steps": 1}))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("ranks_of_our_own")
def test_runs_are_judged_on_the_text_that_they_hold_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    trained(tmp_path / "dense", 4)
    trained(tmp_path / "small", 4, tmp_path / "recipe.toml")
    done = run_command(
        *(
            "judge",
            tmp_path / "dense",
            tmp_path / "small",
            "--out",
            tmp_path / "out",
            "--runtimes",
            "torch",
            "onnxruntime",
        )
    )
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "judgement.json").read_text())
    of_runs = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("dense", "small")]
    quality = record["rows"][0]["quality"]
    assert quality["dense_loss"] == pytest.approx(of_runs[0]["final_validation_loss"], abs=1e-5)
    assert quality["small_loss"] == pytest.approx(of_runs[1]["small_model"]["validation_loss"], abs=1e-5)
    assert record["small"]["stored_bytes"] == of_runs[1]["small_model"]["bytes"]
    assert "int8 static" in record["small"]["kinds"]
    assert (tmp_path / "small" / "model_card.md").exists()
    page = (tmp_path / "out" / "judgement.html").read_text()
    assert page.count('class="figure"') == 3


@pytest.mark.usefixtures("ranks_of_our_own")
def test_a_run_without_a_checkpoint_or_with_half_a_recipe_is_refused(tmp_path: Path) -> None:
    from commpress.launch import checkpoint

    shared = {"identity": {**TINY, "recipe": {"prune": [{"start": 1, "amount": 0.5}]}, "steps": 9}, "model": {}}
    checkpoint.write(tmp_path, 4, 0, {**shared, "durations": [], "curve": [], "traffic": {}}, {"session": None})
    judged = judge.Judge(tmp_path, tmp_path)
    assert judged.model_of(tmp_path) == tmp_path  # nothing counts before it is published
    checkpoint.publish(tmp_path, 4)
    with pytest.raises(ValueError, match="is at step 4 of 9, expected a run whose recipe has finished"):
        judged.model_of(tmp_path)
