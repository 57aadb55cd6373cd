"""The average of the weights: by its formula, 0 where they are pruned, quantised as the model is, the same on all ranks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import everything
from ranks import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import batch, same, sgd

import commpress
from commpress.model import Average, Recipe, Scheduler, export, quantization, stored
from commpress.model.held import whole
from commpress.model.quantization import quantize

LIBRARIES = ("torchao.quantization",)
PRUNES = {"start": 1, "end": 3, "every": 1, "amount": 0.5, "parameters": ["*weight*"]}
RECIPE = {"prune": [PRUNES], "quantize": [{"start": 2, "activations": "static"}]}
X = batch(9, 0)[0]
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")


class Trained:
    """All layers under a recipe, alone or under DDP or FSDP2, and their average."""

    def __init__(self, recipe: dict[str, Any] = RECIPE, *, sharded: bool = False, decay: float = 0.9) -> None:
        self.model = self.wrapped = everything()
        self.session: Any = None
        if sharded:
            commpress.model.prepare(self.model, Recipe.of(recipe))
            fully_shard(self.model.recurrent)
            fully_shard(self.model)
            self.session = commpress.attach(self.model, "int4")
        elif torch.distributed.is_initialized():
            self.wrapped = DistributedDataParallel(self.model, bucket_cap_mb=0.002)
            self.session = commpress.attach(self.wrapped, "int4")
        self.optimizer = sgd(self.model)
        self.scheduler = Scheduler(Recipe.of(recipe), self.model, self.optimizer, session=self.session)
        self.average = Average(self.scheduler, decay=decay)

    def steps(self, *which: int) -> None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for step in which:
            x, y = batch(step, rank)
            cross_entropy(self.wrapped(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.average.update()
            self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p).clone() for name, p in self.model.named_parameters()}

    def averages(self) -> dict[str, Tensor]:
        return {name: whole(x).clone() for name, x in self.average.state_dict()["averages"].items()}


def test_it_is_the_formula_and_0_where_a_weight_is_pruned() -> None:
    trained = Trained()
    expected = trained.weights()
    for step in range(5):
        trained.steps(step)
        now = trained.weights()
        expected = {name: torch.lerp(x, now[name], 1 - 0.9) for name, x in expected.items()}
        for name, mask in trained.scheduler.masks.of.items():
            expected[name] *= mask
    got = trained.averages()
    assert same([*got.values()], [*expected.values()])
    assert got.keys() == now.keys()
    assert not same([*got.values()], [*now.values()])
    pruned = sum(int((~mask).sum()) for mask in trained.scheduler.masks.of.values())
    assert sum(int((got[name] == 0).sum()) for name in trained.scheduler.masks.of) == pruned > 1000


def test_within_the_block_the_model_has_it_and_behind_it_its_own_weights() -> None:
    trained = Trained()
    trained.steps(*range(4))
    before, state = trained.weights(), quantization.state_dict(trained.model)
    objects = dict(trained.model.named_parameters())
    trained.model.eval()
    expected = trained.model(X)
    with trained.average as model:
        assert model is trained.model
        assert same([*trained.weights().values()], [*trained.averages().values()])
        assert quantization.state_dict(model) == state
        assert not torch.equal(model(X), expected)
        for misuse in (trained.average.update, trained.average.__enter__):
            with pytest.raises(RuntimeError, match="the averages are in the model"):
                misuse()
    with pytest.raises(KeyError), trained.average:
        raise KeyError
    assert same([*trained.weights().values()], [*before.values()])
    assert all(trained.model.get_parameter(name) is p for name, p in objects.items())
    assert torch.equal(trained.model(X), expected)


@pytest.mark.slow
def test_it_is_stored_and_exported_with_codes_of_its_own_and_the_models_ranges(tmp_path: Path) -> None:
    trained = Trained()
    trained.steps(*range(5))
    ranges, averages = stored.encode(trained.model).ranges, trained.averages()
    with trained.average as model:
        stored.save(tmp_path / "m", model, masks=trained.scheduler.masks.of)
        (written,) = export(model, tmp_path, formats=("pt2e",), example_inputs=(X,))
    read = stored.load(tmp_path / "m")
    assert written.difference < 1e-5
    assert read.ranges == ranges
    assert len(read.ranges) == 2
    assert read.masks
    codes = read.integers["head.weight"]
    assert torch.equal(codes.values, quantize(averages["head.weight"], 8).values)
    assert torch.equal(read.tensors["head.bias"], averages["head.bias"])


def test_a_run_resumes_bit_for_bit() -> None:
    def parts(of: Trained) -> list[Any]:
        return [of.model, of.optimizer, of.scheduler, of.average]

    first, again = Trained(), Trained()
    first.steps(0, 1, 2)
    saved = copy.deepcopy([part.state_dict() for part in parts(first)])
    first.steps(3, 4)
    for part, state in zip(parts(again), saved, strict=True):
        part.load_state_dict(state)
    again.steps(3, 4)
    assert same([*again.averages().values()], [*first.averages().values()])


def averaged_on_ranks(sharded: bool) -> tuple[dict[str, Tensor], bool, bool]:
    trained = Trained(sharded=sharded)
    trained.steps(*range(5))
    trained.model.eval()
    with torch.no_grad():
        own = trained.model(X)
        with trained.average:
            other = trained.model(X)
            held = same([*trained.weights().values()], [*trained.averages().values()])
        back = torch.equal(trained.model(X), own)
    return trained.averages(), held and not torch.equal(own, other), back


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_all_ranks_have_the_same_one(sharded: bool) -> None:
    (one, held, back), (other, *_) = run(2, averaged_on_ranks, sharded)
    assert same([*one.values()], [*other.values()])
    assert sum(int((x == 0).sum()) for x in one.values()) > 1000
    assert held
    assert back  # not the averages that an evaluation has gathered


def test_weights_of_16_bits_have_an_average_of_32() -> None:
    model = nn.Linear(8, 8).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(Scheduler(Recipe.of({}), model, optimizer), decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1)
    before = average.state_dict()["averages"]["weight"].clone()
    average.update()
    assert torch.equal(average.state_dict()["averages"]["weight"], torch.lerp(before, torch.ones(8, 8), 1 - 0.999))
    with average:
        assert model.weight.dtype == torch.bfloat16
        assert torch.equal(model.weight, average.state_dict()["averages"]["weight"].bfloat16())
    assert model.weight.eq(1).all()


def test_what_does_not_fit_is_refused() -> None:
    trained = Trained({})
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"Average\(decay={decay}\): expected 0 or more, and less than 1"):
            Average(trained.scheduler, decay)
    saved = trained.average.state_dict()["averages"]
    before = trained.averages()
    fewer = {name: x for name, x in saved.items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"cannot restore an average: head\.bias are parameters on one side only"):
        trained.average.load_state_dict({"averages": fewer})
    with pytest.raises(ValueError, match=r"'head.bias' was \(3,\), here it is \(10,\)"):
        trained.average.load_state_dict({"averages": {**saved, "head.bias": torch.ones(3)}})
    assert same([*trained.averages().values()], [*before.values()])


def test_it_is_0_where_a_weight_has_been_pruned_since_its_last_update(tmp_path: Path) -> None:
    trained = Trained({"prune": [{**PRUNES, "start": 2, "end": 2}]})
    trained.steps(0)
    x, y = batch(1, 0)
    cross_entropy(trained.wrapped(x), y).backward()
    trained.optimizer.step()
    trained.scheduler.step()  # prunes, and no update follows
    with trained.average as model:
        stored.save(tmp_path / "model.safetensors", model, masks=trained.scheduler.masks.of)
        with pytest.raises(RuntimeError, match="the averages are in the model now"):
            trained.average.load_state_dict(trained.average.state_dict())
