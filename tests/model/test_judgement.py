"""Judgement: both models in processes of their own, what is compared is right, and what does not help is said."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import learned, mlp, named
from torch import nn
from torch.nn import functional
from training import same

from commpress.model import export, judge
from commpress.model.judgement import CARD, RECORD, FormError, content, forms, words
from commpress.model.judgement.forms import Side
from commpress.model.judgement.quality import Quality
from commpress.model.judgement.targets import TARGETS
from commpress.model.quantization import Quantization
from commpress.model.stored import load

CLASSES, WIDTH = 8, 32
DOCUMENT = Path(__file__).parents[2] / "docs" / "shrink.md"


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, WIDTH, generator=generator), torch.randint(0, CLASSES, (16,), generator=generator))
        for _ in range(count)
    ]


def linear_file(folder: Path, weight: torch.Tensor) -> Path:
    """A folder with a model.onnx of one matrix, [width, classes]: writing it needs no tracing."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder.mkdir(parents=True, exist_ok=True)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", kind, ["rows", WIDTH])],
        [helper.make_tensor_value_info("y", kind, ["rows", CLASSES])],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, folder / "model.onnx")
    return folder


def two_files(folder: Path) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    dense = torch.randn(WIDTH, CLASSES)
    small = dense + 0.3 * torch.randn(WIDTH, CLASSES)
    return linear_file(folder / "dense", dense), linear_file(folder / "small", small), dense, small


def test_two_folders_are_measured_in_processes_of_their_own_and_compared(tmp_path: Path) -> None:
    dense, small, one, other = two_files(tmp_path)
    found = judge(dense, small, batches(), runtimes=("onnxruntime", "torch"))
    (row,) = found.record["rows"]
    assert [row["runtime"], row["small"]["file"]] == ["onnxruntime", "model.onnx"]
    assert row["small"]["bytes"] == (small / "model.onnx").stat().st_size
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    first, second = x @ one, x @ other
    quality = row["quality"]
    assert quality["dense_loss"] == pytest.approx(float(functional.cross_entropy(first, y)), rel=1e-5)
    assert quality["small_loss"] == pytest.approx(float(functional.cross_entropy(second, y)), rel=1e-5)
    assert quality["changed"] == pytest.approx(float((first.argmax(1) != second.argmax(1)).float().mean()))
    divergence = functional.kl_div(second.log_softmax(1), first.log_softmax(1), reduction="batchmean", log_target=True)
    assert quality["divergence"] == pytest.approx(float(divergence), rel=1e-4)
    for side in ("dense", "small"):
        for speed in row[side]["speeds"]:
            assert 0 < speed["median"] <= speed["p95"]
            assert len(speed["turns"]) == 10
            assert speed["calls"] >= 20
            assert 0 < speed["calling_bytes"] < 200e6  # without the runtime's own
    assert row["dense"]["speeds"][0]["threads"] == 1
    assert found.record["left_out"] == [
        "torch, dense and small: a folder of files has no module, expected the module itself"
    ]
    found.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == found.record
    card = (tmp_path / "out" / CARD).read_text()
    assert all(sentence in card for sentence in found.sentences)
    assert "model.onnx is no smaller" in card


