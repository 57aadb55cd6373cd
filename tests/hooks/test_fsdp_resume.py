"""A sharded training that was saved by torch's distributed checkpoint, and taken up again, goes on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import outcome, run
from tiers import slow
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import Trained, loss_of, network, same, same_training

import commpress


def attached(seed: int, specs: tuple[str, str], replicas: int = 1, **settings: Any) -> tuple[Any, Any, Any]:
    """A sharded network, its session and its optimizer."""
    model: Any = network(seed)
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    session = commpress.attach(model, gradients=specs[0], parameters=specs[1], **settings)
    return model, session, torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Trained:
    """This rank's shards, and of their gradients those of each step."""
    trained = Trained([])
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        trained.gradients.append([p.grad.to_local().clone() for p in model.parameters()])  # type: ignore[union-attr]
        optimizer.step()
    trained.parameters = [p.detach().to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    return trained


def interrupted(specs: tuple[str, str], folder: str, replicas: int, keep_memories: bool) -> tuple[Trained, Trained]:
    """Six steps unbroken; three steps, a checkpoint on disk, and three more by new objects."""
    model, _, optimizer = attached(0, specs, replicas)
    whole = train(model, optimizer, range(6))

    model, session, optimizer = attached(0, specs, replicas)
    before = train(model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    torch.save(session.state_dict(), f"{folder}/session-{session.rank}.pt")
    train(model, optimizer, range(3, 4))  # what happens afterwards must not reach the files

    model, session, optimizer = attached(99, specs, replicas)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if keep_memories:
        session.load_state_dict(torch.load(f"{folder}/session-{session.rank}.pt", weights_only=True))
    after = train(model, optimizer, range(3, 6))
    return whole, Trained(after.parameters, before.gradients + after.gradients)


def refusals() -> dict[str, str]:
    """What load_state_dict says to a state that does not belong here, by what differs; and what a good one brings back."""
    model, session, optimizer = attached(0, ("int4", "int8"))
    train(model, optimizer, range(2))
    own = session.state_dict()
    everyone: list[Any] = [None] * session.world_size
    dist.all_gather_object(everyone, own)
    me = session.rank

    def load(state: Any, specs: tuple[str, str] = ("int4", "int8"), **settings: Any) -> str:
        other = attached(0, specs, **settings)[1]
        return outcome(lambda: other.load_state_dict(state))

    fresh = attached(0, ("int4", "int8"))[1]
    fresh.load_state_dict(own)
    again = fresh.state_dict()["memories"][0]
    return {
        "gradients": load(own, ("int8", "int8")),
        "parameters": load(own, ("int4", "none")),
        "feedback": load(own, error_feedback=False),
        "rank": load(everyone[1 - me]),
        "all ranks": load(everyone),
        "version": load(own | {"version": 0}),
        "model": load(own | {"holds": "2 with 5 values"}),
        "world size": load(own | {"world_size": 4}),
        "restored": str(
            [same([a["residual"]], [b["residual"]]) for a, b in zip(again, own["memories"][0], strict=True)]
        ),
        "kept without feedback": str(sum(b["residual"] is not None for b in kept_without_feedback())),
    }


def kept_without_feedback() -> list[Any]:
    """What is in the state of a session that keeps nothing."""
    model, session, optimizer = attached(0, ("int4", "int8"), error_feedback=False)
    train(model, optimizer, range(2))
    return list(session.state_dict()["memories"][0])


@pytest.mark.parametrize(("specs", "world_size", "replicas"), [
    slow(("int4", "int8"), 2, 1),
    (("int4", "delta|int4"), 2, 1),
    slow(("topk(0.1)|int4", "int4"), 3, 1),
    slow(("none", "delta|int4"), 4, 2),
    slow(("sign", "none"), 2, 1),
    slow(("int4", "none"), 4, 2),
    slow(("topk(0.1)|int4", "int8"), 3, 3),
])  # fmt: skip
def test_a_resumed_training_goes_on_bit_for_bit(
    specs: tuple[str, str], world_size: int, replicas: int, tmp_path: Path
) -> None:
    for whole, pieced in run(world_size, interrupted, specs, str(tmp_path), replicas, True):
        assert same_training(whole, pieced)


def test_without_its_memories_it_does_not(tmp_path: Path) -> None:
    for whole, pieced in run(2, interrupted, ("int4", "int8"), str(tmp_path), 1, False):
        assert same(whole.gradients[2], pieced.gradients[2])
        assert not same(whole.gradients[3], pieced.gradients[3])


def test_a_state_that_does_not_belong_here_is_refused() -> None:
    for rank, said in enumerate(run(2, refusals)):
        assert "cannot restore: the saved state has gradients {'codec': 'int4'" in said["gradients"]
        assert "this run has {'codec': 'int8'" in said["gradients"]
        assert "cannot restore: the saved state has parameters {'codec': 'int8'" in said["parameters"]
        assert "'error_feedback': False" in said["feedback"]
        assert said["rank"] == f"ValueError: cannot restore: the saved state has rank {1 - rank}, this run has {rank}"
        assert said["all ranks"].startswith("TypeError: expected the dict that this rank saved, got a list")
        assert "has version 0, this run has 5" in said["version"]
        assert "has holds '2 with 5 values', this run has '6 with 6922 values'" in said["model"]
        assert "has world_size 4, this run has 2" in said["world size"]
        assert said["restored"] == "[True, True, True]"
        assert said["kept without feedback"] == "0"
