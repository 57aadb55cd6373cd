"""Models get smaller where it matters least, go on computing what the rest computed, and come back from a checkpoint."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import outcome, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import scaled_dot_product_attention

from commpress.launch.model import GPT, Shape
from commpress.model.structured import Heads, Shapes, each_alone, reshape, shapes_of, shrink

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(Shape(layers=2, width=32, heads=4, context=16))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)  # so that every branch counts
    return model


def bert(attention: str = "sdpa", kind: str = "BertModel") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=64, initializer_range=0.2, attn_implementation=attention, **sizes)
    model: nn.Module = getattr(transformers, kind)(config)
    return model.eval()


def distilbert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    model: nn.Module = transformers.DistilBertModel(config)
    return model.eval()


class ConvNet(nn.Module):
    """A residual path, a depthwise convolution, and batch norms that have seen something."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3, self.norm3 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.out = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8 * 36, 10)
        self(torch.randn(32, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(x)).relu()
        x = x + self.norm3(self.conv3(y)).relu()
        logits: Tensor = self.out(self.depthwise(x).relu().flatten(1))
        return logits


class Attention(nn.Module):
    """Attention with its own names: `fused` is how q, k and v lie in one layer; None for three."""

    def __init__(self, fused: str | None = None, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.fused = 4, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused == "by head":
            q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        elif self.fused:
            q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        else:
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def require_training(model: nn.Module, output: Tensor) -> None:
    output.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    assert [name for name in missing if not name.startswith("pooler")] == []


def test_a_gpt_loses_heads_and_units_and_keeps_its_width() -> None:
    model = gpt()
    shapes = shrink(model, TOKENS, 0.25)
    for block in model.blocks:
        assert (block.attention.heads, block.attention.qkv.weight.shape) == (3, (72, 32))
        assert (block.attention.out.weight.shape, block.attention.out.in_features) == ((32, 24), 24)
        assert (block.up.weight.shape, block.up.bias.shape, block.down.weight.shape) == ((96, 32), (96,), (32, 96))
    assert model.tokens.weight.shape == (256, 32)
    assert shapes == shapes_of(model)
    assert shapes.sizes["blocks.1.attention"] == {"heads": 3}
    assert shapes.tensors["blocks.1.attention.qkv.weight"] == [72, 32]
    require_training(model, model(TOKENS))


def test_shares_by_width_are_of_layers_and_what_is_not_named_stays() -> None:
    model = gpt()
    shrink(model, TOKENS, {"blocks.0.*": 0.5, "blocks.*.up": 0.25})
    first, second = model.blocks
    assert (first.attention.heads, first.attention.qkv.weight.shape, first.up.weight.shape) == (2, (48, 32), (64, 32))
    assert (second.attention.heads, second.up.weight.shape, second.down.in_features) == (4, (96, 32), 96)
    require_training(model, model(TOKENS))
    net = ConvNet()  # conv3 is added to conv1: the width is that of the first of them
    shrink(net, torch.randn(2, 1, 8, 8), {"conv1": 0.5})
    assert (net.conv1.out_channels, net.conv3.out_channels, net.conv2.out_channels) == (4, 4, 12)


def test_shares_of_no_width_are_refused_with_the_name() -> None:
    model = gpt()
    with pytest.raises(
        ValueError, match=r"shrink: 'blocks.0.down' is no layer whose outputs can be removed, known: .*up"
    ):
        shrink(model, TOKENS, {"blocks.0.up": 0.5, "blocks.0.down": 0.5})
    with pytest.raises(ValueError, match=r"shrink: the amount of 'blocks.0.up' must be in \[0, 1\), got 1.5"):
        shrink(model, TOKENS, {"blocks.0.up": 1.5})
    with pytest.raises(
        ValueError, match=r"shrink\(\{'blocks.0.up': 0.001\}\): the model has no width of which as much"
    ):
        shrink(model, TOKENS, {"blocks.0.up": 0.001})
    assert model.blocks[0].up.weight.shape == (128, 32)


def test_a_share_of_one_width_is_measured_as_if_it_were_gone() -> None:
    model, x = ConvNet().eval(), torch.randn(2, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def mean(small: nn.Module) -> float:
        return float(small(x).detach().square().mean())

    found = each_alone(model, x, (0.05, 0.25, 0.5), mean)
    assert {name: [*shares] for name, shares in found.items()} == {"conv1": [0.25, 0.5], "conv2": [0.05, 0.25, 0.5]}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, shares in found.items():
        for share, (measured, saved) in shares.items():
            shrink(small := copy.deepcopy(model), x, {name: share})
            assert measured == pytest.approx(mean(small), rel=1e-4)
            assert saved == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bert_loses_heads_and_units_and_keeps_its_width(attention: str) -> None:
    model = bert(attention)
    shrink(model, {"input_ids": TOKENS}, 0.5)
    for layer in model.encoder.layer:
        inner = layer.attention.self
        assert (inner.num_attention_heads, inner.all_head_size, inner.attention_head_size) == (2, 16, 8)
        assert {f.weight.shape for f in (inner.query, inner.key, inner.value)} == {(16, 32)}
        assert layer.attention.output.dense.weight.shape == (32, 16)
        assert (layer.intermediate.dense.weight.shape, layer.output.dense.weight.shape) == ((32, 32), (32, 32))
    assert model.pooler.dense.weight.shape == (32, 32)
    require_training(model, model(input_ids=TOKENS).last_hidden_state)


def test_a_distilbert_loses_heads_and_units() -> None:
    model = distilbert()
    shrink(model, {"input_ids": TOKENS}, 0.25)
    for layer in model.transformer.layer:
        assert (layer.attention.n_heads, layer.attention.out_lin.weight.shape) == (3, (32, 24))
        assert layer.ffn.lin1.weight.shape == (48, 32)
    require_training(model, model(input_ids=TOKENS).last_hidden_state)


def test_tied_weights_stay_one() -> None:
    model = bert(kind="BertForMaskedLM")
    shrink(model, {"input_ids": TOKENS}, 0.25)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 48
    assert model(input_ids=TOKENS).logits.shape == (2, 12, 64)


def test_layers_that_share_a_weight_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())))
    model[2].weight = model[0].weight
    shrink(model, torch.randn(2, 16), 0.5)
    assert model[2].weight is model[0].weight
    assert [layer.out_features for layer in model[::2]] == [16, 16, 8, 16]


