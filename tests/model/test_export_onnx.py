"""ONNX: what onnxruntime computes, in a process that has no torch, is what training computed; the file is of integers."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import SETTINGS, learned, mlp, text_model
from tiers import slow, slowly
from torch import Tensor, nn

from commpress.launch.model import GPT, Shape
from commpress.model import export
from commpress.model.export import Exported
from commpress.model.quantization import Quantization
from commpress.model.structured import shrink

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FRESH = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.optimized_model_filepath, options.log_severity_level = sys.argv[2], 3
if len(sys.argv) > 3:
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
for path in ("x", "more"):
    x = np.load(f"{sys.argv[1]}/{path}.npy")
    np.save(f"{sys.argv[1]}/{path}.out.npy", session.run(None, {session.get_inputs()[0].name: x})[0])
assert "torch" not in sys.modules
"""
"""Twice, with different numbers of rows; a third argument asks for float32 kernels where weights alone are integers."""
INTEGER = {"QGemm", "MatMulIntegerToFloat", "MatMulInteger", "QLinearConv"}


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Exported:
    return export(model, folder, formats=("onnx",), example_inputs=inputs)[0]


def in_a_fresh_process(
    model: nn.Module, x: Tensor, folder: Path, *exact: str
) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """What torch and the file compute of x and of another number of rows, and the operators that onnxruntime runs."""
    more = torch.cat([x, x.flip(0), x])
    for name, each in (("x", x), ("more", more)):
        np.save(folder / f"{name}.npy", each.numpy())
    kernels = folder / "kernels.onnx"
    subprocess.run([sys.executable, "-c", FRESH, str(folder), str(kernels), *exact], check=True, timeout=100)
    results = []
    with torch.no_grad():
        for name, each in (("x", x), ("more", more)):
            results.append((model(each), torch.from_numpy(np.load(folder / f"{name}.out.npy"))))
    return results, [node.op_type for node in onnx.load(kernels).graph.node]


def relative(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected - found).abs().max() / expected.abs().max())


QUICK = [(mlp, SETTINGS[1])]
ALL = [(of, settings) for of in (text_model, mlp) for settings in SETTINGS]


@pytest.mark.parametrize(("of", "settings"), slowly(ALL, QUICK))
def test_onnxruntime_computes_what_training_computed(of: Any, settings: Quantization, tmp_path: Path) -> None:
    model, inputs = of()
    learned(model, inputs, settings)
    exported(model, inputs, tmp_path)
    results, kernels = in_a_fresh_process(model, inputs[0], tmp_path, "exact")
    layers = 3
    for expected, found in results:
        assert relative(expected, found) < 2e-5  # float32's rounding; measured: up to 4e-6
    if settings.bits == 8 and settings.group is None and settings.activations:
        assert sum(kernel in INTEGER for kernel in kernels) == layers
        assert not {"Gemm", "FusedGemm"} & set(kernels) or of is text_model  # attention is not quantised
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.slow
def test_without_being_asked_onnxruntime_rounds_inputs_of_integer_weights(tmp_path: Path) -> None:
    model, inputs = mlp()
    learned(model, inputs, Quantization())
    there = exported(model, inputs, tmp_path)
    ((expected, found), _), kernels = in_a_fresh_process(model, inputs[0], tmp_path)
    assert kernels.count("MatMulNBits") == 3
    assert relative(expected, found) < 0.02
    assert there.difference == pytest.approx(float((expected - found).abs().max()))


@pytest.mark.parametrize(("bits", "group", "times"), [slow(8, None, 3.8), slow(4, None, 7.3), slow(4, 32, 6.0)])
def test_the_file_is_as_small_as_its_integers(bits: Any, group: Any, times: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    inputs = (torch.randn(4, 512),)
    dense = exported(model, inputs, tmp_path / "dense")
    assert dense.difference < 1e-5
    small = exported(learned(model, inputs, Quantization(bits, group)), inputs, tmp_path / "small")
    assert dense.bytes > times * small.bytes  # 4 / 5 bits a weight, scales and biases beside
    types = {i.data_type for i in onnx.load(small.path).graph.initializer if list(i.dims) == [512, 512]}
    assert types == {onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4}


@pytest.mark.parametrize("way", ["pruned", slow("tiny"), slow("convolution")])
def test_a_row_that_is_pruned_as_a_whole_keeps_its_bias(way: str, tmp_path: Path) -> None:
    """Its scale may be any; a bias is rounded to the scale of the products."""
    torch.manual_seed(0)
    kind: Any = functools.partial(nn.Conv1d, kernel_size=1) if way == "convolution" else nn.Linear
    model = nn.Sequential(kind(16, 8), nn.ReLU(), kind(8, 4))
    inputs = (torch.randn(32, 16, 6) if way == "convolution" else torch.randn(32, 16),)
    with torch.no_grad():
        model[0].weight[3] *= 1e-13 if way == "tiny" else 0
        model[2].weight[1] = 0
        model[0].bias[3], model[2].bias[1] = 1.5, -2.0
    learned(model, inputs, Quantization(activations="static"))
    difference = exported(model, inputs, tmp_path).difference
    assert difference < (0.02 if way == "convolution" else 2e-5)  # onnxruntime rounds a convolution's bias itself


@pytest.mark.slow
def test_a_shared_table_is_in_the_file_once(tmp_path: Path) -> None:
    model, inputs = text_model()
    exported(learned(model, inputs, Quantization(activations="static")), inputs, tmp_path)
    tables = [i for i in onnx.load(tmp_path / "model.onnx").graph.initializer if sorted(i.dims) == [64, 256]]
    assert len(tables) == 1


@pytest.mark.slow
def test_removed_rows_make_a_smaller_graph_than_masked_ones(tmp_path: Path) -> None:
    def gpt() -> GPT:
        torch.manual_seed(0)
        return GPT(Shape(layers=1, width=128, heads=4, context=16))

    tokens = torch.randint(0, 64, (2, 12))
    whole, removed = gpt(), gpt()
    shrink(removed, (tokens,), 0.5)
    with torch.no_grad():
        whole.blocks[0].up.weight[::2] = 0
    results = [
        exported(learned(m, (tokens,), Quantization()), (tokens,), tmp_path / n)
        for n, m in (("whole", whole), ("removed", removed))
    ]
    assert results[1].bytes < 0.8 * results[0].bytes
    shapes = []
    for each in results:
        graph = onnx.load(each.path).graph
        shapes.append(sum(np.prod(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.INT8))
        kept = [i for i in graph.initializer if i.name.endswith(":kept") and np.prod(i.dims)]  # biases are 0
        assert [0.4 < np.prod(i.dims) / 2**16 <= 0.5 for i in kept] == ([True] if each is results[0] else [])
    assert shapes[1] < 0.75 * shapes[0]


@pytest.mark.slow
def test_a_damaged_file_is_an_error_of_onnxruntime(tmp_path: Path) -> None:
    import onnxruntime

    model, inputs = mlp()
    there = exported(learned(model, inputs, Quantization()), inputs, tmp_path)
    there.path.write_bytes(there.path.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"Protobuf|INVALID"):
        onnxruntime.InferenceSession(there.path, providers=["CPUExecutionProvider"])
