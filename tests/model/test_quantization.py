"""Quantisation-aware training: against its definition in plain torch, against torchao's own, and on ranks."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from tiers import slow
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, network, parameters_of, same, sgd

from commpress.launch.model import GPT, Shape
from commpress.model import quantization, stored
from commpress.model.quantization import Quantization, fixed_point, quantize

LIBRARIES = ("torchao.quantization",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

EVERY = [
    Quantization(bits, group, activations)
    for bits in (8, 4)
    for group in (None, 32)
    for activations in (None, "dynamic")
]


def named(settings: Quantization) -> str:
    return f"int{settings.bits}-{settings.group or 'row'}{'-activations' if settings.activations else ''}"


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(Shape(layers=2, width=64, heads=4, context=16))


def text(seed: int = 0) -> Tensor:
    return torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(seed))


def quantized(settings: Quantization, seed: int = 0) -> nn.Sequential:
    model = network(seed)
    quantization.prepare(model, settings)
    quantization.enable(model)
    return model


# q(w, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 1, 7, 23])
def test_fixed_point_is_the_nearest_number_with_that_many_places(bits: int, dtype: torch.dtype) -> None:
    w = (torch.randn(1000, generator=torch.Generator().manual_seed(bits)) * 10).to(dtype)
    exact = torch.round(w.double() * 2**bits) / 2**bits
    assert torch.equal(fixed_point(w, bits).double(), exact)
    assert fixed_point(w, bits).dtype == dtype


def test_fixed_point_rounds_halves_to_even_and_does_not_clamp() -> None:
    w = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 1e30, float("inf"), 0.0])
    assert fixed_point(w, 1).tolist() == [0.0, 1.0, 1.0, 0.0, -1.0, w[5].item(), float("inf"), 0.0]


def test_fixed_point_refuses_other_places_and_dtypes() -> None:
    for bits in (-1, 24):
        with pytest.raises(ValueError, match=rf"fixed_point\(bits={bits}\): expected 0 to 23"):
            fixed_point(torch.ones(2), bits)
    with pytest.raises(TypeError, match="float64"):
        fixed_point(torch.ones(2, dtype=torch.float64), 3)


# The definition


def straight_through(w: Tensor, settings: Quantization) -> Tensor:
    """s * clamp(round(w / s)) with gradient 1 inside the clamp and 0 outside."""
    high = 2 ** (settings.bits - 1) - 1
    groups = w.view(w.shape[0], -1, settings.group or w.shape[1])
    s = (groups.detach().abs().amax(-1, keepdim=True) / (high + 0.5)).clamp(min=2**-126)
    s = s.bfloat16() if settings.bits == 4 else s
    code = groups.detach() * (1 / s)
    inside = (code.round() >= -high - 1) & (code.round() <= high)
    value = code.round().clamp(-high - 1, high) * s
    return (value + (groups - groups.detach()) * inside).view(w.shape)


def int8_tokens(x: Tensor) -> Tensor:
    """Asymmetric int8, a scale and a zero point a token; 0 is a code."""
    low, high = x.detach().amin(-1, keepdim=True).clamp(max=0), x.detach().amax(-1, keepdim=True).clamp(min=0)
    s = ((high - low) / 255).clamp(min=2**-126)
    zero = (-128 - (low / s).round()).clamp(-128, 127)
    value = ((x.detach() * (1 / s)).round() + zero).clamp(-128, 127) - zero
    return value * s + (x - x.detach())


@pytest.mark.parametrize("settings", EVERY, ids=named)
def test_outputs_and_gradients_are_those_of_the_definition(settings: Quantization) -> None:
    model, plain = quantized(settings), network()
    x, y = batch(0, 0)
    cross_entropy(model(x), y).backward()
    h = x
    for module in plain:
        if isinstance(module, nn.Linear):
            h = int8_tokens(h) if settings.activations else h
            h = nn.functional.linear(h, straight_through(module.weight, settings), module.bias)
        else:
            h = module(h)
    cross_entropy(h, y).backward()
    assert torch.equal(model(x), h)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)
        assert torch.equal(p.grad == 0, q.grad == 0)  # clamped: the largest of a group, if positive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", EVERY[::2], ids=named)
def test_codes_are_those_that_the_model_computes_with(settings: Quantization, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 40), nn.Embedding(50, 96)).to(dtype)
    model[0].weight.data[0] = 0
    model[0].weight.data[1] *= 1e-4
    quantization.prepare(model, settings)
    quantization.enable(model)
    for module in model:
        codes = quantize(module.weight, settings.bits, settings.group)
        assert torch.equal(codes.dequantized(dtype), module.weight_fake_quantizer(module.weight))
        assert codes.values.dtype == torch.int8
        assert codes.values.shape == module.weight.shape
        assert codes.scale.shape == (
            module.weight.shape[0],
            module.weight.shape[1] // (settings.group or module.weight.shape[1]),
        )
        assert codes.values.min() >= -(2 ** (settings.bits - 1))
        assert codes.values.max() == 2 ** (settings.bits - 1) - 1


class Each(nn.Module):
    """Layers with settings of their own, on one input; the outputs are their weights."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 48, bias=False, dtype=dtype) for dtype in dtypes)
        self.layers.append(nn.Embedding(64, 64, dtype=dtypes[0]))
        for i, settings in enumerate([*EVERY[::2], Quantization(4, 32)]):
            quantization.prepare(self, replace(settings, layers=(f"layers.{i}",)))
        quantization.enable(self)

    def forward(self, eye: Tensor, rows: Tensor) -> list[Tensor]:
        return [
            layer(rows) if isinstance(layer, nn.Embedding) else layer(eye.to(layer.weight.dtype))
            for layer in self.layers
        ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_computes_with_the_codes_of_the_file(backend: str, tmp_path: Path) -> None:
    import torch._dynamo
    import torch._inductor.config

    # one thread: no pool of processes that outlives the test
    with torch._inductor.config.patch(compile_threads=1), torch._dynamo.config.patch(error_on_recompile=True):
        compiled_as_the_file(backend, tmp_path / "m")


def compiled_as_the_file(backend: str, path: Path) -> None:
    wide, half = torch.float32, torch.bfloat16
    # inductor has each of them once: it is the compiler of C++ that takes the time
    for dtypes in [(wide,) * 4, (half,) * 4] if backend == "aot_eager" else [(wide, half, half, wide)]:
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = Each(*dtypes)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        inputs = torch.eye(64), torch.arange(64)
        results = []
        for called in (model, compiled, compiled):  # the second call finds what the first left
            model.zero_grad()
            outputs = called(*inputs)
            sum(y.square().sum() for y in outputs).backward()
            results.append([*outputs, *(p.grad for p in model.parameters())])
        stored.save(path, model)
        read = stored.load(path).state_dict()
        weights = [read[name].to(p.dtype) for name, p in model.named_parameters()]
        weights = [*(w.t() for w in weights[:-1]), weights[-1]]
        for got in results:
            assert same(got[: len(weights)], weights)
            assert same(got, results[0])
    torch._dynamo.reset()


def test_mixed_precision_computes_with_the_codes_of_the_file() -> None:
    for rounded, whole in run(2, under_mixed_precision):
        assert torch.equal(rounded, whole)


def under_mixed_precision() -> tuple[Tensor, Tensor]:
    model = quantized(Quantization(4, 16))
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model)
    seen: list[Tensor] = []
    model[0].weight_fake_quantizer.register_forward_hook(lambda _, args, output: seen.append(output.detach().clone()))
    model(batch(0, 0)[0])
    return seen[0], stored.encode(model).integers["0.weight"].dequantized(torch.bfloat16)


