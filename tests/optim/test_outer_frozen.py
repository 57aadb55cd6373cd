"""Outer syncs and layers that are frozen: such a layer meets its peers once, if it has drifted, and then stands."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from training import finite, loss_of, network, parameters_of, same

import commpress
from commpress.optim.outer import Outer

EVERY = 4


def started(spec: str, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Outer]:
    """A network, its AdamW and its outer syncs."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, commpress.diloco(model, optimizer, spec, **{"every": EVERY, **settings})


def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def froze(spec: str, at: int, settings: dict[str, Any]) -> tuple[list[bool], list[Tensor], list[Tensor]]:
    """Whether a layer stands from the sync on after which it is frozen; that layer while it is; all after the last sync."""
    model, optimizer, outer = started(spec, **settings)
    go(model, optimizer, range(at))
    layer = model.get_submodule("0")
    layer.requires_grad_(False)
    meets = -(-at // EVERY) * EVERY + outer.settings.delay  # a sync that has to bring together what has drifted
    go(model, optimizer, range(at, meets))
    before, stood = parameters_of(layer), []
    for step in range(meets, meets + 3 * EVERY):
        go(model, optimizer, range(step, step + 1))
        stood.append(same(before, parameters_of(layer)))
    layer.requires_grad_(True)
    go(model, optimizer, range(meets + 3 * EVERY, meets + 5 * EVERY))
    outer.sync()
    stood.append(not same(before, parameters_of(layer)))
    return stood, before, parameters_of(model)


def stood_at_once() -> list[Tensor]:
    """A layer that is frozen just after a sync, and what becomes of it."""
    model, optimizer, _ = started("topk(0.03)|int2")
    go(model, optimizer, range(2 * EVERY))
    model.get_submodule("2").requires_grad_(False)
    before = parameters_of(model.get_submodule("2"))
    go(model, optimizer, range(2 * EVERY, 5 * EVERY))
    return [a - b for a, b in zip(before, parameters_of(model.get_submodule("2")), strict=True)]


def resumed(delay: int, at: int) -> tuple[list[Tensor], list[Tensor]]:
    """A run in which a layer is frozen, and the same from a checkpoint in the middle of it."""
    results = []
    for breaks in (False, True):
        model, optimizer, outer = started("int8", delay=delay)
        go(model, optimizer, range(6))
        model.get_submodule("0").requires_grad_(False)
        go(model, optimizer, range(6, at))
        if breaks:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), outer.state_dict()))
            model, optimizer, outer = started("int8", delay=delay)
            model.get_submodule("0").requires_grad_(False)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            outer.load_state_dict(saved[2])
        go(model, optimizer, range(at, 18))
        model.get_submodule("0").requires_grad_(True)
        go(model, optimizer, range(18, 25))
        outer.sync()
        results.append(parameters_of(model))
    return results[0], results[1]


def alone() -> str:
    """What is said when one rank freezes a layer."""
    model, optimizer, _ = started("int8")
    go(model, optimizer, range(EVERY))
    if dist.get_rank() == 1:
        model.get_submodule("2").requires_grad_(False)
    return outcome(lambda: go(model, optimizer, range(EVERY, 2 * EVERY)))


@pytest.mark.parametrize("spec", ["none", "int8", "topk(0.03)|int2"])
@pytest.mark.parametrize("settings", [{}, {"delay": 2}, {"fragments": 1, "momentum": 0.0, "lr": 1.0}], ids=str)
@pytest.mark.parametrize("at", [8, slow(10)])
def test_a_frozen_layer_meets_its_peers_and_stands(spec: str, at: int, settings: dict[str, Any]) -> None:
    results = run(2, froze, spec, at, settings)
    for stood, frozen, end in results:
        assert all(stood), stood
        if spec == "none" and settings.get("lr") == 1.0:
            assert same(frozen, results[0][1])
        assert same(end, results[0][2])
        assert finite(end)


def test_a_layer_that_is_frozen_after_a_sync_stands_at_once() -> None:
    for moves in run(2, stood_at_once):
        assert all(float(move.abs().max()) == 0 for move in moves)


@pytest.mark.parametrize(("delay", "at"), [slow(0, 7), (0, 10), slow(2, 9), (2, 13)])
def test_resumed_while_a_layer_is_frozen(delay: int, at: int) -> None:
    for unbroken, again in run(2, resumed, delay, at):
        assert same(unbroken, again)


def froze_sharded() -> tuple[Tensor, Tensor, list[Tensor]]:
    """A layer of a model that is sharded in each worker, frozen after a sync: then, and later; and all of the model."""
    workers = [dist.new_group([rank]) for rank in range(2)]
    model: Any = network()
    fully_shard(model, mesh=DeviceMesh.from_group(workers[dist.get_rank()], "cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = commpress.diloco(model, optimizer, "none", every=2)
    go(model, optimizer, range(4))
    model[0].requires_grad_(False)
    then = model[0].weight.to_local().clone()
    go(model, optimizer, range(4, 10))
    outer.sync()
    return then, model[0].weight.to_local().detach(), [p.to_local().detach() for p in model.parameters()]


def test_a_frozen_layer_of_a_sharded_model_stands() -> None:
    one, other = run(2, froze_sharded)
    assert same(one[2], other[2])
    for then, later, _ in (one, other):
        assert torch.equal(then, later)


def unfrozen_later() -> tuple[str, str, list[Tensor]]:
    """A layer that was frozen when the syncs began, trained later; then by a new optimizer."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = commpress.local_sgd(model, optimizer, "none", every=2)
    go(model, optimizer, range(2))
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [other]})  # not the model's: no matter of ours
    other.grad = torch.ones(3)
    go(model, optimizer, range(2, 4))
    model[0].requires_grad_(True)
    said = outcome(lambda: go(model, optimizer, range(4, 5)))
    outer.sync()
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    stranger = outcome(lambda: commpress.local_sgd(network(), new, every=2))
    commpress.local_sgd(model, new, "none", every=2)
    go(model, new, range(4, 8))
    return said, stranger, parameters_of(model)


def test_a_layer_that_is_trained_later_than_the_syncs_is_refused() -> None:
    one, other = run(2, unfrozen_later)
    assert same(one[2], other[2])
    for said, stranger, _ in (one, other):
        assert said.startswith("RuntimeError: commpress: parameter '0.weight' requires a gradient, but did not when")
        assert "this SGD holds none of the model's parameters" in stranger


def test_a_layer_that_one_rank_freezes_is_an_error_on_all() -> None:
    for said in run(2, alone):
        assert said.startswith("ValueError: rank 1 has frozen parameters ['2.weight', '2.bias'], rank 0 has []")
