"""LiteRT: its interpreter computes what training computed, from integers. `make test-litert` runs these tests."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from torch import Tensor, nn

from commpress.model import export, judge
from commpress.model.quantization import Quantization

pytest.importorskip("litert_torch")


FRESH = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
it = Interpreter(sys.argv[1])
it.allocate_tensors()
(its,), (gives,) = it.get_input_details(), it.get_output_details()
scale, zero = its["quantization"]
x = np.load(sys.argv[2])
it.set_tensor(its["index"], (np.round(x / scale) + zero).clip(-128, 127).astype(its["dtype"]) if scale else x)
it.invoke()
np.save(sys.argv[3], it.get_tensor(gives["index"]))
assert "torch" not in sys.modules
"""


def convolutions() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 10)), (torch.randn(2, 3, 16, 16),)


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> tuple[int, float]:
    """The bytes of the file, and its difference as a share of the largest output."""
    (there,) = export(model, folder, formats=("litert",), example_inputs=inputs)
    with torch.no_grad():
        return there.bytes, there.difference / float(model(*inputs).abs().max())


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
@pytest.mark.parametrize("of", [mlp, text_model])
def test_the_file_computes_what_training_computed(of: Any, settings: Quantization, tmp_path: Path) -> None:
    model, inputs = of()
    learned(model, inputs, settings)
    _, difference = exported(model, inputs, tmp_path)
    # an input that lies between two codes may fall on the other one: floats are summed up in another order
    assert difference < (2e-2 if settings.activations else 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("of", "activations"), [(mlp, "dynamic"), (convolutions, "static")])
def test_integers_are_in_the_file(of: Any, activations: Any, bits: int, tmp_path: Path) -> None:
    model, inputs = of()
    plain, _ = exported(model, inputs, tmp_path / "plain")
    learned(model, inputs, Quantization(bits, None, activations))
    small, difference = exported(model, inputs, tmp_path / "small")
    last = 4 * sum(p.numel() for p in model[-1].parameters()) if activations == "static" else 0  # computed in floats
    assert small - last < plain / 2
    assert difference < 2e-2


@pytest.mark.parametrize("activations", [None, "dynamic", "static"])
def test_a_fresh_process_computes_the_same(activations: Any, tmp_path: Path) -> None:
    model, inputs = mlp()
    learned(model, inputs, Quantization(activations=activations))
    (there,) = export(model, tmp_path, formats=("litert",), example_inputs=inputs)
    files = [str(tmp_path / name) for name in ("x.npy", "y.npy")]
    np.save(files[0], inputs[0].numpy())
    subprocess.run([sys.executable, "-c", FRESH, str(there.path), *files], check=True, timeout=100)
    with torch.no_grad():
        expected = model(*inputs)
    off = (expected - torch.from_numpy(np.load(files[1]))).abs().max() / expected.abs().max()
    assert off < (2e-2 if activations else 1e-5)


def test_it_is_a_runtime_of_judge(tmp_path: Path) -> None:
    dense, inputs = mlp()
    small = learned(copy.deepcopy(dense), inputs, Quantization(activations="dynamic"))
    data = [(torch.randn(rows, 128), torch.randint(0, 64, (rows,))) for rows in (1, 8)]  # a file has two rows at least
    found = judge(dense, small, data, runtimes=("litert",), folder=tmp_path)
    again = judge(tmp_path / "dense", tmp_path / "small", data, runtimes=("litert",))
    for record in (found.record, again.record):
        (row,) = record["rows"]
        assert (row["runtime"], row["small"]["file"]) == ("litert", "model.tflite")
        assert row["small"]["bytes"] < row["dense"]["bytes"]
        with torch.no_grad():
            outputs, targets = torch.cat([small(x) for x, _ in data]), torch.cat([y for _, y in data])
            expected = float(nn.functional.cross_entropy(outputs, targets))
        assert row["quality"]["small_loss"] == pytest.approx(expected, abs=2e-2)
        assert row["quality"]["small_loss"] != row["quality"]["dense_loss"]
