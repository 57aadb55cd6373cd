"""Restoring is collective: what one rank alone loads is an error on all; torch's distributed checkpoint takes a session."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import outcome, run
from tiers import slow, slowly
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, WIDTH, Trained, by_dimensions, loss_of, network, same_training, sgd, train

import commpress
from commpress.optim import DGC, EF21Muon, OneBitAdamW, ZeroOneAdamW
from commpress.optim.eigenbasis import LONG

HOST = socket.gethostname()
PATIENT = 300.0
"""Timeout of the process group in seconds, far beyond that of the test: whoever waits for it fails the test."""


def attached(spec: str = "int4") -> tuple[Any, Any]:
    """A network and its session."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    return ddp, commpress.attach(ddp, spec)


def restored(case: str, kind: str = "ddp") -> list[str]:
    """What `load_state_dict` says, then a backward, where the ranks do not load the same."""
    make = attached if kind == "ddp" else sharded
    ddp, session = make()
    train(ddp, range(2))
    early = session.state_dict()
    train(ddp, range(2, 4))
    late = session.state_dict()
    everyone: list[Any] = [None] * session.world_size
    dist.all_gather_object(everyone, dict(late))
    ddp, session = make()
    first = dist.get_rank() == 0
    states = {
        "nothing on one": late if first else None,
        "none": late if first else "None",
        "another's": late if first else everyone[0],
        "another step": late if first else early,
        "another version": late if first else dict(late) | {"version": 1},
        "the same": late,
    }
    said = []
    if (state := states[case]) is not None:
        said.append(outcome(lambda: session.load_state_dict(None if state == "None" else state)))
    if case in ("nothing on one", "the same") and not any(said):
        said.append(outcome(lambda: loss_of(ddp, 4).backward()))
    return said


def sharded() -> tuple[Any, Any]:
    """A sharded network and its session."""
    model: Any = network()
    for part in (model[0], model[2], model):
        fully_shard(part)
    return model, commpress.attach(model, gradients="int4", parameters="int8")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("case", "values"), [
    ("none", ("rank 1", "NoneType", "session.state_dict()")),
    ("another's", ("rank 1", "the saved state has rank 0, this run has 1")),
    ("another step", ("rank 1's state has step 2, rank 0's has 4", "session.state_dict() of every rank")),
    ("another version", ("rank 1", "has version 1, this run has")),
])  # fmt: skip
def test_what_one_rank_alone_loads_is_an_error_on_all(case: str, values: tuple[str, ...], kind: str) -> None:
    for rank, said in enumerate(run(2, restored, case, kind, group_timeout=PATIENT)):
        assert said[0].startswith(("ValueError: ", "TypeError: "))
        for value in values:
            if value != "rank 1" or rank == 0:
                assert value in said[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_that_restores_nothing_is_an_error_on_all(kind: str) -> None:
    for said in run(2, restored, "nothing on one", kind, group_timeout=PATIENT, fresh=True):
        assert f"rank 0 ({HOST}) has a state to restore" in said[0]
        assert f"rank 1 ({HOST}) has " in said[0]


def local() -> tuple[Any, Any]:
    """A network under local steps, and its outer syncs."""
    model = network()
    optimizer = sgd(model)
    outer = commpress.local_sgd(model, optimizer, "int8", every=2)
    train(model, range(2), optimizer=optimizer)
    return model, outer


def loads_no_state(kind: str) -> dict[str, str]:
    """What is said where rank 1 alone loads something that is no state of ours, or half of one."""
    model, session = {"ddp": attached, "fsdp": sharded, "local": local}[kind]()
    if kind == "ddp":
        train(model, range(2))
    whole = session.state_dict()
    state: dict[str, Any] = dict(whole)
    first = {"ddp": "memories", "fsdp": "memories", "local": "fragments"}[kind]
    steps = "steps" if kind == "local" else "step"
    others = {key: {k: v for k, v in state.items() if k != key} for key in (first, steps)}
    others |= {"a text": "a text", "a number": 5, first + " of another kind": {**state, first: "a text"}}  # type: ignore[dict-item]
    if kind == "ddp":
        others |= {key: {k: v for k, v in state.items() if k != key} for key in ("scale", "optimizer")}
        for key in ("residual", "owner_residual", "segments"):
            buckets = [{k: v for k, v in bucket.items() if k != key} for bucket in state["memories"][0]]
            others[f"a bucket's {key}"] = {**state, "memories": [buckets]}
    second = dist.get_rank() == 1
    return {
        name: outcome(lambda other=other: session.load_state_dict(other if second else whole))  # type: ignore[misc]
        for name, other in others.items()
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "local"])
def test_what_is_no_state_is_an_error_on_all_ranks(kind: str) -> None:
    one, other = run(2, loads_no_state, kind, group_timeout=PATIENT)
    for name, said in one.items():
        assert "rank 1" in said, name
        assert said.startswith("ValueError: ")
        assert other[name].startswith(("ValueError: ", "TypeError: "))


