"""Static activation scales: the learned range is the definition's, the same on all ranks, and survives a restart."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import batch, network, same, sgd

import commpress
from commpress.model import Recipe, Scheduler, quantization, ranges, stored
from commpress.model.held import whole
from commpress.model.quantization import Quantization

STATIC = Quantization(activations="static")


def rounded(x: Tensor, low: float, high: float) -> Tensor:
    """The definition, with gradient 1 inside and 0 outside."""
    scale = torch.tensor((high - low) / 255)
    zero = (-128 - torch.tensor(low / scale.item()).round()).clamp(-128, 127)
    codes = torch.round(x.detach() / scale) + zero
    inside = (codes >= -128) & (codes <= 127)
    return (codes.clamp(-128, 127) - zero) * scale + (x - x.detach()) * inside


def quantizer(low: float, high: float) -> ranges.InputQuantizer:
    found = ranges.InputQuantizer().eval()
    found.range.copy_(torch.tensor([low, high]))
    return found


def static(seed: int = 0) -> nn.Sequential:
    model = network(seed)
    quantization.prepare(model, STATIC)
    quantization.enable(model)
    return model


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.5), (-0.7, 0.0), (-1e-3, 1e3), (0.0, 1e-30)])
def test_values_and_gradients_are_the_definitions(low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(4096).uniform_(1.5 * low - high / 9, 1.5 * high - low / 9, generator=generator)
    x[0] = 0
    x, y = (x.clone().requires_grad_() for _ in range(2))
    got, expected = quantizer(low, high)(x), rounded(y, low, high)
    assert torch.equal(got, expected)
    assert got[0] == 0  # a pruned or padded input stays what it is
    got.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)
    assert 0 < x.grad.sum() < 4096


def test_nan_and_inf_are_seen_in_the_output() -> None:
    assert quantizer(-1, 1)(torch.tensor([torch.nan, torch.inf, -torch.inf])).isnan().all()


def test_the_range_is_a_moving_average_of_the_extremes_of_a_step() -> None:
    model, low, high = static(), 0.0, 0.0
    for step in range(4):
        extremes = []
        for part in range(2):  # two backwards a step
            x, y = batch(step, part)
            cross_entropy(model(x), y).backward()
            extremes.append((x.min().item(), x.max().item()))
        least, most = min(e[0] for e in extremes), max(e[1] for e in extremes)
        low, high = (least, most) if step == 0 else (0.99 * low + 0.01 * least, 0.99 * high + 0.01 * most)
        ranges.learn(model)
    assert model[0].activation_fake_quantizer.range.tolist() == pytest.approx([low, high], rel=1e-12)
    model.eval()
    model(100 * batch(0, 0)[0])
    before = model[0].activation_fake_quantizer.range.clone()
    ranges.learn(model)
    assert torch.equal(model[0].activation_fake_quantizer.range, before)  # an evaluation teaches nothing


def test_until_something_is_known_inputs_are_not_rounded() -> None:
    model, weights_only = static(), network()
    quantization.prepare(weights_only, Quantization())
    quantization.enable(weights_only)
    x = batch(0, 0)[0]
    assert torch.equal(model(x), weights_only(x))
    ranges.learn(model)
    assert not torch.equal(model(x), weights_only(x))


def test_a_step_that_overflowed_teaches_nothing() -> None:
    model = static()
    x = batch(0, 0)[0]
    model(x)
    ranges.learn(model)
    before = [q.range.clone() for q in ranges.quantizers(model)]
    for broken in (torch.inf, torch.nan):
        model(torch.full_like(x, broken))
        ranges.learn(model)
    assert same([q.range for q in ranges.quantizers(model)], before)


class Trained:
    """A network under a recipe with static scales from step 2 on, alone or under DDP or FSDP2."""

    def __init__(self, *, sharded: bool = False, **attach: Any) -> None:
        self.model = network()
        recipe = Recipe.of({"quantize": [{"start": 2, "activations": "static"}]})
        self.wrapped, self.session = self.model, None
        if sharded:
            quantization.prepare(self.model, STATIC)
            fully_shard(self.model)
            self.session = commpress.attach(self.model, "int4")
        elif torch.distributed.is_initialized():
            quantization.prepare(self.model, STATIC)
            self.wrapped = DistributedDataParallel(self.model, bucket_cap_mb=0.002)
            self.session = commpress.attach(self.wrapped, "int4", **attach)
        self.optimizer = sgd(self.model)
        self.scheduler = Scheduler(recipe, self.model, self.optimizer, session=self.session)

    def steps(self, *which: int) -> list[Tensor]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for step in which:
            x, y = batch(step, rank)
            cross_entropy(self.wrapped((1 + rank) * x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return [*map(whole, self.model.parameters()), *(q.range for q in ranges.quantizers(self.model))]


def trained_on_ranks(attach: dict[str, Any]) -> list[Tensor]:
    return [t.detach().clone() for t in Trained(**attach).steps(*range(6))]


@pytest.mark.parametrize(
    "attach", [{}, {"buffers": "int4"}, {"sharded": True}], ids=["ddp", "compressed buffers", "fsdp"]
)
@pytest.mark.usefixtures("ranks_of_our_own")
def test_all_ranks_learn_one_range_from_all_data(attach: dict[str, Any]) -> None:
    one, other = run(2, trained_on_ranks, attach)
    assert same(one, other)
    low = high = 0.0
    for step in range(2, 6):  # of what both saw, in float64
        both = torch.stack([(1 + rank) * batch(step, rank)[0] for rank in (0, 1)]).double()
        least, most = both.min().item(), both.max().item()
        low, high = (least, most) if step == 2 else (0.99 * low + 0.01 * least, 0.99 * high + 0.01 * most)
    assert one[6].tolist() == pytest.approx([low, high], rel=1e-12)


def test_a_run_resumes_bit_for_bit() -> None:
    first = Trained()
    first.steps(0, 1, 2, 3)
    parts = (first.model, first.optimizer, first.scheduler)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    expected = first.steps(4, 5)
    again = Trained()
    for part, state in zip((again.model, again.optimizer, again.scheduler), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    assert same(again.steps(4, 5), expected)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_ranges() -> None:
    import torch._dynamo

    def trained(compiled: bool) -> list[Tensor]:
        torch._dynamo.reset()
        model = network()
        quantization.prepare(model, STATIC)
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = sgd(model)
        for step in range(6):
            if step == 2:
                quantization.enable(model)
            for part in (0, 1):
                x, y = batch(step, part)
                cross_entropy(called(x), y).backward()
            optimizer.step()
            ranges.learn(model)
            optimizer.zero_grad()
        return [*model.parameters(), *(q.range for q in ranges.quantizers(model))]

    assert same(trained(True), trained(False))


def test_a_converted_model_computes_what_training_computed_and_learns_no_more() -> None:
    trained = Trained()
    trained.steps(*range(5))
    x = batch(9, 0)[0]
    expected = trained.model.eval()(x)
    quantization.convert(trained.model.train())
    trained.model(10 * x)
    ranges.learn(trained.model)
    assert torch.equal(trained.model(x), expected)
    assert trained.model[0].weight.qdata.dtype == torch.int8


def test_a_range_that_was_never_learned_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'0': no range of inputs has been learned"):
        quantization.convert(static())


def test_the_stored_file_has_the_ranges_and_loads_into_a_plain_model(tmp_path: Path) -> None:
    trained = Trained()
    trained.steps(*range(5))
    stored.save(tmp_path / "m", trained.model)
    read = stored.load(tmp_path / "m")
    plain = network(1)
    plain.load_state_dict(read.state_dict())
    for name in ("0", "2", "4"):
        quantizer_of = ranges.quantizer_of(trained.model.get_submodule(name))
        assert quantizer_of is not None
        assert list(read.ranges[name]) == quantizer_of.range.tolist()
    quantization.convert(trained.model)
    assert stored.encode(trained.model).ranges == read.ranges