def test_autocast_changes_no_code() -> None:
    w = torch.randn(16, 64, dtype=torch.bfloat16)
    expected = quantize(w, 4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantize(w, 4, 32)
        model = quantized(Quantization(4, 16))
        computed = model[0].weight_fake_quantizer(model[0].weight)
    assert torch.equal(inside.values, expected.values)
    assert torch.equal(inside.scale, expected.scale)
    assert torch.equal(computed, stored.encode(model).integers["0.weight"].dequantized())


def test_weights_that_are_not_finite_are_seen_in_the_output() -> None:
    model = quantized(Quantization(4))
    with torch.no_grad():
        model[0].weight[1, 2], model[0].weight[3, 2] = float("nan"), float("inf")
    computed = model[0].weight_fake_quantizer(model[0].weight)
    assert computed[[1, 3]].isnan().all()
    assert computed[[0, 2]].isfinite().all()


@pytest.mark.parametrize("settings", [s for s in EVERY if s.bits == 8], ids=named)
def test_at_8_bits_all_is_as_torchao_does_it(settings: Quantization) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import QATConfig

    granularity = PerAxis(0) if settings.group is None else PerGroup(settings.group)
    base = (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=granularity)
        if settings.activations
        else IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=granularity)
    )
    model, theirs, x = quantized(settings), network(), batch(0, 0)[0]
    quantize_(theirs, QATConfig(base, step="prepare"))
    assert torch.equal(model(x), theirs(x))
    quantize_(theirs, QATConfig(base, step="convert"))
    quantization.convert(model)
    assert torch.equal(model(x), theirs(x))
    for ours, its in zip(model[::2], theirs[::2], strict=True):
        assert type(ours.weight) is type(its.weight)
        assert torch.equal(ours.weight.qdata, its.weight.qdata)
        assert torch.equal(ours.weight.scale, its.weight.scale)
        assert ours.weight.activation_quantization == its.weight.activation_quantization


