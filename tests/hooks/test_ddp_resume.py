"""A training that was saved and taken up again goes on bit for bit as if it had not been interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow, slowly
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import INPUTS, SMALL_BUCKETS, WIDTH, Trained, network, same_training, sgd, train

import commpress

SPECS = ("int8", "int4", "sign", "topk(0.1)|int4", "topk(0.01)", "powersgd(2)")


def interrupted(
    spec: str, exchange: str | None, folder: str, bucket_cap_mb: float
) -> tuple[Trained, Trained, list[int]]:
    """Six steps unbroken; three steps, a checkpoint on disk, and three more by new objects; the saved buckets' sizes."""
    unbroken = DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb)
    commpress.attach(unbroken, spec, exchange=exchange)
    whole = train(unbroken, range(6))

    path = f"{folder}/{dist.get_rank()}.pt"
    first = DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb)
    session, optimizer = commpress.attach(first, spec, exchange=exchange), sgd(first)
    before = train(first, range(3), optimizer=optimizer)
    saved = {"model": first.module.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    torch.save(saved, path)
    train(first, range(3, 4), optimizer=optimizer)  # what happens afterwards must not reach the file

    state = torch.load(path, weights_only=True)
    second = DistributedDataParallel(network(99), bucket_cap_mb=bucket_cap_mb)
    session, optimizer = commpress.attach(second, spec, exchange=exchange), sgd(second)
    second.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    session.load_state_dict(state["session"])
    after = train(second, range(3, 6), optimizer=optimizer)
    pieced = Trained(after.parameters, before.gradients + after.gradients)
    return whole, pieced, [sum(n for _, n in bucket["segments"]) for bucket in state["session"]["memories"][0]]


def without_memories(spec: str) -> tuple[Trained, Trained]:
    """The same without the session's state: what resuming is good for."""
    unbroken = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(unbroken, spec)
    whole = train(unbroken, range(6))
    first = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(first, spec)
    optimizer = sgd(first)
    before = train(first, range(3), optimizer=optimizer)
    second = DistributedDataParallel(first.module, bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(second, spec)
    after = train(second, range(3, 6), optimizer=optimizer)
    return whole, Trained(after.parameters, before.gradients + after.gradients)


def saved(path: str) -> None:
    """A state of each rank after two steps of int4."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(ddp, "int4")
    train(ddp, range(2))
    torch.save(session.state_dict(), f"{path}/{session.rank}.pt")


def refusals(path: str) -> dict[str, str]:
    """What load_state_dict says to a state that does not belong here, by what differs."""
    me, W = dist.get_rank(), dist.get_world_size()

    def session(spec: str = "int4", model: nn.Module | None = None, **settings: Any) -> commpress.Session:
        return commpress.attach(DistributedDataParallel(model or network()), spec, **settings)

    own, other = (torch.load(f"{path}/{r % 2}.pt", weights_only=True) for r in (me, me + 1))
    if W != 2:
        here = session()
        return {"world size": outcome(lambda: here.load_state_dict(own | {"rank": me}))}
    wider = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 11))
    sessions = {
        "spec": session("int8"),
        "exchange": session(exchange="one_shot"),
        "feedback": session(error_feedback=False),
        "model": session(model=wider),
        "rank": session(),
        "version": session(),
        "fits": session(),
    }
    states = dict.fromkeys(sessions, own) | {"rank": other, "version": own | {"version": 0}}
    return {case: outcome(lambda c=case: sessions[c].load_state_dict(states[c])) for case in sessions}


@pytest.mark.parametrize(
    ("spec", "world_size"),
    slowly(
        [(spec, ranks) for spec in SPECS for ranks in (2, 3)],
        quick=[("int8", 2), ("int4", 2), ("sign", 3), ("topk(0.1)|int4", 2), ("powersgd(2)", 3)],
    ),
)
def test_resumed_is_unbroken(spec: str, world_size: int, tmp_path: Path) -> None:
    for whole, pieced, sizes in run(world_size, interrupted, spec, None, str(tmp_path), SMALL_BUCKETS):
        assert len(sizes) >= 3  # a new DDP module starts with a single bucket
        assert same_training(whole, pieced)


@pytest.mark.parametrize(("spec", "exchange"), [
    ("int4", "two_shot"), slow("int4", "one_shot"), slow("topk(0.1)", "two_shot"), ("bf16", None), ("none", None),
])  # fmt: skip
def test_resumed_is_unbroken_by_other_exchanges(spec: str, exchange: str | None, tmp_path: Path) -> None:
    for whole, pieced, _ in run(2, interrupted, spec, exchange, str(tmp_path), SMALL_BUCKETS):
        assert same_training(whole, pieced)


def test_resumed_in_one_bucket(tmp_path: Path) -> None:
    for whole, pieced, sizes in run(2, interrupted, "int4", None, str(tmp_path), 25):
        assert len(sizes) == 1
        assert same_training(whole, pieced)


def test_resumed_alone(tmp_path: Path) -> None:
    ((whole, pieced, _),) = run(1, interrupted, "int4", None, str(tmp_path), SMALL_BUCKETS)
    assert same_training(whole, pieced)


@pytest.mark.parametrize("spec", ["int4", "sign", "powersgd(2)"])
def test_without_the_memories_it_would_not_be(spec: str) -> None:
    for whole, pieced in run(2, without_memories, spec):
        assert not same_training(whole, pieced)


def test_a_state_that_does_not_belong_here_is_refused(tmp_path: Path) -> None:
    run(2, saved, str(tmp_path))
    for rank, said in enumerate(run(2, refusals, str(tmp_path))):
        assert said["fits"] == ""
        for case in set(said) - {"fits"}:
            assert said[case].startswith("ValueError: cannot restore: "), case
        for case, values in {
            "spec": ("int4", "int8"),
            "exchange": ("None", "one_shot"),
            "feedback": ("True", "False"),
            "rank": (f"rank {1 - rank}", f"this run has {rank}"),
            "version": ("version 0", "this run has"),
            "model": ("in the saved state", "in the model"),
        }.items():
            assert all(value in said[case] for value in values), said[case]
    for said in run(3, refusals, str(tmp_path)):
        assert "world_size 2, this run has 3" in said["world size"]
