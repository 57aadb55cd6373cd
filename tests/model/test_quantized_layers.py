"""Convolutions, attention and recurrent layers compute with the codes that the file has, and gradients go straight through."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import learned
from layers import CONVOLUTIONS, LAYERS, everything, layer
from ranks import run
from tiers import slowly
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import batch, same, sgd

import commpress
from commpress.model import Recipe, Scheduler, quantization, ranges, stored
from commpress.model.codes import fake_quantize
from commpress.model.held import whole
from commpress.model.quantization import Quantization, codes_of, prepared, quantized_weights

LIBRARIES = ("torchao.quantization",)
SETTINGS = [Quantization(), Quantization(4), Quantization(4, 4)]
EVERY = [(kind, settings) for kind in LAYERS for settings in SETTINGS]
QUICK = [
    (kind, settings) for kind, settings in EVERY if kind in ("conv2d", "attention", "lstm") or settings is SETTINGS[0]
]
GROUPS = {"conv1d": 3, "conv2d": 9, "conv3d": 6}
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")


def fitting(settings: Quantization, kind: str) -> Quantization:
    """These settings, with groups that divide the rows of the layer."""
    group = settings.group and GROUPS.get(kind, settings.group)
    return Quantization(settings.bits, group, settings.activations)


def quantized(kind: str, settings: Quantization) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with its quantisers on, one whose weights are the codes' values, and an input."""
    model, x = layer(kind)
    plain = copy.deepcopy(model)
    quantization.prepare(model, fitting(settings, kind))
    quantization.enable(model)
    with torch.no_grad():
        for name, module, its, _ in quantized_weights(model):
            codes = codes_of(module, its)
            assert codes is not None
            plain.get_parameter(f"{name}.{its}").copy_(codes.dequantized())
    return model, plain, x


def named(value: Any) -> str:
    return f"int{value.bits}-{value.group or 'row'}" if isinstance(value, Quantization) else str(value)


@pytest.mark.parametrize(("kind", "settings"), slowly(EVERY, QUICK), ids=named)
def test_outputs_are_those_of_the_codes_and_gradients_go_straight_through(kind: str, settings: Quantization) -> None:
    model, plain, x = quantized(kind, settings)
    for each in (model, plain):
        each(x).square().sum().backward()
    assert torch.equal(model(x), plain(x))
    clamped = 0
    leaves = {f"{name}.{its}": module for name, module, its, _ in quantized_weights(model)}
    for name, p in model.named_parameters():
        expected = plain.get_parameter(name).grad
        if name in leaves:
            rows = p.detach().flatten(1)
            inside = fake_quantize(rows, settings.bits, fitting(settings, kind).group or rows.shape[1])[1].view(p.shape)
            expected = expected * inside
            clamped += int((~inside).sum())
        assert torch.equal(p.grad, expected)
    assert clamped


