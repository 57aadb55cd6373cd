"""ExecuTorch: what a fresh process runs computes what training computed, and XNNPACK has the layers that it shall have."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from torch import Tensor, nn

from commpress.model import export
from commpress.model.export import executorch
from commpress.model.export.parts import batch_shapes, evaluated
from commpress.model.quantization import Quantization

pytest.importorskip("executorch")

FRESH = """
import sys
import torch
import executorch.kernels.quantized
from executorch.runtime import Runtime
method = Runtime.get().load_program(sys.argv[1]).load_method("forward")
torch.save([method.execute([x])[0] for x in torch.load(sys.argv[2], weights_only=True)], sys.argv[3])
assert "commpress" not in sys.modules
"""


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, **how: Any) -> Any:
    return export(model, folder, formats=("executorch",), example_inputs=inputs, **how)[0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=named)
@pytest.mark.parametrize("of", [mlp, text_model])
def test_the_file_computes_what_training_computed(of: Any, settings: Quantization, tmp_path: Path) -> None:
    model, inputs = of()
    learned(model, inputs, settings)
    there = exported(model, inputs, tmp_path)
    assert there.bytes == (tmp_path / "model.pte").stat().st_size
    for rows in (1, 2):  # it has memory for as many as the example has
        less = (inputs[0].flip(0)[:rows],)
        with torch.no_grad():
            expected, (found,) = model(*less), executorch.run(there.path, model, less)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_of_as_many_rows_as_a_dim_says(tmp_path: Path) -> None:
    model, inputs = mlp()
    learned(model, inputs, Quantization(activations="static"))
    shapes = ({0: torch.export.Dim("batch", max=32)},)
    there = exported(model, inputs, tmp_path, dynamic_shapes=shapes)
    given = [torch.randn(rows, 128) for rows in (1, 7, 32)]
    torch.save(given, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", FRESH, str(there.path), *files], check=True, timeout=200)
    for x, y in zip(given, torch.load(files[1], weights_only=True), strict=True):
        with torch.no_grad():
            off = (model(x) - y).abs() / y.abs().max()
        assert off.max() < 0.01  # XNNPACK rounds products and bias at once: a code on an edge takes the next one
        assert off.median() < 1e-6


def left_to_others(settings: Quantization) -> set[str]:
    """The operators of a model that XNNPACK has not taken."""
    model, inputs = mlp()
    learned(model, inputs, settings)
    with evaluated(model):
        graph = executorch.lowered(model, inputs, batch_shapes(inputs)).exported_program().graph
    called = {node.target.__name__ for node in graph.nodes if node.op == "call_function"}
    return called - {"executorch_call_delegate", "getitem"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS[4:7], ids=named)
def test_by_token_every_layer_is_xnnpacks(settings: Quantization) -> None:
    assert not left_to_others(settings)


@pytest.mark.slow
def test_a_static_layer_in_front_of_relu_and_a_static_layer_is_xnnpacks() -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 64),)
    model = learned(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), x, Quantization(activations="static")
    )
    with evaluated(model):
        graph = executorch.lowered(model, x, batch_shapes(x)).exported_program().graph
    names = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
    assert names.count("quantized_decomposed.dequantize_per_channel.default") == 1  # the last one has float outputs


@pytest.mark.slow
def test_four_bits_take_half_a_byte_and_int8_one(tmp_path: Path) -> None:
    weights = 2 * 512 * 512
    for settings, least, most in (
        (Quantization(8), 1, 1.05),
        (Quantization(4), 0.5, 0.55),
        (Quantization(8, None, "dynamic"), 1, 1.05),
        (Quantization(4, 32, "dynamic"), 0.5625, 0.62),  # bfloat16 a group of 32
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        x = (torch.randn(4, 512),)
        there = exported(learned(model, x, settings), x, tmp_path / named(settings))
        assert least * weights < there.bytes < most * weights


def convolutions() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 6 * 6, 5)), (torch.randn(4, 4, 8, 8) + 0.5,)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, 12] to [batch, time, 3]."""
        y: Tensor = self.head(self.inner(x)[0])
        return y


def recurrent() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Recurrent(), (torch.randn(4, 6, 12),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "settings"),
    [
        (convolutions, Quantization(activations="static")),
        (convolutions, Quantization(4, None)),
        (recurrent, Quantization()),
        (recurrent, Quantization(4, None, "dynamic")),
    ],
    ids=["static convolutions", "int4 convolutions", "lstm", "int4 lstm"],
)
def test_other_layers_compute_what_training_computed(of: Any, settings: Quantization, tmp_path: Path) -> None:
    model, inputs = of()
    there = exported(learned(model, inputs, settings), inputs, tmp_path)
    assert there.difference < 1e-5
