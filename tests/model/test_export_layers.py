"""Convolutions, attention and recurrent layers leave as integers: the file has training's codes, and onnxruntime's outputs are
those of training. Inductor makes integer kernels of static convolutions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import learned
from layers import LAYERS, OTHERS, layer
from test_export_pt2e import FRESH
from tiers import slow, slowly
from torch import Tensor, nn

from commpress.model import export, quantization
from commpress.model.export import pt2e
from commpress.model.quantization import Quantization, computed_codes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

STATIC = Quantization(activations="static")
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def convolutional(norm: bool = False) -> nn.Sequential:
    """Convolutions, each behind rounded inputs; batch norms have gains below 0 and what they have learned."""
    torch.manual_seed(0)

    def part(inputs: int, outputs: int, **how: Any) -> list[nn.Module]:
        norms = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, bias=not norm, **how), *norms, nn.ReLU()]

    middle = [*part(16, 32, stride=2, groups=2), nn.MaxPool2d(2)]
    model = nn.Sequential(*part(3, 16, padding=1), *middle, nn.Conv2d(32, 8, 1), nn.Flatten(), nn.Linear(32, 10))
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias)
    model(X)
    return model


def exported(model: nn.Module, x: Tensor, folder: Path, format: str = "onnx") -> Path:
    return export(model, folder, formats=(format,), example_inputs=(x,))[0].path


def by_onnxruntime(path: Path, x: Tensor, *, fused: bool) -> tuple[Tensor, list[str]]:
    """What a file computes, and the operators that run: those of the file, or those that onnxruntime makes of them."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_name("kernels.onnx")), 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    return found, [node.op_type for node in onnx.load(path.with_name("kernels.onnx")).graph.node]


def relative(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected - found.detach()).abs().max() / expected.abs().max())


def integers_of(path: Path) -> dict[str, Tensor]:
    """The codes in a file, by the name of the layer."""
    kept = [i for i in onnx.load(path).graph.initializer if i.name.endswith("codes") and i.name[0].isdigit()]
    return {i.name.split(".")[0]: torch.from_numpy(onnx.numpy_helper.to_array(i).astype("int8")) for i in kept}


@pytest.mark.parametrize("norm", [slow(False), True])
def test_onnxruntime_computes_a_static_network_of_convolutions_in_integers(norm: bool, tmp_path: Path) -> None:
    model = learned(convolutional(norm), (X,), STATIC)
    path = exported(model, X, tmp_path)
    more = torch.cat([X, X.flip(0)])
    with torch.no_grad():
        expected = model(more)
    plain, _ = by_onnxruntime(path, more, fused=False)
    assert relative(expected, plain) < (1e-4 if norm else 1e-5)  # float32's rounding
    integer, kernels = by_onnxruntime(path, more, fused=True)
    assert (
        relative(expected, integer) < 0.01
    )  # biases are rounded to the products' scale, and some codes are the next ones
    assert kernels.count("QLinearConv") == 3
    assert "BatchNormalization" not in kernels
    assert "QGemm" in kernels
    codes = integers_of(path)
    for index, module in enumerate(model):
        if not isinstance(module, nn.Conv2d):
            continue
        expected, found = computed_codes(module), codes[str(index)]
        assert found.shape == module.weight.shape
        norm_behind = model[index + 1]
        turned = isinstance(norm_behind, nn.BatchNorm2d) and norm_behind.weight < 0
        signs = torch.where(torch.as_tensor(turned), -1, 1).view(-1, 1)
        assert torch.equal(found.flatten(1), (expected.values * signs).to(torch.int8))


@pytest.mark.slow
def test_a_network_without_biases_differs_by_the_rounding_of_float32(tmp_path: Path) -> None:
    model = convolutional()
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.bias = None
    learned(model, (X,), STATIC)
    with torch.no_grad():
        expected = model(X)
    found, kernels = by_onnxruntime(exported(model, X, tmp_path), X, fused=True)
    assert relative(expected, found) < 2e-5
    assert "QLinearConv" in kernels


@pytest.mark.slow
def test_a_batch_norm_that_cannot_be_folded_stays(tmp_path: Path) -> None:
    model = convolutional(norm=True)
    with torch.no_grad():
        model[0].weight.copy_(-model[0].weight.abs())  # the largest of most outputs become the lowest code
        model[1].weight.fill_(-1)
    learned(model, (X,), STATIC)
    with torch.no_grad():
        expected = model(X)
    found, kernels = by_onnxruntime(exported(model, X, tmp_path), X, fused=False)
    assert relative(expected, found) < 1e-4
    assert kernels.count("BatchNormalization") == 1