def test_rounding_the_scales_at_4_bits_costs_nothing() -> None:
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    groups = w.view(256, 8, 32)
    s = groups.abs().amax(-1, keepdim=True) / 7.5
    with_float32_scales = ((groups / s).round().clamp(-8, 7) * s - groups).square().mean()
    ours = (quantize(w, 4, 32).dequantized() - w).square().mean()
    assert ours < 1.01 * with_float32_scales


def test_pruned_weights_stay_exactly_0() -> None:
    for settings in EVERY:
        model = network()
        masks = [torch.rand(m.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3 for m in model[::2]]
        masks[0][0] = False  # a whole row, and so whole groups
        for module, mask in zip(model[::2], masks, strict=True):
            module.weight.data.mul_(mask)  # -0 among the zeros
        quantization.prepare(model, settings)
        quantization.enable(model)
        computed = [m.weight_fake_quantizer(m.weight) for m in model[::2]]
        quantization.convert(model)
        for module, mask, w in zip(model[::2], masks, computed, strict=True):
            assert w.isfinite().all()
            assert not w[~mask].any()
            assert not module.weight.qdata[~mask].any()
            assert not module.weight.dequantize()[~mask].any()


# Prepare and enable


def test_a_prepared_model_is_the_same_model_until_it_is_enabled() -> None:
    model, plain = gpt(), gpt()
    objects = dict(model.named_modules()), dict(model.named_parameters())
    seen: list[str] = []
    model.blocks[0].up.register_forward_hook(lambda *_: seen.append("hook"))
    model.eval()
    random = torch.get_rng_state()
    names = quantization.prepare(model, Quantization(activations="dynamic"))
    assert torch.equal(random, torch.get_rng_state())
    assert len(names) == 2 * 4 + 3  # blocks, two embeddings, the head
    for name, module in objects[0].items():
        assert model.get_submodule(name) is module
        assert not module.training
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in objects[1].items()]
    assert model.state_dict().keys() == plain.state_dict().keys()

    def outputs_and_gradients(of: GPT) -> list[Tensor | None]:
        of.zero_grad()
        logits = of(text())
        logits.square().sum().backward()
        return [logits, *(p.grad for p in of.parameters())]

    expected = outputs_and_gradients(plain)
    assert same(outputs_and_gradients(model), expected)
    assert seen == ["hook"]
    assert quantization.is_prepared(model)
    assert not quantization.is_prepared(plain)
    quantization.enable(model)
    assert not torch.equal(model(text()), expected[0])
    quantization.enable(model, False)
    assert same(outputs_and_gradients(model), expected)


def test_layers_are_chosen_by_name_and_keep_their_first_settings() -> None:
    model = gpt()
    assert quantization.prepare(model, Quantization(4, 32, layers=("blocks.*.up", "tokens"))) == [
        "tokens",
        "blocks.0.up",
        "blocks.1.up",
    ]
    rest = quantization.prepare(model, Quantization(8))
    assert "tokens" not in rest
    assert "blocks.0.up" not in rest
    state = quantization.state_dict(model)
    assert (state["tokens"]["bits"], state["head"]["bits"]) == (4, 8)
    quantization.enable(model, settings=Quantization(8))
    assert {name for name, s in quantization.state_dict(model).items() if s["enabled"]} == set(rest)
    with pytest.raises(ValueError, match=r"enable: the model has no fake quantisers of Quantization\(bits=8, group=32"):
        quantization.enable(model, settings=Quantization(8, 32))
    with pytest.raises(ValueError, match=r"'\*' matches no layer .* not prepared yet. There are: none"):
        quantization.prepare(model, Quantization())


