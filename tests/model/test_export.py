"""Export: one call, a file a format and what it computes; the model stays as it was, and errors come before files."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from torch import nn
from training import same

from commpress.model import export, quantization, stored
from commpress.model.export import FORMATS, integer_run, parts
from commpress.model.quantization import Quantization

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"
BLOCKS_IN_A_FOLDER = """
import sys
for block in sys.argv[1:]:
    exec(compile(block, "<block>", "exec"), names := {"__name__": "__main__"})
    assert "logits" not in names or names["logits"].shape == (5, 10)
"""


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 16))


def test_a_file_a_format_with_its_bytes_and_its_difference(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = learned(small(), (X,), Quantization(activations="static"))
    written = export(model, tmp_path / "new" / "out", formats=("safetensors", "onnx", "pt2e"), example_inputs=(X,))
    assert [each.format for each in written] == ["safetensors", "onnx", "pt2e"]
    there = {each.name for each in (tmp_path / "new" / "out").iterdir()}
    assert {*(each.path.name for each in written), "export.json"} == there
    for each in written:
        assert each.bytes == each.path.stat().st_size
    no_rounding, onnx, pt2e = (each.difference for each in written)
    scale = model[0].activation_fake_quantizer.scale_and_zero()[0]
    assert 1e-4 < no_rounding < 64 * scale  # the plain model that the file loads into does not round inputs
    assert onnx < 1e-5
    assert pt2e < 1e-5


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = learned(small(), (X,), Quantization(activations="static")).train()
    model[2].eval()
    quantization.enable(model, False)
    modules, values = dict(model.named_modules()), [x.clone() for x in model.state_dict().values()]
    training = [m.training for m in model.modules()]
    states = quantization.state_dict(model)
    export(model, tmp_path, formats=("safetensors", "pt2e"), example_inputs=(X,))
    assert dict(model.named_modules()) == modules
    assert [m.training for m in model.modules()] == training
    assert quantization.state_dict(model) == states
    assert same([*model.state_dict().values()], values)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_cannot_be_traced_stays_as_it_was_and_leaves_no_file(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y if float(y.sum()) > 0 else -y

    model = learned(Branch(), (X,), Quantization())
    inner = model.inner
    with pytest.raises(Exception, match=r"data-dependent|Could not guard"):
        export(model, tmp_path, formats=("pt2e",), example_inputs=(X,))
    assert model.inner is inner
    assert not list(tmp_path.iterdir())


def by_name(model: nn.Module) -> dict[str, parts.Layer]:
    layers = parts.layers_of(model)
    return {name: layers[module] for name, module in model.named_modules() if module in layers}


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_a_converted_model_has_the_same_layers(settings: Quantization) -> None:
    model, inputs = text_model()
    learned(model, inputs, settings)
    before = by_name(model)
    quantization.convert(model)
    after = by_name(model)
    blocks = {f"block.{part}" for part in ("self_attn", "linear1", "linear2")}
    assert before.keys() == after.keys() == {"tokens", "places", "head", *blocks}
    for name, layer in before.items():
        assert layer.weights.keys() == after[name].weights.keys()
        for its, codes in layer.weights.items():
            assert torch.equal(codes.values, after[name].weights[its].values)
            assert torch.equal(codes.scale, after[name].weights[its].scale)
        for its in ("activations", "embedding", "scale", "zero"):
            assert getattr(layer, its) == getattr(after[name], its)
    assert after["tokens"].codes is after["head"].codes


def test_the_stored_file_leaves_out_pruned_weights(tmp_path: Path) -> None:
    model, inputs = mlp()
    with torch.no_grad():
        for module in model[::2]:
            module.weight.mul_(torch.rand_like(module.weight) > 0.8)
    learned(model, inputs, Quantization())
    (dense,) = export(mlp()[0], tmp_path / "dense", formats=("safetensors",), example_inputs=inputs)
    (pruned,) = export(model, tmp_path / "pruned", formats=("safetensors",), example_inputs=inputs)
    assert dense.bytes > 9 * pruned.bytes  # float32 against 0.2 int8 and a bit
    assert pruned.difference == 0
    assert set(stored.load(pruned.path).masks) >= {"0.weight", "2.weight", "4.weight"}


def unfit() -> list[tuple[nn.Module, dict[str, Any], str]]:
    fit = {"formats": ("pt2e",), "example_inputs": (X,)}
    unseen = small()
    quantization.prepare(unseen, Quantization(activations="static"))
    broken = learned(small(), (X,), Quantization())
    broken[0].weight.data[3, 1] = torch.nan
    one_row = r"expected tensors with 2 rows or more, .* got \(1, 32\)"
    return [
        (small(), fit | {"formats": ("onnxx",)}, r"formats='onnxx'\): expected some of safetensors, onnx, pt2e"),
        (small(), fit | {"formats": "onnx"}, r"formats='onnx'\): expected some of .*, as in formats=\('onnx',\)"),
        (small(), fit | {"formats": ()}, r"formats=\(\)\): expected some of"),
        (small(), fit | {"example_inputs": X}, r"example_inputs\): expected a tuple, got Tensor"),
        (small(), fit | {"example_inputs": (X[:1],)}, one_row),
        (small(), fit | {"example_inputs": ()}, "expected tensors with 2 rows or more, .* got none"),
        (small().bfloat16(), fit, r"export: '0' has torch.bfloat16, expected float32"),
        (small().to("meta"), fit, r"export: '0.weight' is on meta, expected a model on the CPU"),
        (unseen, fit, "'0': no range of inputs has been learned: train it with its quantiser on"),
        (broken, fit, "export: '0' has weights that are not finite"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_what_cannot_be_exported_is_refused_with_the_reason(case: int, tmp_path: Path) -> None:
    model, arguments, message = unfit()[case]
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", **arguments)
    assert not list(tmp_path.glob("out/*"))


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"export to onnx: found no onnxruntime, .*'commpress\[export\]'"):
        export(small(), tmp_path, formats=("onnx",), example_inputs=(X,))


@pytest.mark.slow
def test_the_document_exports_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("executorch")
    text = DOCUMENT.read_text()
    toml, *rest = re.findall(r"```(?:toml|python)\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(toml)
    first, *loads = rest
    assert len(loads) == 5
    shutil.copy(integer_run.__file__, tmp_path)
    for blocks in ([first], *([each] for each in loads)):  # what loads has imported nothing of ours
        subprocess.run([sys.executable, "-c", BLOCKS_IN_A_FOLDER, *blocks], check=True, timeout=200, cwd=tmp_path)


def test_every_format_is_a_file_of_its_own() -> None:
    assert len({to.FILE for to in FORMATS.values()}) == len(FORMATS)