def begins_without(which: int, own_traffic: bool) -> str:
    """One rank begins to train a model whose buffers DDP broadcasts, while the other restores a state."""
    model = network()
    model[1] = nn.BatchNorm1d(64)
    ddp = DistributedDataParallel(model)
    session = commpress.attach(ddp, "int4", buffers="int8" if own_traffic else None)
    if dist.get_rank() == which:
        return outcome(lambda: loss_of(ddp, 0))
    return outcome(lambda: session.load_state_dict(session.state_dict()))


@pytest.mark.parametrize("own_traffic", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_begins_to_train_while_others_restore_is_an_error_before_buffers_travel(
    which: int, own_traffic: bool
) -> None:
    for said in run(2, begins_without, which, own_traffic, group_timeout=PATIENT, fresh=True):
        assert f"rank {which} ({HOST}) has the first forward" in said
        assert f"rank {1 - which} ({HOST}) has a state to restore" in said


def test_the_same_on_all_is_restored() -> None:
    assert run(2, restored, "the same") == [["", ""]] * 2


# --- torch.distributed.checkpoint --------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "SGD": None,
    "SGD, factors": None,
    "OneBitAdamW": lambda p: OneBitAdamW(p, lr=1e-3, warmup_steps=2),
    "ZeroOneAdamW": lambda p: ZeroOneAdamW(p, lr=1e-3, warmup_steps=2, sync_every=2),
    "DGC": lambda p: DGC(p, lr=0.05),
    "EF21Muon": lambda p: EF21Muon(by_dimensions(p), lr=0.01),
    "EF21Muon, coordinates": lambda p: EF21Muon(by_dimensions(p), lr=0.01),
}
SPECS = {
    "EF21Muon": "sign",
    "EF21Muon, coordinates": "int4",
    "SGD": "int4",
    "SGD, factors": "powersgd(2)",
    "OneBitAdamW": "sign",
    "ZeroOneAdamW": "sign",
    "DGC": "topk(0.1)",
}
SAVED = {"EF21Muon, coordinates": 14}
"""Steps before a checkpoint, if not 4."""


def started(kind: str, seed: int) -> tuple[Any, Any, Any]:
    """A DDP network, its optimizer and session."""
    model = network(seed, width=LONG if kind in SAVED else WIDTH)
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS)
    if (make := KINDS[kind]) is None:
        return ddp, sgd(ddp), commpress.attach(ddp, SPECS[kind])
    optimizer = make(ddp.parameters())
    return ddp, optimizer, commpress.attach(ddp, SPECS[kind], optimizer=optimizer)


def save(kind: str, folder: str, asynchronously: bool = False) -> tuple[Trained, Trained, float, dict[str, Tensor]]:
    """Steps and a checkpoint; the four that follow; the total of what feedback keeps, as it counts in a mean; factors."""
    ddp, optimizer, session = started(kind, 0)
    at = SAVED.get(kind, 4)
    before = train(ddp, range(at), optimizer=optimizer)
    content = {
        "model": ddp.module,
        "commpress": session,
        "optimizer": Plain(optimizer) if KINDS[kind] is None else optimizer,
    }
    if asynchronously:
        dcp.async_save(content, checkpoint_id=folder).result()
    else:
        dcp.save(content, checkpoint_id=folder)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), f"{folder}.pt")
    dist.barrier()
    kept, factors = withheld(session), factors_of(session)
    return before, train(ddp, range(at, at + 4), optimizer=optimizer), kept, factors


class Plain:
    """Nothing: an optimizer's own state goes beside, since what is not a session is DCP's and the user's matter."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """The rate."""
        return {"lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rate."""
        self.lr = state["lr"]


