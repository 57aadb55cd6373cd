"""pt2e: what a fresh process loads computes what training computed, and the compiler makes integer kernels of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import SETTINGS, learned, mlp, named, text_model
from tiers import slow, slowly
from torch import Tensor, nn

from commpress.model import export
from commpress.model.export import pt2e
from commpress.model.quantization import Quantization

FRESH = """
import json, sys
import torch
import torchao.quantization.pt2e
import torch._dynamo.utils, torch._inductor.config
torch._inductor.config.freezing = True
torch._inductor.config.compile_threads = 1
loaded = torch.export.load(sys.argv[1]).module()
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    compiled = torch.compile(loaded, dynamic=True)
    results = [compiled(x), loaded(x), compiled(torch.cat([x, x])), loaded(torch.cat([x, x]))]
torch.save(results, sys.argv[3])
print(json.dumps(torch._dynamo.utils.counters["inductor"]))
assert "commpress" not in sys.modules
"""


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Any:
    return export(model, folder, formats=("pt2e",), example_inputs=inputs)[0]


@pytest.mark.parametrize("settings", slowly(SETTINGS, [SETTINGS[1], SETTINGS[8]]), ids=named)
@pytest.mark.parametrize("of", [mlp, slow(text_model)])
def test_the_file_computes_what_training_computed(of: Any, settings: Quantization, tmp_path: Path) -> None:
    model, inputs = of()
    learned(model, inputs, settings)
    there = exported(model, inputs, tmp_path)
    more = torch.cat([inputs[0], inputs[0].flip(0)])
    with torch.no_grad():
        expected, found = model(more), pt2e.run(there.path, model, (more,))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_codes_of_an_odd_width_are_packed_by_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5))
    assert exported(learned(model, (x,), Quantization(4)), (x,), tmp_path).difference < 1e-6


@pytest.mark.parametrize(("bits", "group", "times"), [(8, None, 3.7), slow(4, None, 7.0), (4, 32, 6.4)])
def test_the_file_is_as_small_as_its_integers(bits: Any, group: Any, times: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 768))
    inputs = (torch.randn(4, 768),)
    dense = exported(model, inputs, tmp_path / "dense")
    small = exported(learned(model, inputs, Quantization(bits, group)), inputs, tmp_path / "small")
    assert dense.bytes > times * small.bytes


@pytest.mark.slow
@pytest.mark.parametrize("of", [mlp, text_model])
def test_a_fresh_process_compiles_integer_kernels(of: Any, tmp_path: Path) -> None:
    model, inputs = of()
    learned(model, inputs, Quantization(activations="static"))
    there = exported(model, inputs, tmp_path)
    torch.save(inputs[0], tmp_path / "x")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(there.path), str(tmp_path / "x"), str(tmp_path / "y")],
        check=True,
        timeout=280,
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    counted = json.loads(done.stdout.splitlines()[-1])
    compiled, loaded, *more = torch.load(tmp_path / "y", weights_only=True)
    with torch.no_grad():
        expected = model(*inputs)
    scale = expected.abs().max()
    assert (loaded - expected).abs().max() < 1e-5 * scale
    assert (compiled - loaded).abs().max() < 1e-5 * scale
    assert (more[0] - more[1]).abs().max() < 1e-5 * scale
    assert len(more[0]) == 2 * len(expected)
    assert counted["qlinear_weight_prepack_matcher_count"] >= 3