SETTINGS = [Quantization(), Quantization(4)]
EVERY = [(kind, settings) for kind in LAYERS for settings in SETTINGS if kind != "lstm with projections"]
QUICK = [("attention", SETTINGS[0])]


@pytest.mark.parametrize(("kind", "settings"), slowly(EVERY, QUICK), ids=str)
def test_onnxruntime_computes_what_training_computed_of_integer_weights(
    kind: str, settings: Quantization, tmp_path: Path
) -> None:
    model, x = layer(kind)
    learned(model, (x,), settings)
    path = exported(model, x, tmp_path)
    with torch.no_grad():
        expected = model(x)
    for fused in (False, True):
        assert relative(expected, by_onnxruntime(path, x, fused=fused)[0]) < 2e-5
    kept = [p for name, p in model.named_parameters() if "weight" in name]
    integers = {onnx.TensorProto.INT8, onnx.TensorProto.INT4}
    graph = onnx.load(path).graph
    found = [i for i in graph.initializer if i.data_type in integers and len(i.dims) > 1]
    assert sorted(p.numel() for p in kept) == sorted(torch.Size(i.dims).numel() for i in found)
    floats = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert max(torch.Size(i.dims).numel() for i in floats) < min(p.numel() for p in kept)  # scales and biases


BOTH = [(kind, settings) for kind in LAYERS for settings in (STATIC, *SETTINGS)]
QUICK = [("conv2d", STATIC)]


@pytest.mark.parametrize(("kind", "settings"), slowly(BOTH, QUICK), ids=str)
def test_torch_computes_what_training_computed(kind: str, settings: Quantization, tmp_path: Path) -> None:
    model, x = layer(kind)
    learned(model, (x,), settings)
    path = exported(model, x, tmp_path, "pt2e")
    with torch.no_grad():
        expected = model(x)
    found = pt2e.run(path, model, (x,))
    assert relative(expected, found) < 1e-5
    weights = sum(p.numel() for name, p in model.named_parameters() if "weight" in name)
    state = torch.export.load(path).state_dict
    floats = sum(v.numel() for v in state.values() if v.is_floating_point() and v.dim() > 1 and v.numel() > len(v))
    assert not floats
    assert sum(v.numel() for v in state.values() if not v.is_floating_point()) >= weights * settings.bits // 8


@pytest.mark.slow
def test_a_fresh_process_compiles_integer_convolutions(tmp_path: Path) -> None:
    model = learned(convolutional(norm=True), (X,), STATIC)
    torch.save(X, tmp_path / "x")
    arguments = [str(exported(model, X, tmp_path, "pt2e")), str(tmp_path / "x"), str(tmp_path / "y")]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments],
        check=True,
        timeout=280,
        capture_output=True,
        text=True,
        env=environment,
    )
    compiled, loaded, *_ = torch.load(tmp_path / "y", weights_only=True)
    with torch.no_grad():
        assert relative(model(X), loaded) < 1e-5
    assert relative(loaded, compiled) < 1e-3
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["qconv_weight_prepack_matcher_count"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_a_converted_layer_leaves_the_same_file(kind: str, tmp_path: Path) -> None:
    model, x = layer(kind)
    learned(model, (x,), Quantization(4))
    expected = pt2e.run(exported(model, x, tmp_path / "prepared", "pt2e"), model, (x,))
    quantization.convert(model)
    assert torch.equal(pt2e.run(exported(model, x, tmp_path / "converted", "pt2e"), model, (x,)), expected)


def test_what_a_format_does_not_have_is_told(tmp_path: Path) -> None:
    model, x = layer("lstm with projections")
    with pytest.raises(ValueError, match=r"export to onnx: an nn\.LSTM has proj_size=8, expected none"):
        exported(learned(model, (x,), Quantization()), x, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchao_has_no_convolutions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    audio = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=0, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,)
    )
    model, x = transformers.Wav2Vec2Model(audio), torch.randn(2, 64)
    learned(model, (x,), Quantization(layers=("feature_extractor.*",)))
    with pytest.raises(ValueError, match=r"export to torchao: 'feature.* is a Conv1d, for which torchao has no"):
        exported(model, x, tmp_path, "torchao")


@pytest.mark.parametrize("kind", slowly(LAYERS, ["conv2d"]))
def test_a_converted_model_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    model, x = layer(kind)
    quantization.prepare(model, Quantization())
    quantization.convert(model)
    with torch.no_grad():
        expected = model(x)
        for each in export(model, tmp_path, formats=("safetensors", "pt2e"), example_inputs=(x,)):
            assert each.difference < 1e-5
        assert torch.equal(model(x), expected)