def load(kind: str, folder: str) -> tuple[Trained, float, dict[str, Tensor]]:
    """The four steps that follow, by new objects; what these hold of factors at first."""
    ddp, optimizer, session = started(kind, 99)
    dcp.load({"model": ddp.module}, checkpoint_id=folder)
    if KINDS[kind] is None:
        optimizer.load_state_dict(torch.load(f"{folder}.pt", weights_only=True))
        dcp.load({"commpress": session}, checkpoint_id=folder)
    else:  # whose state comes with the session
        dcp.load({"commpress": session, "optimizer": optimizer}, checkpoint_id=folder)
    kept, factors = withheld(session), factors_of(session)
    at = SAVED.get(kind, 4)
    return train(ddp, range(at, at + 4), optimizer=optimizer), kept, factors


def factors_of(session: Any) -> dict[str, Tensor]:
    """The factors that a session begins its next step with, by parameter."""
    return {name: q for bucket in session.state_dict()["memories"][0] for name, q in bucket["factors"]}


def withheld(session: Any) -> float:
    """The mean over the ranks of what they withhold."""
    total = torch.zeros((), dtype=torch.float64)
    for bucket in session.state_dict()["memories"][0]:
        for key, weight in (("residual", 1.0), ("owner_residual", float(session.world_size))):
            if bucket[key] is not None:
                total += weight * bucket[key].double().sum()
    dist.all_reduce(total)
    return float(total) / session.world_size


@pytest.mark.parametrize(
    ("kind", "asynchronously"),
    slowly(
        [(kind, False) for kind in KINDS] + [("SGD", True)],
        quick=[("SGD", False), ("SGD", True), ("SGD, factors", False), ("OneBitAdamW", False)],
    ),
)
def test_a_session_goes_on_bit_for_bit_from_torchs_distributed_checkpoint(
    kind: str, asynchronously: bool, tmp_path: Path
) -> None:
    whole = run(2, save, kind, str(tmp_path / "c"), asynchronously)
    for (_, after, *_), (again, *_) in zip(whole, run(2, load, kind, str(tmp_path / "c")), strict=True):
        assert same_training(after, again)


def rolled_back(kind: str, folder: str, young: int | None) -> tuple[Trained, Trained, int]:
    """Four steps behind a checkpoint, and again after it was loaded into the same objects, or into those of a training that is
    `young` steps old; matrices in other coordinates."""
    ddp, optimizer, session = started(kind, 0)
    at = SAVED.get(kind, 4)
    train(ddp, range(at), optimizer=optimizer)
    dcp.save({"model": ddp, "commpress": session, "optimizer": optimizer}, checkpoint_id=folder)
    first = train(ddp, range(at, at + 4), optimizer=optimizer)
    if young is not None:
        ddp, optimizer, session = started(kind, 99)
        train(ddp, range(young), optimizer=optimizer)
    dcp.load({"model": ddp, "commpress": session, "optimizer": optimizer}, checkpoint_id=folder)
    again = train(ddp, range(at, at + 4), optimizer=optimizer)
    return first, again, sum("basis_vectors" in state for state in optimizer.state.values())


@pytest.mark.parametrize(("kind", "young"), [
    ("EF21Muon", None), slow("EF21Muon, coordinates", None), ("EF21Muon, coordinates", 2), slow("OneBitAdamW", None),
    slow("ZeroOneAdamW", None), slow("DGC", None), slow("EF21Muon", 1), slow("OneBitAdamW", 3), slow("ZeroOneAdamW", 3),
    slow("DGC", 1),
])  # fmt: skip
def test_objects_that_train_take_a_checkpoint_back(kind: str, young: int | None, tmp_path: Path) -> None:
    """In DCP's order: the session, which has all, before the optimizer, of which DCP reads what it has now."""
    for first, again, turned in run(2, rolled_back, kind, str(tmp_path / "c"), young):
        assert same_training(first, again)
        assert turned == (3 if kind == "EF21Muon, coordinates" else 0)


def back_to_the_start(folder: str) -> tuple[Trained, Trained]:
    """Steps behind an early checkpoint, over the choice of coordinates, and again after it was loaded without the optimizer."""
    ddp, optimizer, session = started("EF21Muon, coordinates", 0)
    train(ddp, range(2), optimizer=optimizer)
    content = {"model": ddp, "commpress": session}
    dcp.save(content, checkpoint_id=folder)
    first = train(ddp, range(2, 14), optimizer=optimizer)
    dcp.load(content, checkpoint_id=folder)
    return first, train(ddp, range(2, 14), optimizer=optimizer)


@pytest.mark.slow
def test_the_sessions_part_of_a_checkpoint_is_enough(tmp_path: Path) -> None:
    for first, again in run(2, back_to_the_start, str(tmp_path / "c")):
        assert same_training(first, again)


