"""Pruned weights leave model.onnx: the same numbers by the same kernels as with zeros in the file, in fewer bytes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from tiers import slow
from torch import Tensor, nn

from commpress.model import export, pruning, stored
from commpress.model.export import Exported, onnx_masks
from commpress.model.quantization import Quantization

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FRESH = """
import sys
import numpy as np, onnxruntime
path, level = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level, options.optimized_model_filepath = 4, path + level
options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
outputs = session.run(None, {session.get_inputs()[0].name: np.load(path + ".npy")})[0]
np.save(path + level + ".npy", outputs)
assert "torch" not in sys.modules
"""
LEVELS = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL")
Made = tuple[nn.Module, tuple[Tensor, ...]]


def convolutions() -> Made:
    torch.manual_seed(0)
    middle = (nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 32, 3), *middle, nn.Linear(1024, 10)), (torch.randn(4, 3, 8, 8),)


def pruned(of: Made, amount: float = 0.7, settings: Quantization | None = None) -> Made:
    """All weights and what counts of them, rounded as `settings` say."""
    model, inputs = of
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(p.abs() > p.abs().flatten().kthvalue(max(1, int(amount * p.numel()))).values)
    return (model.eval() if settings is None else learned(model, inputs, settings)), inputs


def both(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Exported, Exported]:
    """The file with zeros, and that with masks."""
    model, inputs = made
    with monkeypatch.context() as patched:
        patched.setattr(onnx_masks, "leave_out", lambda graph: None)
        (zeros,) = export(model, folder / "zeros", formats=("onnx",), example_inputs=inputs)
    (masks,) = export(model, folder / "masks", formats=("onnx",), example_inputs=inputs)
    return zeros, masks


def computed(path: Path, x: Tensor, level: str) -> tuple[Any, list[str]]:
    """What a file computes in a process without torch, and the operators that run."""
    np.save(f"{path}.npy", x.numpy())
    subprocess.run([sys.executable, "-c", FRESH, str(path), level], check=True, timeout=100)
    return np.load(f"{path}{level}.npy"), sorted(node.op_type for node in onnx.load(f"{path}{level}").graph.node)


def weights_of(path: Path) -> dict[str, Any]:
    """By their names, what the initializers of a file are once onnxruntime has computed what it can of the rest."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level, options.optimized_model_filepath = 4, str(path.with_name("basic.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.with_name("basic.onnx")).graph
    return {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}


CASES: list[Any] = [
    (mlp, Quantization(activations="static")),
    slow(text_model, Quantization(activations="static")),
    slow(convolutions, Quantization(activations="static")),
    *(slow(mlp, settings) for settings in (None, *SETTINGS)),
    *(slow(text_model, settings) for settings in (None, *SETTINGS[:4])),
    *(slow(convolutions, settings) for settings in (None, Quantization(), Quantization(4))),
]


def called(each: Any) -> str:
    return each.__name__ if callable(each) else named(each) if each else "float32"


