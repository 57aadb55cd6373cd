"""Transformers' Conv1D is quantised as the Linear that it is: a scale an output, codes along the inputs, stored and loaded."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from commpress.model import Recipe, Scheduler, quantization, stored
from commpress.model.quantization import Quantization, computed_codes, enable, prepare, quantize

pytest.importorskip("transformers")

SETTINGS = [Quantization(), Quantization(bits=4, group=8), Quantization(bits=4), Quantization(activations="dynamic")]
X = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Conv1D layers, and Linear layers with the same weights."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = nn.Sequential(Conv1D(24, 16), nn.Tanh(), Conv1D(8, 24))
    same = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    with torch.no_grad():
        for index in (0, 2):
            same[index].weight.copy_(torch.randn(same[index].weight.shape))
            conv[index].weight.copy_(same[index].weight.t())
            conv[index].bias.copy_(same[index].bias)
    return conv, same


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, use_cache=False))


@pytest.mark.parametrize("settings", SETTINGS)
def test_codes_outputs_and_gradients_are_those_of_a_linear(settings: Quantization) -> None:
    conv, same = pair()
    before = conv(X)
    for model in (conv, same):
        assert prepare(model, settings) == ["0", "2"]
    assert torch.equal(conv(X), before)  # off: the same bits
    for model in (conv, same):
        enable(model)
        mse_loss(model(X), torch.ones(5, 3, 8)).backward()
    for index in (0, 2):
        codes = computed_codes(conv[index])
        expected = quantize(same[index].weight, settings.bits, settings.group)
        assert torch.equal(codes.values, expected.values)
        assert torch.equal(codes.scale, expected.scale)
        assert torch.equal(codes.dequantized(), expected.dequantized().t())
        torch.testing.assert_close(conv[index].weight.grad, same[index].weight.grad.t(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(conv(X), same(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS[:3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_file_holds_what_training_computed_with(settings: Quantization, masked: bool, tmp_path: Path) -> None:
    conv, _ = pair()
    masks = {}
    if masked:
        masks = {name: torch.rand(p.shape) > 0.8 for name, p in conv.named_parameters() if p.dim() == 2}
        with torch.no_grad():
            for name, mask in masks.items():
                conv.get_parameter(name).mul_(mask)
    plain = copy.deepcopy(conv)
    prepare(conv, settings)
    enable(conv)
    stored.save(tmp_path / "model.safetensors", conv, masks=masks)
    read = stored.load(tmp_path / "model.safetensors")
    assert all(torch.equal(mask, masks[name]) for name, mask in read.masks.items())
    assert bool(read.masks) == masked
    plain.load_state_dict(read.state_dict())
    assert torch.equal(plain(X), conv(X))
    read.write(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_default_quantises_the_blocks_of_gpt2(tmp_path: Path) -> None:
    model, ids = gpt2(), torch.randint(0, 64, (2, 8))
    recipe = Recipe.of({"prune": [{"start": 1, "amount": 0.8}], "quantize": [{"start": 2, "bits": 8}]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = Scheduler(recipe, model, optimizer)
    blocks = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert set(blocks) < {name for name, *_ in quantization.prepared(model)}
    assert [f"{name}.weight" for name in blocks] == scheduler._pruner.names_of[0]
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    stored.save(tmp_path / "model.safetensors", model, masks=scheduler.masks.of)
    fresh = gpt2().eval()
    fresh.load_state_dict(stored.load(tmp_path / "model.safetensors").state_dict())
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
    assert scheduler.masks.sparsity == pytest.approx(0.8, abs=1e-3)


def test_a_prepared_conv1d_pickles_copies_and_compiles() -> None:
    conv, _ = pair()
    prepare(conv, Quantization(bits=4, activations="dynamic"))
    enable(conv)
    expected = conv(X)
    assert torch.equal(copy.deepcopy(conv)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(conv))(X), expected)
    assert torch.equal(torch.compile(conv, backend="aot_eager")(X), expected)


def test_what_cannot_be_is_told() -> None:
    conv, _ = pair()
    with pytest.raises(ValueError, match=r"'0' has rows of 16 weights, which the group does not divide"):
        prepare(conv, Quantization(bits=4, group=24))
    prepare(conv, Quantization())
    with pytest.raises(ValueError, match=r"convert: '0' is a Conv1D, for which torchao has no kernel"):
        quantization.convert(conv)
