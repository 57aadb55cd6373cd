"""The folder for Transformers: what `from_pretrained` gives, without commpress, computes what training computed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import learned, mlp
from tiers import slow
from torch import Tensor

from commpress.model import export
from commpress.model.quantization import Quantization

transformers = pytest.importorskip("transformers")

INDEX = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
BLOCKS = ("model.layers.*",)
FRESH = """
import sys
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
weight = model.model.layers[0].mlp.up_proj.weight
assert type(weight).__name__ == "IntxUnpackedToInt8Tensor", type(weight)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
assert "commpress" not in sys.modules
"""


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=128, num_key_value_heads=4, tie_word_embeddings=tied, **sizes)
    return transformers.LlamaForCausalLM(config)


def exported(model: Any, folder: Path) -> Any:
    return export(model, folder, formats=("torchao",), example_inputs=(INDEX,))[0]


@pytest.mark.parametrize(
    "settings",
    [
        Quantization(layers=BLOCKS),
        Quantization(4, 32, "dynamic", layers=BLOCKS),
        Quantization(4, 32),
        slow(Quantization(8, None, "dynamic", layers=BLOCKS)),
    ],
    ids=["int8", "int4 dynamic", "embeddings too", "int8 dynamic"],
)
def test_transformers_loads_what_training_computed(settings: Quantization, tmp_path: Path) -> None:
    model = learned(llama(), (INDEX,), settings)
    dense = sum(4 * p.numel() for p in model.parameters())
    there = exported(model, tmp_path)
    assert there.difference == 0
    assert there.bytes == sum(each.stat().st_size for each in (tmp_path / "transformers").iterdir())
    assert there.bytes < (0.55 if settings.layers == BLOCKS else 0.4) * dense
    assert json.loads((tmp_path / "transformers" / "config.json").read_text())["quantization_config"]
    assert isinstance(model.model.layers[0].mlp.up_proj.quantization, Quantization)  # the model goes on


@pytest.mark.slow
def test_a_fresh_process_loads_it_without_us(tmp_path: Path) -> None:
    model = learned(llama(), (INDEX,), Quantization(layers=BLOCKS))
    there = exported(model, tmp_path)
    torch.save(INDEX, tmp_path / "x")
    arguments = [str(there.path), str(tmp_path / "x"), str(tmp_path / "y")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, timeout=200)
    found: Tensor = torch.load(tmp_path / "y", weights_only=True)
    with torch.no_grad():
        assert torch.equal(found, model(INDEX).logits)


def test_what_has_no_place_in_it_is_refused(tmp_path: Path) -> None:
    static = learned(llama(), (INDEX,), Quantization(activations="static", layers=BLOCKS))
    tied = learned(llama(tied=True), (INDEX,), Quantization())
    for model, message in (
        (static, "'model.layers.0.self_attn.q_proj' has static inputs, expected dynamic"),
        (tied, "'model.embed_tokens' and 'lm_head' share a weight"),
        (llama(), "nothing is quantised"),
    ):
        with pytest.raises(ValueError, match=f"export to torchao: {message}"):
            exported(model, tmp_path)
    other, inputs = mlp()
    with pytest.raises(ValueError, match="Sequential is not a Transformers model"):
        export(other, tmp_path, formats=("torchao",), example_inputs=inputs)
