"""Integer programs: NumPy computes them by integers alone, a layer's codes are the nearest, and damage is refused."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import learned
from torch import Tensor, nn

from commpress.model import export
from commpress.model.export import integer_run
from commpress.model.quantization import Quantization

STATIC = Quantization(activations="static")
FRESH = """
import sys
import numpy, integer_run
program = integer_run.load("integer.safetensors")
codes = program.rounded(numpy.load("x.npy"))
assert codes.dtype == numpy.int8
numpy.save("y.npy", program.run(codes))
assert not {"torch", "commpress", "safetensors"} & set(sys.modules)
"""


def network() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layers = nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 48, bias=False), nn.ReLU6(), nn.Linear(48, 10)
    return nn.Sequential(*layers), (torch.randn(64, 32),)


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, settings: Quantization = STATIC) -> Any:
    return export(learned(model, inputs, settings), folder, formats=("integer",), example_inputs=inputs)[0]


def test_a_fresh_process_with_numpy_alone_computes_what_training_computed(tmp_path: Path) -> None:
    model, (x,) = network()
    there = exported(model, (x,), tmp_path)
    more = torch.cat([x, 5 * torch.randn(500, 32)])  # some are outside of the range
    np.save(tmp_path / "x.npy", more.numpy())
    shutil.copy(integer_run.__file__, tmp_path)
    subprocess.run([sys.executable, "-c", FRESH], check=True, timeout=100, cwd=tmp_path)
    outputs = np.load(tmp_path / "y.npy")
    assert outputs.dtype == np.int32
    with torch.no_grad():
        expected = model(more)
    scale = integer_run.load(there.path).output_scale
    off = (torch.from_numpy(outputs).double() * scale - expected).abs() / expected.abs().max()
    assert off.max() < 0.01  # codes on an edge took the next one
    assert off.mean() < 0.0005
    assert there.difference < 0.01 * expected.abs().max()


def test_codes_of_a_layer_are_the_nearest_but_for_a_rounded_bias(tmp_path: Path) -> None:
    model, (x,) = network()
    there = exported(model, (x,), tmp_path)
    program = integer_run.load(there.path)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    ranges = [m.activation_fake_quantizer.scale_and_zero() for m in layers] + [(program.output_scale, 0)]
    codes, at = program.rounded(x.numpy()), 0
    for step in program.steps:
        before, codes = codes, integer_run.OPERATORS[step["op"]](codes, step, program.tensors)
        assert codes.dtype.kind == "i"
        if step["op"] == "linear":
            layer, (s, z), (to, zero) = layers[at], ranges[at], ranges[at + 1]
            w = layer.weight_fake_quantizer(layer.weight).detach().double()
            exact = (torch.from_numpy(before).double() - z) * s @ w.T + (
                0 if layer.bias is None else layer.bias.double()
            )
            unit = (w.abs().amax(1) / 126.5 * s / to).clamp(max=1)
            exact = (exact / to + zero).clamp(*integer_run.LIMITS[step["dtype"]])
            assert bool(((torch.from_numpy(codes).double() - exact).abs() <= 0.501 + 0.5 * unit).all())
            at += 1
    assert at == len(layers)


def test_pooling_and_flattening_move_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 11)
    pool = nn.MaxPool2d(3, 2, padding=1)
    model = nn.Sequential(nn.Hardtanh(-0.5, 1.5), pool, nn.Flatten(), nn.Linear(90, 7), nn.ReLU())
    there = exported(model, (x,), tmp_path)
    program = integer_run.load(there.path)
    assert there.difference < 1.01 * program.output_scale  # a step: of the bias a half, of rounding a half
    outputs = program.run(program.rounded(x.numpy()))
    assert outputs.shape == (8, 7)
    assert outputs.min() == 0


def test_a_row_that_was_pruned_keeps_its_bias(tmp_path: Path) -> None:
    model, (x,) = network()
    with torch.no_grad():
        for layer in (model[0], model[5]):
            layer.weight[3] = 0
            layer.bias[3] = 1.5
    assert exported(model, (x,), tmp_path).difference < 0.01


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            nn.Sequential(nn.Linear(32, 8), nn.Softmax(-1)),
            STATIC,
            "softmax of '1' has no integer form, expected a chain",
        ),
        (nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8)), STATIC, "layer_norm of '1' has no integer form"),
        (nn.Sequential(nn.Linear(32, 8), nn.GELU()), STATIC, "gelu of '1' has no integer form"),
        (nn.Sequential(nn.Linear(32, 8)), Quantization(), "Linear of '0' has no integer form, .* static inputs"),
        (nn.Sequential(nn.Linear(32, 8)), Quantization(4, None, "static"), "Linear of '0' has no integer form"),
        (nn.Sequential(nn.Linear(32, 8)), Quantization(8, 8, "static"), "Linear of '0' has no integer form"),
        (Twice(), STATIC, "the input goes to Linear of 'inner' and add, expected a chain"),
    ],
    ids=["softmax", "norm", "gelu", "floats", "4 bits", "groups", "sum"],
)
def test_the_first_operator_without_an_integer_form_is_named(
    model: nn.Module, settings: Quantization, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"export to integer: {message}"):
        exported(model, (torch.randn(4, 32),), tmp_path, settings)
    assert not list(tmp_path.iterdir())


def test_sums_that_may_leave_32_bits_are_refused(tmp_path: Path) -> None:
    model, (x,) = network()
    with torch.no_grad():
        model[0].bias[0] = 1e6
    with pytest.raises(ValueError, match=r"the sums of '0' may reach .*, expected at most 2\^31 - 1"):
        exported(model, (x,), tmp_path)


def test_damage_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    model, (x,) = network()
    path = exported(model, (x,), tmp_path).path
    whole, broken = path.read_bytes(), tmp_path / "broken"
    random = np.random.default_rng(0)
    for place in (0, 7, 8, 9, *random.integers(10, len(whole), 300)):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(random.integers(8)))]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="broken: "):
            integer_run.load(broken)
    for size in (0, 5, 100, len(whole) - 1):
        broken.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="broken: "):
            integer_run.load(broken)


def test_floats_are_no_inputs(tmp_path: Path) -> None:
    model, (x,) = network()
    program = integer_run.load(exported(model, (x,), tmp_path).path)
    with pytest.raises(TypeError, match="expected int8 codes, got float32; `rounded` makes them"):
        program.run(x.numpy())


def test_convolutions_pad_with_the_code_of_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 12, 10) + 0.7  # the code of 0 is none of the extremes
    one = nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), nn.ReLU())
    there = exported(one, (x,), tmp_path / "one")
    assert there.difference < 1.01 * integer_run.load(there.path).output_scale
    layers = nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 5))
    there = exported(model, (x,), tmp_path / "deep")
    with torch.no_grad():
        assert there.difference < 0.01 * model(x).abs().max()


def test_a_convolution_without_an_integer_form_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="'0' has no integer form, expected a chain"):
        exported(model, (torch.randn(4, 4, 8, 8),), tmp_path)