def test_torchs_own_transformer_is_quantised_in_evaluation_too() -> None:
    def encoder() -> nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    model = encoder()
    names = quantization.prepare(model, Quantization(4))
    assert names == [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "linear1", "linear2")]
    x = torch.randn(3, 5, 32)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    quantization.enable(model)
    with torch.no_grad():  # with gradients torch takes another kernel for attention
        trained = model(x, src_key_padding_mask=padding)
        model.eval()
        assert torch.equal(model(x, src_key_padding_mask=padding), trained)
        quantization.convert(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), trained)


# Convert


@pytest.mark.parametrize("settings", EVERY, ids=named)
def test_a_converted_gpt_computes_the_same_from_integers(settings: Quantization) -> None:
    model = gpt()
    quantization.prepare(model, settings)
    quantization.enable(model)
    expected = model(text())
    converted = quantization.convert(copy.deepcopy(model))
    assert torch.equal(converted(text()), expected)
    assert converted.head.weight.qdata.dtype == torch.int8
    assert type(converted.head) is nn.Linear
    assert type(converted.tokens) is nn.Embedding
    assert not quantization.is_prepared(converted)
    assert torch.equal(model(text()), expected)  # the copied one goes on


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_shared_weights_stay_shared(activations: Any) -> None:
    model = gpt()
    model.head.weight = model.tokens.weight
    quantization.prepare(model, Quantization(4, 32, activations))
    quantization.enable(model)
    assert model.head.weight is model.tokens.weight
    expected = model(text())
    quantization.convert(model)
    assert model.head.weight is model.tokens.weight
    assert torch.equal(model(text()), expected)


def test_training_with_it_beats_rounding_after_training() -> None:
    def trained(steps_before: int, steps_with: int, seed: int) -> float:
        model = network(seed)
        quantization.prepare(model, Quantization(4))
        optimizer = sgd(model, lr=0.05)
        for step in range(steps_before + steps_with):
            if step == 200:
                optimizer.param_groups[0]["lr"] = 0.01
            if step == steps_before:
                quantization.enable(model)
            optimizer.zero_grad()
            loss_of(model, step, 0).backward()
            optimizer.step()
        quantization.enable(model)
        return sum(loss_of(model, step, 1).item() for step in range(50)) / 50

    assert trained(200, 200, 1) < 0.99 * trained(400, 0, 1)  # 3.6 % better; six seeds: 0.6 to 3.6 %


# State


def test_a_run_resumes_bit_for_bit() -> None:
    settings = Quantization(4, 32, activations="dynamic")

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for step in which:
            if step == 2:
                quantization.enable(model)
            optimizer.zero_grad()
            loss_of(model, step, 0).backward()
            optimizer.step()

    model = network()
    quantization.prepare(model, settings)
    optimizer = sgd(model)
    steps(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), quantization.state_dict(model)))
    steps(model, optimizer, range(4, 7))

    again = network(seed=1)
    quantization.prepare(again, settings)
    optimizer = sgd(again)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    quantization.load_state_dict(again, saved[2])
    steps(again, optimizer, range(4, 7))
    assert same(parameters_of(again), parameters_of(model))


