"""A stored file as a module: it computes with the file's integers, bit for bit as training did."""

from pathlib import Path

import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from torch import nn

from commpress.model import quantization, stored
from commpress.model.quantization import Quantization
from commpress.model.restored import restore


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.activations != "dynamic"], ids=named)
def test_a_plain_model_computes_what_training_computed(settings: Quantization, tmp_path: Path) -> None:
    model, inputs = text_model()
    learned(model, inputs, settings)
    stored.save(tmp_path / "m", model)
    fresh = text_model()[0]
    nn.init.normal_(fresh.places.weight)
    restored = restore(fresh, stored.load(tmp_path / "m")).eval()
    with torch.no_grad():
        assert torch.equal(restored(*inputs), model(*inputs))
    assert restored.head.weight is restored.tokens.weight
    before, after = stored.encode(model), stored.encode(restored)
    assert before.ranges == after.ranges
    for name, codes in before.integers.items():
        assert torch.equal(codes.values, after.integers[name].values)
        assert torch.equal(codes.scale, after.integers[name].scale)


def test_inputs_by_token_are_those_of_a_prepared_model(tmp_path: Path) -> None:
    settings = Quantization(4, 32, "dynamic")
    model, inputs = mlp()
    learned(model, inputs, settings)
    stored.save(tmp_path / "m", model)
    fresh = mlp()[0]
    quantization.prepare(fresh, settings)
    with torch.no_grad():
        assert torch.equal(restore(fresh, stored.load(tmp_path / "m"))(*inputs), model(*inputs))


def test_a_file_without_integers_loads_into_a_plain_model(tmp_path: Path) -> None:
    stored.save(tmp_path / "m", mlp()[0])
    fresh = mlp()[0]
    nn.init.zeros_(fresh[0].weight)
    assert torch.equal(restore(fresh, stored.load(tmp_path / "m"))[0].weight, mlp()[0][0].weight)


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        (
            Quantization(4),
            "'0.weight' is prepared with 4 bits and groups of 128, the file has 8 bits and groups of 128",
        ),
        (
            Quantization(8, 32),
            "'0.weight' is prepared with 8 bits and groups of 32, the file has 8 bits and groups of 128",
        ),
        (Quantization(layers=("0", "2")), "'4' has integers only in the file"),
        (Quantization(), "'0' has a range of inputs only in the file"),
    ],
)
def test_a_model_that_was_prepared_otherwise_is_refused(prepared: Quantization, message: str, tmp_path: Path) -> None:
    model, inputs = mlp()
    stored.save(tmp_path / "m", learned(model, inputs, Quantization(activations="static")))
    fresh = mlp()[0]
    quantization.prepare(fresh, prepared)
    with pytest.raises(ValueError, match=f"restore: {message}"):
        restore(fresh, stored.load(tmp_path / "m"))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model, inputs = mlp()
    stored.save(tmp_path / "m", learned(model, inputs, Quantization()))
    with pytest.raises(ValueError, match="'2' matches no"):
        restore(nn.Sequential(nn.Linear(128, 256)), stored.load(tmp_path / "m"))
    text, inputs = text_model()
    stored.save(tmp_path / "m", learned(text, inputs, Quantization()))
    with pytest.raises(ValueError, match=r"the file has 'block.*', the model has no 'block'"):
        restore(mlp()[0], stored.load(tmp_path / "m"))