def test_the_documents_block_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small, *_ = two_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(
        r"test: by=tests/model/test_judgement.py -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
    exec(compile(block, "<block>", "exec"), {"dense": dense, "small": small, "held_out": batches()})
    assert {each.name for each in (tmp_path / "out").iterdir()} == {RECORD, CARD}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_modules_are_measured_in_every_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    dense, (x,) = mlp()
    dense[3] = nn.ReLU()  # which integers alone have, too
    small = learned(copy.deepcopy(dense), (x,), Quantization(activations="static"))
    data = [(torch.randn(8, 128), torch.randint(0, 64, (8,))) for _ in range(2)]
    found = judge(dense, small, data, folder=tmp_path)
    assert not [each for each in found.record["left_out"] if not each.startswith("litert")]
    assert [row["runtime"] for row in found.record["rows"]] == ["torch", "onnxruntime", "pt2e", "executorch", "integer"]
    files = {"model.safetensors", "model.onnx", "model.pt2", "model.pte", "integer.safetensors"}
    assert {each.name for each in (tmp_path / "small").iterdir()} == {*files, "export.json"}
    assert {row["file"] for row in found.record["forms"] if row["state"].endswith(" MB")} == files - {
        "model.safetensors"
    }
    for row in found.record["rows"]:
        off = 1e-2 if row["runtime"] == "integer" else 1e-3
        assert row["quality"]["small_loss"] == pytest.approx(found.record["rows"][0]["quality"]["small_loss"], abs=off)
        assert row["small"]["bytes"] < row["dense"]["bytes"]
    assert found.record["small"]["kinds"]["int8 static"] == sum(m.weight.numel() for m in small if hasattr(m, "weight"))
    assert "int8 static: " in found.sentences[0]


def test_integers_alone_are_compared_with_another_form_of_the_dense_model_and_not_timed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    dense = torch.randn(WIDTH, CLASSES)
    model = nn.Sequential(nn.Linear(WIDTH, CLASSES, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(dense.T)
    x = torch.cat([part for part, _ in batches()])
    learned(model, (x,), Quantization(activations="static"))
    export(model, tmp_path / "small", formats=("integer",), example_inputs=(x,))
    linear_file(tmp_path / "dense", dense)
    found = judge(tmp_path / "dense", tmp_path / "small", batches(), runtimes=("integer",))
    (row,) = found.record["rows"]
    assert [row["dense"]["file"], row["small"]["file"]] == ["model.onnx", "integer.safetensors"]
    assert row["small"]["speeds"] == []
    assert row["quality"]["small_loss"] == pytest.approx(row["quality"]["dense_loss"], rel=0.05)
    assert row["quality"]["small_loss"] != row["quality"]["dense_loss"]
    assert "Calls of integer were not timed: here NumPy makes them, and no device." in found.sentences
    forms_of = {each["file"]: each["state"] for each in found.record["forms"]}
    assert forms_of == {
        **{"model.onnx": "not asked for", "model.pt2": "not asked for", "model.pte": "not asked for"},
        "integer.safetensors": "0.00 MB",
    }


@pytest.mark.parametrize(
    "settings",
    [Quantization(activations="static"), Quantization(4, 32), Quantization(activations="dynamic")],
    ids=named,
)
def test_eager_torch_runs_the_values_of_the_file(tmp_path: Path, settings: Quantization) -> None:
    model, (x,) = mlp()
    learned(model, (x,), settings)
    (file,) = export(model, tmp_path, formats=("safetensors",), example_inputs=(x,))
    fresh = mlp()[0]
    fresh.load_state_dict(load(file.path).state_dict())
    made = forms.plain(model, load(file.path))
    assert same([made(x)], [fresh(x)])
    assert model[0].weight_fake_quantizer.enabled  # the model itself stays as it was


def test_bytes_by_layer_values_and_kinds_are_those_of_the_file(tmp_path: Path) -> None:
    model, (x,) = mlp()
    with torch.no_grad():
        model[0].weight[:, 32:] = 0
    learned(model, (x,), Quantization(activations="static", layers=("0",)))
    (file,) = export(model, tmp_path, formats=("safetensors",), example_inputs=(x,))
    layers = content.layer_bytes(file.path)
    assert layers == {"0": 256 * 128 // 8 + 256 * 32 + 4 * 256 + 4 * 256, "2": 4 * 96 * 256, "4": 4 * 64 * 97}
    stored = load(file.path)
    found = content.counts(stored)
    assert found["pruned"] == 256 * 96
    assert found["values"] == sum(p.numel() for p in model.parameters())
    assert found["values"] - found["left"] >= found["pruned"]
    kinds = content.kinds(Side("small", stored=file.path, content=stored))
    assert kinds == {"int8 static": 256 * 128, "float32": found["values"] - 256 * 128, "zeros": 256 * 96}


def test_classes_may_stand_second_and_what_losses_leave_out_is_no_prediction() -> None:
    y, z = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    targets = torch.tensor([[0, 1, -100], [4, -100, 2]])
    quality = Quality()
    quality.add(y, z, targets, None)
    found = quality.to_dict()
    assert found["dense_loss"] == pytest.approx(float(functional.cross_entropy(y, targets)), rel=1e-6)
    asked = targets >= 0
    assert found["changed"] == pytest.approx(float((y.argmax(1) != z.argmax(1))[asked].float().mean()))
    assert quality.classified == 4


def test_numbers_have_a_squared_error_and_no_accuracy() -> None:
    y, z, targets = torch.zeros(4, 2), torch.ones(4, 2), torch.full((4, 2), 0.5)
    quality = Quality()
    quality.add(y, z, targets, None)
    found = quality.to_dict()
    assert [found["dense_loss"], found["small_loss"], found["changed"]] == [0.25, 0.25, None]
    with pytest.raises(ValueError, match="have no usual loss"):
        quality.add(y, z, torch.zeros(4, 3), None)


def speed(seconds: float, turns: list[float] | None = None) -> dict[str, Any]:
    made = {"threads": 1, "calls": 20, "median": seconds, "p95": seconds, "waited": 0.0, "calling_bytes": 10**6}
    return {**made, "turns": turns or [seconds] * 10}


def record(dense: dict[str, Any], small: dict[str, Any], bytes_: tuple[int, int] = (4000, 1000)) -> dict[str, Any]:
    quality = {
        "dense_loss": 2.0,
        "small_loss": 2.1,
        "difference_error": 0.01,
        "dense_accuracy": 0.5,
        "small_accuracy": 0.4,
    }
    quality |= {"changed": 0.2, "divergence": 0.03}
    sides = {
        name: {"file": "model.onnx", "bytes": size, "speeds": [each]}
        for name, each, size in (("dense", dense, bytes_[0]), ("small", small, bytes_[1]))
    }
    counts = {"values": 100, "left": 20, "pruned": 80}
    return {
        "rows": [{"runtime": "onnxruntime", **sides, "quality": quality}],
        "dense": {"counts": {**counts, "pruned": 0}, "kinds": {"float32": 100}, "layers": {}, "stored_bytes": 400},
        "small": {"counts": counts, "kinds": {"float32": 100, "zeros": 80}, "layers": {}, "stored_bytes": 100},
    }


def test_what_does_not_help_is_said_of_the_figures() -> None:
    told = words.sentences(record(speed(1.0), speed(1.01), (4000, 4000)))
    assert told[0] == "80% of the values pruned: 4.0x smaller; on one thread no faster in onnxruntime."
    assert "model.onnx is no smaller: 0.00 MB against 0.00 MB." in told
    assert any("no faster on 1 thread" in each and "multiplies zeros" in each for each in told)
    assert any("no less memory" in each for each in told)


def test_a_machine_that_had_other_work_is_told_of() -> None:
    assert not [each for each in words.sentences(record(speed(1.0), speed(0.5))) if "other work" in each]
    told = words.sentences(record(speed(1.0), {**speed(0.5), "waited": 0.4}))
    assert (
        told[1] == "The machine had other work: calls waited for a core up to 40% of the time, so times are uncertain."
    )


@pytest.mark.parametrize(
    ("small", "word"),
    [
        (speed(0.5), "2.00x faster"),
        (speed(2.0), "2.00x slower"),
        (speed(0.97), "no faster"),
        (speed(0.8, [0.8] * 8 + [1.2] * 2), "no faster"),  # ahead in 8 of 10 turns: noise may be all there is
        (speed(0.8, [0.8] * 9 + [1.2]), "1.25x faster"),
    ],
)
def test_faster_is_what_is_ahead_in_almost_all_turns(small: dict[str, Any], word: str) -> None:
    assert words.speed_word(speed(1.0), small) == word


def test_each_kind_of_weights_that_a_target_has_kernels_for_is_one_that_a_file_can_have() -> None:
    possible = {"float32", "zeros"}
    possible |= {
        f"int{bits} {inputs}{groups}"
        for bits in (4, 8)
        for inputs in ("static", "dynamic", "weights")
        for groups in ("", " in groups")
    }
    assert {kind for known in TARGETS.values() for kind in known} <= possible


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runtimes": ("onnx",)}, "judge(runtimes=('onnx',)): expected some of torch, onnxruntime, pt2e"),
        ({"data": []}, "expected batches (inputs, targets), got none"),
        ({"data": [torch.zeros(2)]}, "batch 0: expected (inputs, targets), got a Tensor"),
        (
            {"data": [({"x": 1}, torch.zeros(2))]},
            "batch 0: expected inputs as a tensor or a tuple of tensors, got dict",
        ),
        ({"dense": "nowhere"}, "judge(dense): nowhere is not a folder"),
        ({"runtimes": ("torch",)}, "no runtime has a form of both models: torch, dense and small: a folder of files"),
    ],
)
def test_what_cannot_be_judged_is_told_in_a_sentence(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    dense, small, *_ = two_files(tmp_path)
    arguments: dict[str, Any] = {
        "dense": dense,
        "small": small,
        "data": batches(1),
        "runtimes": ("onnxruntime",),
    } | change
    with pytest.raises(ValueError) as error:  # noqa: PT011  its text is what is tested
        judge(arguments["dense"], arguments["small"], arguments["data"], runtimes=arguments["runtimes"])
    assert said in str(error.value)


def test_a_file_that_its_runtime_cannot_load_is_named(tmp_path: Path) -> None:
    dense, small, *_ = two_files(tmp_path)
    (small / "model.onnx").write_bytes(b"no model")
    with pytest.raises(FormError, match=r"small/model.onnx in onnxruntime: InvalidProtobuf"):
        judge(dense, small, batches(1), runtimes=("onnxruntime",))


def test_a_module_that_no_other_process_can_make_is_left_out_and_told(tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y

    side = forms.side_of(
        "dense", Local(), ("torch",), (torch.zeros(1, WIDTH),), tmp_path / "files", tmp_path / "scratch"
    )
    assert not side.forms
    assert "cannot be sent to another process" in side.left_out["torch"]