def test_state_of_another_preparation_is_refused() -> None:
    model = network()
    quantization.prepare(model, Quantization(4, 32))
    quantization.enable(model)
    for settings, message in [
        (Quantization(8, 32), r"quantisation of '0': saved with .*'bits': 4.*, prepared with .*'bits': 8"),
        (Quantization(4, 32, layers=("0",)), "2, 4 are prepared on one side only"),
    ]:
        other = network()
        quantization.prepare(other, settings)
        with pytest.raises(ValueError, match=message):
            quantization.load_state_dict(other, quantization.state_dict(model))
        assert not any(s["enabled"] for s in quantization.state_dict(other).values())


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"Quantization\(bits=3\): expected 4 or 8"),
        ({"group": 1}, r"Quantization\(group=1\): expected at least 2"),
        ({"layers": ()}, r"Quantization\(layers=\(\)\): expected a tuple of globs"),
        ({"layers": "blocks.*"}, r"Quantization\(layers='blocks.\*'\): expected a tuple of globs"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantization(**settings)


def unfit_models() -> Iterator[tuple[nn.Module, Quantization, str]]:
    yield (
        gpt(),
        Quantization(layers=("blocks.*", "haed")),
        "'haed' matches no layer .* There are: tokens, ",
    )
    yield network(), Quantization(group=48), r"group=48\): '0' has rows of 32 weights, which the group does not divide"
    yield nn.Sequential(nn.Linear(1, 4)), Quantization(), "'0' has rows of 1 weights, expected at least 2"
    yield network().double(), Quantization(), "'0': expected float16, bfloat16 or float32, got float64"
    yield nn.Sequential(nn.Embedding(4, 4, sparse=True)), Quantization(), "'0': an embedding with max_norm or sparse"
    tied = gpt()
    tied.head.weight = tied.tokens.weight
    yield tied, Quantization(layers=("head",)), "'head': its weight is also tokens.weight"


@pytest.mark.parametrize("case", range(6))
def test_what_cannot_be_quantised_is_refused_and_left_alone(case: int) -> None:
    model, settings, message = list(unfit_models())[case]
    with pytest.raises(ValueError, match=message):
        quantization.prepare(model, settings)
    assert not quantization.is_prepared(model)
    assert {type(m).__name__ for m in model.modules()}.isdisjoint({"FakeQuantizedLinear", "FakeQuantizedEmbedding"})


def test_a_model_that_is_not_prepared_is_refused() -> None:
    for action in (quantization.enable, quantization.convert):
        with pytest.raises(ValueError, match=f"{action.__name__}: the model has no fake quantisers"):
            action(network())


# Ranks


def trained_under_fsdp(settings: Quantization) -> tuple[list[Tensor], list[Tensor], str, str]:
    model = gpt()
    quantization.prepare(model, settings)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    alone = gpt()
    quantization.prepare(alone, settings)
    outputs, expected = [], []
    optimizer, its = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone))
    for step in range(3):
        if step == 1:
            quantization.enable(model)
            quantization.enable(alone)
        for of_it, o, results in ((model, optimizer, outputs), (alone, its, expected)):
            o.zero_grad()
            logits = of_it(text(step))  # the same on both ranks, so the mean of gradients is each rank's
            logits.square().mean().backward()
            o.step()
            results.append(logits.detach())
    late = gpt()
    fully_shard(late)
    errors = []
    for action in (lambda: quantization.convert(model), lambda: quantization.prepare(late, Quantization())):
        with pytest.raises(ValueError, match="sharded") as error:
            action()
        errors.append(str(error.value))
    return outputs, expected, errors[0], errors[1]


@pytest.mark.parametrize("settings", [slow(EVERY[0]), EVERY[-1]], ids=named)
def test_prepared_then_sharded_it_computes_as_a_model_that_is_whole(settings: Quantization) -> None:
    for outputs, expected, no_convert, too_late in run(2, trained_under_fsdp, settings):
        for output, right in zip(outputs, expected, strict=True):
            assert torch.equal(output, right)
        assert "convert: tokens.weight is sharded" in no_convert
        assert "'tokens': tokens.weight is sharded already, prepare before fully_shard" in too_late


def trained_under_ddp(prepared_at: int) -> list[Tensor]:
    model = network()
    if prepared_at < 0:
        quantization.prepare(model, Quantization(4, 32, activations="dynamic"))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    optimizer = sgd(ddp)
    for step in range(6):
        if step == prepared_at:
            quantization.prepare(ddp.module, Quantization(4, 32, activations="dynamic"))
        if step == 4:
            quantization.enable(ddp.module)
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()
    assert dist.get_world_size() == 2
    return parameters_of(ddp)


def test_under_ddp_it_may_be_prepared_before_or_in_the_middle() -> None:
    before, middle = run(2, trained_under_ddp, -1), run(2, trained_under_ddp, 3)
    assert same(before[0], before[1])
    assert same(before[0], middle[0])
    alone = network()
    quantization.prepare(alone, Quantization(4, 32, activations="dynamic"))
    optimizer = sgd(alone)
    for step in range(6):
        if step == 4:
            quantization.enable(alone)
        optimizer.zero_grad()
        ((loss_of(alone, step, 0) + loss_of(alone, step, 1)) / 2).backward()
        optimizer.step()
    for p, q in zip(before[0], parameters_of(alone), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