def test_a_conv_net_loses_channels() -> None:
    model = ConvNet()
    shrink(model, torch.randn(2, 1, 8, 8), 0.25)
    assert [m.weight.shape[:2] for m in (model.conv1, model.conv2, model.conv3)] == [(6, 1), (9, 6), (6, 9)]
    assert (model.norm2.num_features, model.norm2.running_var.shape) == (9, (9,))
    assert (model.depthwise.groups, model.depthwise.weight.shape) == (6, (6, 1, 3, 3))
    assert model.out.weight.shape == (10, 6 * 36)
    assert model.training
    require_training(model, model(torch.randn(4, 1, 8, 8)))


def test_what_does_nothing_goes_and_the_rest_computes_the_same() -> None:
    model = gpt()
    dead = {0: 2, 1: 0}
    with torch.no_grad():
        for index, head in dead.items():
            attention, block = model.blocks[index].attention, model.blocks[index]
            at = slice(8 * head, 8 * head + 8)
            attention.qkv.weight.view(3, 32, 32)[:, at] = 0
            attention.out.weight[:, at] = 0
            block.up.weight[5:37], block.down.weight[:, 5:37] = 0, 0
    expected = model(TOKENS)
    shrink(model, TOKENS, 0.25)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_a_dead_channel_goes_with_its_batch_norm() -> None:
    model, x = ConvNet(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.conv2.weight[[0, 4, 11]], model.conv2.bias[[0, 4, 11]] = 0, 0
        model.norm2.weight[[0, 4, 11]], model.norm2.bias[[0, 4, 11]] = 0, 0
        model.conv3.weight[:, [0, 4, 11]] = 0
    left = [i for i in range(12) if i not in (0, 4, 11)]
    filters, variance = model.conv2.weight[left].clone(), model.norm2.running_var[left].clone()
    expected = model.eval()(x)
    shrink(model, x, 0.25, keep=["conv1", "depthwise", "out"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.conv2.weight, filters)
    assert torch.equal(model.norm2.running_var, variance)


def test_taylor_looks_at_gradients() -> None:
    model = gpt()
    model(TOKENS)[..., :3].sum().backward()
    for block in model.blocks:
        block.up.weight.grad[10:42] = 0
        block.down.weight.grad[:, 10:42] = 0
    kept = model.blocks[0].up.weight[[*range(10), *range(42, 128)]].clone()
    shrink(model, TOKENS, 0.25, importance="taylor")
    assert torch.equal(model.blocks[0].up.weight, kept)
    assert model.blocks[0].up.weight.grad is None
    with pytest.raises(ValueError, match=r"importance 'taylor': 'blocks.0.attention.qkv.weight' has no gradient"):
        shrink(model, TOKENS, 0.25, importance="taylor")


def test_what_is_frozen_stays_frozen() -> None:
    model = gpt()
    model.blocks[0].up.weight.requires_grad_(False)
    shrink(model, TOKENS, 0.25)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["blocks.0.up.weight"]
    frozen = gpt().requires_grad_(False)
    shrink(frozen, TOKENS, 0.25)
    assert frozen.blocks[0].up.out_features == 96
    assert not any(p.requires_grad for p in frozen.parameters())


def test_once_more_and_down_to_one() -> None:
    model = gpt()
    for amount, heads, units in ((0.25, 3, 96), (0.4, 2, 58), (0.99, 1, 1)):
        shrink(model, TOKENS, amount)
        assert (model.blocks[0].attention.heads, model.blocks[0].up.out_features) == (heads, units)
    require_training(model, model(TOKENS))


def test_nothing_of_what_is_kept_goes() -> None:
    model = gpt()
    before = model.blocks[0].attention.qkv.weight
    shrink(model, TOKENS, 0.5, keep=["blocks.0", "blocks.1.down"])
    assert [b.attention.heads for b in model.blocks] == [4, 2]
    assert [b.up.out_features for b in model.blocks] == [128, 128]
    assert model.blocks[0].attention.qkv.weight is before
    with pytest.raises(
        ValueError, match=r"keep 'encoder.\*': no module of that name, known: tokens, positions, blocks"
    ):
        shrink(model, TOKENS, 0.5, keep=["encoder.*"])


def test_attention_by_other_names_is_described() -> None:
    model = Attention()
    shrink(model, torch.randn(2, 5, 32), 0.5, heads=[Heads("heads", ("q", "k", "v"))])
    assert (model.heads, model.k.weight.shape, model.out.weight.shape) == (2, (16, 32), (32, 16))


def test_attention_in_thirds_loses_heads() -> None:
    model = Attention("in thirds")
    shrink(model, torch.randn(2, 5, 32), 0.25)
    assert (model.heads, model.qkv.weight.shape, model.out.weight.shape) == (3, (72, 32), (32, 24))


class Gated(nn.Module):
    """An MLP of which both halves come from one layer; with rotary attention before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * torch.ones(8)

        def turned(y: Tensor) -> Tensor:
            return y * angle.cos() + torch.cat([-y[..., 4:], y[..., :4]], -1) * angle.sin()

        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        y: Tensor = x + self.down(gate.sigmoid() * value)
        return y


@pytest.mark.timeout(30)
def test_a_gated_mlp_loses_pairs_and_rotary_attention_stays() -> None:
    model = Gated()
    shrink(model, torch.randn(2, 5, 16), 0.25)
    assert (model.up.weight.shape, model.down.weight.shape) == ((48, 16), (16, 24))
    assert model.q.weight.shape == model.v.weight.shape == (16, 16)


class Cached(Gated):
    """Outputs as those of a language model with a cache."""

    def forward(self, x: Tensor) -> dict[str, object]:  # type: ignore[override]
        return {"logits": super().forward(x), "cache": object(), "inputs": (x, None)}


def test_outputs_may_hold_more_than_tensors() -> None:
    model = Cached()
    shrink(model, {"x": torch.randn(2, 5, 16)}, 0.25)
    assert model.up.weight.shape == (48, 16)


@pytest.mark.parametrize("fused", [None, "by head"])
def test_attention_that_is_not_understood_is_refused_and_left_alone(fused: str | None) -> None:
    model = Attention(fused)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"shrink: without 8 of '(q|qkv)' the output is off by .* heads=\[Heads\(...\)\]"
    ) as e:
        shrink(model, torch.randn(2, 5, 32), 0.25)
    assert "keep=[...]" in str(e.value)
    assert model.heads == 4
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_other_errors_say_what_is_wrong() -> None:
    model = gpt()
    with pytest.raises(ValueError, match=r"the amount must be in \[0, 1\), got 1"):
        shrink(model, TOKENS, 1)
    with pytest.raises(ValueError, match="importance 'l1': expected one of magnitude, taylor"):
        shrink(model, TOKENS, 0.5, importance="l1")
    with pytest.raises(ValueError, match=r"shrink\(0.5\): the model has no width of which as much can be removed"):
        shrink(nn.Sequential(nn.Embedding(64, 8), nn.LayerNorm(8), nn.Linear(8, 4)), TOKENS, 0.5)
    model.blocks[1].attention.heads = 5
    with pytest.raises(ValueError, match=r"'blocks.1.attention' has 5 heads, and qkv have \[96\] outputs: .* of 15"):
        shrink(model, TOKENS, 0.5)


def fully_sharded() -> str:
    model = gpt()
    fully_shard(model)
    return outcome(lambda: shrink(model, TOKENS, 0.5))


def test_a_sharded_model_is_refused() -> None:
    (message,) = run(1, fully_sharded)
    assert message == "ValueError: shrink: the parameters are sharded, call it before fully_shard"


def test_without_torch_pruning_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"shrink needs torch-pruning: pip install 'commpress\[model\]'"):
        shrink(gpt(), TOKENS, 0.5)


def test_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match=r"shrink: the model cannot be followed, RuntimeError: .*shape"):
        shrink(ConvNet(), torch.randn(2, 1, 9, 9), 0.5)


def test_amount_0_changes_nothing() -> None:
    model = gpt()
    before = shapes_of(model), dict(model.named_parameters())
    assert shrink(model, TOKENS, 0) == before[0]
    assert all(p is before[1][name] for name, p in model.named_parameters())


def test_sizes_of_another_model_are_refused() -> None:
    model = gpt()
    shapes = shrink(gpt(), TOKENS, 0.25)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"of another model, only one of the two has 'blocks.1.attention'"):
        reshape(GPT(Shape(layers=1, width=32, heads=4, context=16)), shapes)
    narrow = GPT(Shape(layers=2, width=16, heads=4, context=16))
    with pytest.raises(ValueError, match=r"'tokens.weight' has shape \(256, 16\), it cannot become \(256, 32\)"):
        reshape(narrow, shapes)
    assert narrow.blocks[0].attention.heads == 4
    reshape(model, shapes)
    reshape(model, shapes)  # again is no harm
    assert shapes_of(model) == shapes


def outputs_of_loaded(folder: str) -> dict[str, Tensor]:
    """In a fresh process: models as they are made, made smaller and loaded as the files say."""
    saved = torch.load(f"{folder}/model.pt", weights_only=True)
    models = {"gpt": gpt(seed=1), "conv": ConvNet(), "bert": bert()}
    outputs = {}
    for name, model in models.items():
        reshape(model, Shapes(**json.loads(Path(f"{folder}/{name}.json").read_text())))
        model.load_state_dict(saved[name])
        outputs[name] = output_of(model.eval())
    return outputs


def output_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(model, ConvNet):
            return model(torch.ones(2, 1, 8, 8).cumsum(-1) / 8)  # type: ignore[no-any-return]
        output = model(TOKENS)
        return output if isinstance(output, Tensor) else output.last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_fresh_process_loads_the_smaller_models(tmp_path: Path) -> None:
    models: dict[str, nn.Module] = {"gpt": gpt(), "conv": ConvNet(), "bert": bert()}
    inputs = {"gpt": TOKENS, "conv": torch.randn(2, 1, 8, 8), "bert": {"input_ids": TOKENS}}
    for name, model in models.items():
        shapes = shrink(model, inputs[name], 0.4)
        (tmp_path / f"{name}.json").write_text(json.dumps(dataclasses.asdict(shapes)))
        assert Shapes(**json.loads((tmp_path / f"{name}.json").read_text())) == shapes
    torch.save({name: model.state_dict() for name, model in models.items()}, tmp_path / "model.pt")
    (outputs,) = run(1, outputs_of_loaded, str(tmp_path), fresh=True)
    for name, model in models.items():
        assert torch.equal(outputs[name], output_of(model.eval())), name
