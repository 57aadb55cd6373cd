"""`attach(model)` under FSDP2, without a spec: plain at first, one choice on all ranks, nothing lost when the spec changes."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_auto import CLOCK, PLAIN_STEPS, Scripted
from test_fsdp import by_two, sharded, shards_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from training import Trained, loss_of, same, same_training, sgd

import commpress
from commpress.comm.auto import Auto
from commpress.comm.search import Search


def trained(model: nn.Module, steps: int) -> Trained:
    optimizer, got = sgd(model), Trained([])
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        got.gradients.append([None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()])
        optimizer.step()
    got.parameters = shards_of(model)
    return got


def first_steps() -> tuple[Trained, Trained]:
    plain, attached = sharded(), sharded()
    commpress.attach(attached)
    return trained(plain, PLAIN_STEPS), trained(attached, PLAIN_STEPS)


def test_the_first_steps_have_the_bits_of_plain_training() -> None:
    for plain, attached in run(2, first_steps):
        assert same_training(plain, attached)


def searched() -> dict[str, Any]:
    """What ranks choose whose clocks say that int4 is the fastest, and what they say of it."""
    model = sharded()
    with (
        mock.patch.object(Search, "medians", lambda self: {spec: CLOCK[spec] for spec in self._seconds}),
        mock.patch.object(
            Search, "turns", lambda self: {spec: [CLOCK[spec]] * (self._round + 1) for spec in self._seconds}
        ),
        mock.patch.object(Auto, "_predicted", return_value=CLOCK),
    ):
        session = commpress.attach(model)
        trained(model, 45)
    full = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
    return {
        "parameters": full,
        "explained": session.explain(),
        "spec": session.report().spec,
        "receipt": str(session.receipt()),
        "sent": {row.spec: row.sent_bytes / row.steps for row in session.report().rows if row.bucket == 0},
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_choose_the_same(world_size: int) -> None:
    first, *others = run(world_size, searched)
    assert first["spec"] == "gradients auto, parameters none; auto: int4"
    assert "auto: int4, chosen after" in first["explained"]
    assert "a step takes 0.5000 s, without compression 1.0000 s" in first["receipt"]
    assert 0 < first["sent"]["int4"] < first["sent"]["int8"] < first["sent"]["none"]
    for other in others:
        assert same(other["parameters"], first["parameters"])
        assert other["explained"] == first["explained"]


def predicted() -> dict[str, Any]:
    """The predictions of a real search, from what the ranks have measured."""
    model = sharded()
    session = commpress.attach(model)
    trained(model, 45)
    assert session._auto is not None
    assert session._auto.choice is not None
    return {trial.spec: trial.predicted for trial in session._auto.choice.trials}


def test_the_model_ranks_specs_from_what_was_measured() -> None:
    first, second = run(2, predicted)
    assert first == second
    assert set(first) == set(CLOCK)
    assert all(seconds > 0 for seconds in first.values())


def summed(*specs: str) -> tuple[Tensor, Tensor]:
    """The sum of the means that arrived in so many steps of one gradient, and what it should be."""
    model = fully_shard(nn.Linear(600, 2, bias=False))
    session = commpress.attach(model)
    assert session._auto is not None
    session._auto.search = Scripted(*specs)  # type: ignore[assignment]
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(dist.get_rank()))
    arrived = torch.zeros(2, 600)
    for _ in specs:
        model.zero_grad()
        model(x).sum().backward()
        arrived += model.weight.grad.full_tensor()  # type: ignore[union-attr, operator]
    bare = nn.Linear(600, 2, bias=False)
    bare(x).sum().backward()
    assert bare.weight.grad is not None
    dist.all_reduce(bare.weight.grad, dist.ReduceOp.AVG)
    return arrived, len(specs) * bare.weight.grad


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_feedback_holds_arrives_when_the_spec_changes(world_size: int) -> None:
    for arrived, wanted in run(world_size, summed, "int4", "int4", "int8", "int4", "none"):
        assert torch.allclose(arrived, wanted, rtol=1e-5, atol=1e-5)
    for arrived, wanted in run(world_size, summed, "int4", "int4"):
        assert not torch.allclose(arrived, wanted, rtol=1e-5, atol=1e-5)


def refusals() -> dict[str, str]:
    return {
        "replicas": outcome(lambda: commpress.attach(by_two())),
        "differ": outcome(lambda: commpress.attach(sharded(), ("int4", "auto", "int4", "int4")[dist.get_rank()])),
        "budget": outcome(lambda: commpress.attach(sharded(), "auto(error=0)")),
        "no budget": outcome(lambda: commpress.attach(sharded(), "auto(error=0.3)")),
    }


def test_what_auto_cannot_do_is_refused_by_name_on_all_ranks() -> None:
    for got in run(4, refusals):
        assert "auto works on a mesh of shards alone; expected a spec" in got["replicas"]
        assert "rank 1 has" in got["differ"]
        assert "expected an error above 0" in got["budget"]
        assert "auto(error=0.3): the error of sharded means is not measured" in got["no budget"]