@pytest.mark.parametrize(("of", "settings"), CASES, ids=called)
def test_the_numbers_and_the_kernels_are_those_of_zeros_in_the_file(
    of: Any, settings: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = pruned(of(), settings=settings)
    zeros, masks = both((model, inputs), tmp_path, monkeypatch)
    assert masks.bytes < 0.95 * zeros.bytes
    assert masks.difference == zeros.difference
    onnx.checker.check_model(onnx.load(masks.path), full_check=True)
    assert b".py" not in masks.path.read_bytes()  # nor lines and paths of source code
    for level in LEVELS:
        expected, kernels = computed(zeros.path, inputs[0], level)
        found, others = computed(masks.path, inputs[0], level)
        if level == "ORT_DISABLE_ALL":
            assert "ScatterElements" in others
            assert (
                np.abs(expected - found).max() < 1e-6
            )  # kernels for weights that are no constants sum in another order
        else:
            assert np.array_equal(expected, found)
            assert kernels == others


@pytest.mark.slow  # a stored file's is quick: tests/model/test_stored.py
@pytest.mark.parametrize("settings", [Quantization(activations="static"), None, Quantization(4, 32)])
def test_two_of_four_is_smaller_in_the_file_and_gives_the_same_numbers(
    settings: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = mlp()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    masks = pruning.n_of_m({name: p.detach().abs() for name, p in weights.items()}, 2, 4)
    with torch.no_grad():
        for name, p in weights.items():
            p.mul_(masks[name])
    if settings is not None:
        learned(model, inputs, settings)
    zeros, small = both((model.eval(), inputs), tmp_path, monkeypatch)
    count, bits = sum(p.numel() for p in weights.values()), 32 if settings is None else settings.bits
    less = count * (bits / 16 - 1 / 8)  # half of the values, and a bit for each; the nodes take some of it
    assert 0.6 * less < zeros.bytes - small.bytes < 1.05 * less
    expected, kernels = computed(zeros.path, inputs[0], LEVELS[0])
    found, others = computed(small.path, inputs[0], LEVELS[0])
    assert np.array_equal(expected, found)
    assert kernels == others
    (there,) = export(model, tmp_path, formats=("safetensors",), example_inputs=inputs)
    stored_masks = stored.load(there.path).masks
    assert stored_masks.keys() == weights.keys()
    pruning.require_n_of_m(stored_masks, 2, 4)


class Shapes(nn.Module):
    """Weights of all kinds of shapes, one of them in two places, one without zeros, one of zeros alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.tokens, self.head = nn.Conv2d(16, 63, 3), nn.Embedding(127, 63), nn.Linear(63, 127, bias=False)
        self.head.weight = self.tokens.weight
        self.gain, self.none = nn.Parameter(torch.randn(8191)), nn.Parameter(torch.zeros(64, 127))
        self.whole = nn.Parameter(torch.randn(127, 64))

    def forward(self, index: Tensor) -> Tensor:
        """int64 [batch] to [batch, 127]."""
        x = self.tokens(index)
        pixels = self.conv(x.unsqueeze(1).unsqueeze(1).expand(-1, 16, 3, -1)).mean((2, 3))
        y: Tensor = self.head(x + pixels) @ self.whole @ self.none + self.head(pixels)
        return y + (self.gain * y.mean()).mean()


def test_weights_of_all_shapes_are_rebuilt_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Shapes()
    with torch.no_grad():
        for x in (model.conv.weight, model.tokens.weight, model.gain):
            x.mul_(torch.rand_like(x) > 0.8)
    zeros, masks = both((model, (torch.arange(5),)), tmp_path, monkeypatch)
    graph = onnx.load(masks.path).graph
    assert (
        sum(i.name.endswith(":mask") for i in graph.initializer) == 4
    )  # the table once, and none for what has no zeros
    sizes = {i.name.partition(":")[0]: list(i.dims) for i in graph.initializer if i.name.endswith(":kept")}
    assert sizes["none"] == [1, 0]
    expected, found = weights_of(zeros.path), weights_of(masks.path)
    assert {name for name, x in expected.items() if x.size >= 4096} <= found.keys()
    for name, x in expected.items():
        assert np.array_equal(x, found.get(name, x))
    predicted = sum(
        4 * x.numel() - onnx_masks.masked_bytes(x.numel(), int(x.count_nonzero()), 32) for x in model.parameters()
    )
    assert zeros.bytes - masks.bytes == pytest.approx(predicted, rel=0.02)


def test_a_file_without_enough_zeros_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    zeros, masks = both(pruned((model, (torch.randn(2, 64),)), amount=0.1), tmp_path, monkeypatch)
    assert zeros.path.read_bytes() == masks.path.read_bytes()


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_mask_is_there_where_it_saves_a_tenth(bits: int) -> None:
    n = 2**20
    whole = n * bits // 8
    edge = n - n // bits - n // 10 - 8 * onnx_masks.NODES // bits
    assert onnx_masks.masked_bytes(n, n, bits) == onnx_masks.masked_bytes(n, edge + 9, bits) == whole
    assert onnx_masks.masked_bytes(n, edge - 9, bits) <= 0.9 * whole
    assert onnx_masks.masked_bytes(n, n // 2, bits) == whole // 2 + n // 8 + onnx_masks.NODES
    assert onnx_masks.masked_bytes(64, 0, bits) == 8 * bits  # the nodes would take more
    assert onnx_masks.masked_bytes(2**31, 2**10, bits) == 2**28 * bits  # onnxruntime would compute it in every call


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("damage", ["one more", slow("one less"), slow("beyond")])
def test_a_mask_that_does_not_fit_is_an_error_of_onnxruntime(damage: str, level: str, tmp_path: Path) -> None:
    made = pruned((nn.Sequential(nn.Linear(63, 65, bias=False)), (torch.randn(2, 63),)))
    (there,) = export(made[0], tmp_path, formats=("onnx",), example_inputs=made[1])
    file = onnx.load(there.path)
    (mask,) = [i for i in file.graph.initializer if i.name.endswith(":mask")]
    bits = np.unpackbits(np.frombuffer(mask.raw_data, np.uint8), bitorder="little")  # the last is that of no weight
    if damage != "one more":
        bits[np.flatnonzero(bits)[0]] = 0
    if damage != "one less":
        bits[-1 if damage == "beyond" else np.flatnonzero(bits == 0)[0]] = 1
    mask.raw_data = np.packbits(bits, bitorder="little").tobytes()
    onnx.save(file, there.path)
    np.save(f"{there.path}.npy", made[1][0].numpy())
    done = subprocess.run([sys.executable, "-c", FRESH, str(there.path), level], capture_output=True, timeout=100)
    assert done.returncode == 1  # an error, no signal
    assert b"InvalidArgument" in done.stderr