@pytest.mark.parametrize("kind", LAYERS)
def test_a_prepared_layer_is_the_same_until_it_is_enabled(kind: str) -> None:
    model, x = layer(kind)
    modules, parameters, state = dict(model.named_modules()), dict(model.named_parameters()), model.state_dict().keys()
    expected = model(x)
    quantization.prepare(model, Quantization())
    assert torch.equal(model(x), expected)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert model.state_dict().keys() == state
    quantization.enable(model)
    assert not torch.equal(model(x), expected)
    quantization.enable(model, False)
    assert torch.equal(model(x), expected)
    with torch.no_grad():  # torch's fused paths too
        assert torch.equal(model.eval()(x), layer(kind)[0].eval()(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_reads_no_weights_past_the_quantiser(kind: str) -> None:
    model, _, x = quantized(kind, Quantization(4))
    with torch.no_grad():
        trained = model(x)
        model.eval()
        assert torch.equal(model(x), trained)
        assert not torch.allclose(layer(kind)[0].eval()(x), trained, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "settings"), slowly(EVERY, QUICK), ids=named)
def test_a_file_holds_what_training_computed_with(
    kind: str, settings: Quantization, masked: bool, tmp_path: Path
) -> None:
    model, x = layer(kind)
    fresh, masks = copy.deepcopy(model), {}
    if masked:
        masks = {name: torch.rand(p.shape) > 0.8 for name, p in model.named_parameters() if p.dim() > 1}
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
    quantization.prepare(model, fitting(settings, kind))
    quantization.enable(model)
    stored.save(tmp_path / "m", model, masks=masks)
    read = stored.load(tmp_path / "m")
    assert len(read.integers) == len(list(quantized_weights(model)))
    assert all(torch.equal(mask, masks[name]) for name, mask in read.masks.items())
    assert bool(read.masks) == masked
    fresh.load_state_dict(read.state_dict())
    assert torch.equal(fresh(x), model(x))
    read.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


@pytest.mark.parametrize(("kind", "settings"), slowly(EVERY, QUICK), ids=named)
def test_a_converted_layer_computes_the_same_from_integers(kind: str, settings: Quantization) -> None:
    model, _, x = quantized(kind, settings)
    before = stored.encode(model)
    with torch.no_grad():
        expected = model(x)
        converted = quantization.convert(copy.deepcopy(model))
        assert torch.equal(converted(x), expected)
        assert torch.equal(copy.deepcopy(converted)(x), expected)
        assert torch.equal(converted.eval()(x), expected)
        assert torch.equal(model(x), expected)  # the copied one goes on
    assert not quantization.is_prepared(converted)
    after = stored.encode(converted)
    assert before.integers.keys() == after.integers.keys()
    for name, codes in before.integers.items():
        assert torch.equal(codes.dequantized(), after.integers[name].dequantized())
        assert torch.equal(codes.values, after.integers[name].values)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_prepared_layer_pickles_and_copies(kind: str) -> None:
    model, _, x = quantized(kind, Quantization(4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        other(x).sum().backward()


@pytest.mark.parametrize("kind", slowly(LAYERS, ["attention"]))
def test_a_compiled_layer_computes_with_the_codes_of_the_file(kind: str) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model, _, x = quantized(kind, Quantization(4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind in CONVOLUTIONS)
    results = []
    for each in (model, compiled):
        model.zero_grad()
        y = each(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_packed_sequences_and_states_go_through() -> None:
    model, plain, x = quantized("deep lstm", Quantization(4))
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 2, 4], batch_first=True, enforce_sorted=False)
    first = (torch.randn(4, 3, 24), torch.randn(4, 3, 24))
    ours, theirs = model.inner(packed, first), plain.inner(packed, first)
    assert torch.equal(ours[0].data, theirs[0].data)
    assert same(ours[1], theirs[1])


def test_masks_and_sequences_first_go_through_attention() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": nn.MultiheadAttention(32, 4, bias=False, add_bias_kv=True, add_zero_attn=True)})
    plain = copy.deepcopy(model)
    quantization.prepare(model, Quantization(4))
    quantization.enable(model)
    plain.load_state_dict(stored.encode(model).state_dict())
    query, key, value = torch.randn(5, 3, 32), torch.randn(7, 3, 32), torch.randn(7, 3, 32)
    how = {
        "key_padding_mask": torch.rand(3, 7) > 0.7,
        "attn_mask": torch.rand(5, 7) > 0.7,
        "average_attn_weights": False,
    }
    for one, other in zip(model.inner(query, key, value, **how), plain.inner(query, key, value, **how), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_static_inputs_of_a_convolution_are_rounded_before_they_are_padded(kind: str) -> None:
    model, x = layer(kind)
    learned(model, (x,), Quantization(activations="static"))
    static = model[0].activation_fake_quantizer
    assert static.range.tolist() == [x.min(), x.max()]
    plain = layer(kind)[0]
    plain.load_state_dict(stored.encode(model).state_dict())
    assert torch.equal(model(x), plain(static(x)))
    with torch.no_grad():
        expected = model(x)
    quantization.convert(model.train())
    model(10 * x)
    ranges.learn(model)
    assert torch.equal(model(x), expected)
    assert stored.encode(model).ranges == {"0": tuple(static.range.tolist())}


def test_what_cannot_be_quantised_is_told() -> None:
    for kind, settings, message in [
        (
            "conv2d",
            Quantization(activations="dynamic"),
            "'0' is a Conv2d, whose inputs are not tokens; expected 'static'",
        ),
        ("conv2d", Quantization(group=4), r"'0' has rows of 18 weights, which the group does not divide"),
        (
            "lstm",
            Quantization(group=32),
            r"'inner.weight_hh_l0' has rows of 24 weights, which the group does not divide",
        ),
        ("attention of other widths", Quantization(group=32), r"'inner.k_proj_weight' has rows of 16 weights"),
    ]:
        model, _ = layer(kind)
        with pytest.raises(ValueError, match=message):
            quantization.prepare(model, settings)
        assert not quantization.is_prepared(model)
    model = nn.Sequential(nn.LSTM(1, 4))
    with pytest.raises(ValueError, match=r"'0.weight_ih_l0' has rows of 1 weights, expected at least 2"):
        quantization.prepare(model, Quantization())
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"'\*' matches no layer that can be quantised .* There are: none"):
        quantization.prepare(model, Quantization())


def test_a_weight_of_attention_that_another_module_shares_is_refused() -> None:
    model, _ = layer("attention")
    model.head = nn.Linear(32, 32)
    model.head.weight = model.inner.out_proj.weight
    with pytest.raises(ValueError, match=r"'inner': its weight is also head.weight"):
        quantization.prepare(model, Quantization(layers=("inner",)))
    quantization.prepare(model, Quantization())
    assert stored.encode(model).shared == {"head.weight": "inner.out_proj.weight"}


# A training


class Trained:
    """All layers under a recipe that prunes, and quantises from step 2 on, alone or under DDP or FSDP2."""

    def __init__(self, *, sharded: bool = False) -> None:
        self.model = self.wrapped = everything()
        prunes = {"start": 1, "end": 3, "every": 1, "amount": 0.5, "parameters": ["*weight*"]}
        recipe = Recipe.of({"prune": [prunes], "quantize": [{"start": 2, "activations": "static"}]})
        self.session: Any = None
        if sharded:
            commpress.model.prepare(self.model, recipe)
            fully_shard(self.model)
            self.session = commpress.attach(self.model, "int4")
        elif torch.distributed.is_initialized():
            self.wrapped = DistributedDataParallel(self.model, bucket_cap_mb=0.002)
            self.session = commpress.attach(self.wrapped, "int4")
        self.optimizer = sgd(self.model)
        self.scheduler = Scheduler(recipe, self.model, self.optimizer, session=self.session)

    def steps(self, *which: int) -> list[Tensor]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for step in which:
            x, y = batch(step, rank)
            cross_entropy(self.wrapped(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return [*map(whole, self.model.parameters()), *(q.range for q in ranges.quantizers(self.model))]

    def state(self) -> list[Any]:
        return copy.deepcopy([part.state_dict() for part in (self.model, self.optimizer, self.scheduler)])


def trained_on_ranks(sharded: bool) -> tuple[list[Tensor], float]:
    trained = Trained(sharded=sharded)
    return [t.detach().clone() for t in trained.steps(*range(5))], trained.scheduler.masks.sparsity


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_ranks_prune_and_quantise_all_layers_alike(sharded: bool) -> None:
    (one, sparsity), (other, _) = run(2, trained_on_ranks, sharded)
    assert same(one, other)
    assert sparsity == pytest.approx(0.5, abs=0.05)


def test_a_run_resumes_bit_for_bit() -> None:
    first = Trained()
    first.steps(0, 1, 2)
    saved = first.state()
    expected = first.steps(3, 4)
    again = Trained()
    for part, state in zip((again.model, again.optimizer, again.scheduler), saved, strict=True):
        part.load_state_dict(state)
    assert same(again.steps(3, 4), expected)
    assert {name for name, *_ in prepared(again.model)} == {"convolution", "attention", "recurrent", "head"}
    assert all(state["enabled"] for state in quantization.state_dict(again.model).values())
