"""LiteRT: its interpreter computes what training computed, from integers. `make test-litert` runs these tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from torch import Tensor, nn

from commpress.model import export
from commpress.model.quantization import Quantization

pytest.importorskip("litert_torch")


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