@pytest.mark.parametrize(("old", "new", "kind"), [
    (3, 2, "SGD"), slow(2, 3, "SGD"), slow(2, 1, "SGD"), (3, 2, "OneBitAdamW"), slow(2, 3, "ZeroOneAdamW"),
    (2, 3, "SGD, factors"), slow(3, 2, "SGD, factors"), slow(3, 2, "EF21Muon, coordinates"),
])  # fmt: skip
def test_another_number_of_ranks_loads_it_and_nothing_is_lost(old: int, new: int, kind: str, tmp_path: Path) -> None:
    saved = run(old, save, kind, str(tmp_path / "c"))
    ranks = run(new, load, kind, str(tmp_path / "c"))
    for trained, kept, factors in ranks:
        assert kept == pytest.approx(saved[0][2], rel=1e-4, abs=1e-5)
        assert factors.keys() == saved[0][3].keys()  # also on a rank that had no state
        assert all(torch.equal(q, saved[0][3][name]) for name, q in factors.items())
        assert bool(factors) == (kind == "SGD, factors")
        assert len(trained.parameters) == 6
    if kind != "ZeroOneAdamW":  # whose replicas drift between syncs
        assert all(
            torch.equal(a, b) for one, *_ in ranks for a, b in zip(one.parameters, ranks[0][0].parameters, strict=True)
        )


def damaged(kind: str, folder: str) -> str:
    """What loading says of a checkpoint with a flipped bit in what commpress saved."""
    _, _, session = started(kind, 0)
    return outcome(lambda: dcp.load({"commpress": session}, checkpoint_id=folder))


def test_damage_of_what_a_rank_saved_is_noticed_on_all_ranks(tmp_path: Path) -> None:
    run(2, save, "SGD", str(tmp_path / "c"))
    file = max((tmp_path / "c").glob("__1_*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    place = content.rfind(b"residual")
    content[place] ^= 1
    file.write_bytes(bytes(content))
    for said in run(2, damaged, "SGD", str(tmp_path / "c"), group_timeout=PATIENT):
        assert "what rank 1 saved is damaged in the checkpoint" in said


def sharded_save(folder: str) -> tuple[float, int]:
    """A sharded model's checkpoint; the total of what feedback keeps, as it counts in a mean."""
    model, session = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "commpress": session}, checkpoint_id=folder)
    return sharded_withheld(session), len(session.state_dict()["memories"][0])


def sharded_load(folder: str) -> tuple[float, list[float]]:
    """The same by another number of ranks, and the losses that follow."""
    model, session = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments, "commpress": session}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return sharded_withheld(session), step(model, optimizer, range(3, 6))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of some steps."""
    losses = []
    for at in steps:
        optimizer.zero_grad()
        loss = loss_of(model, at)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded_withheld(session: Any) -> float:
    """The mean over the ranks of what they withhold."""
    total = torch.zeros((), dtype=torch.float64)
    for memory in session.state_dict()["memories"][0]:
        total += memory["residual"].double().sum()
    dist.all_reduce(total)
    return float(total) / session.world_size


@pytest.mark.parametrize(("old", "new"), [(2, 3), slow(3, 2), slow(2, 2), (3, 1)])
def test_a_sharded_session_is_loaded_by_another_number_of_ranks(old: int, new: int, tmp_path: Path) -> None:
    kept, _ = run(old, sharded_save, str(tmp_path))[0]
    for now, losses in run(new, sharded_load, str(tmp_path)):
        assert now == pytest.approx(kept, rel=1e-4, abs=1e-5)
        assert all(loss < 5 for loss in losses)


def on_a_mesh(bad_rank: int) -> str:
    """What is said on a mesh of two replicas of two shards when one rank has no state."""
    from torch.distributed.device_mesh import init_device_mesh

    model: Any = network()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    session = commpress.attach(model, gradients="int4", parameters="int8")
    loss_of(model, 0).backward()
    state = None if dist.get_rank() == bad_rank else session.state_dict()
    return outcome(lambda: session.load_state_dict(state))


@pytest.mark.parametrize("bad_rank", [slow(0), 3])
def test_a_rank_without_a_state_is_an_error_along_all_dimensions_of_a_mesh(bad_rank: int) -> None:
    for said in run(4, on_a_mesh, bad_rank, group_timeout=PATIENT, fresh=True):
        assert "expected the dict that this rank saved, got a NoneType" in said
