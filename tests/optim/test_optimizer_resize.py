"""A training goes on with another number of ranks: what feedback and momenta held is kept in total."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import outcome, run
from tiers import slow
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, WIDTH, Trained, adrift, network, same_training, train

import commpress
from commpress import optim
from commpress.optim.eigenbasis import BASIS, LONG

STEPS = 7
COORDINATES = "EF21Muon in other coordinates"
LATE = 13
"""Steps after which all of its three matrices are in other coordinates."""


def started(name: str, spec: str, exchange: str | None) -> tuple[DistributedDataParallel, torch.optim.Optimizer, Any]:
    """A model, its optimizer and its session."""
    model = network(width=LONG if name == COORDINATES else WIDTH)
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS)
    optimizer: torch.optim.Optimizer
    if name == "OneBitAdamW":
        optimizer = optim.OneBitAdamW(ddp.parameters(), lr=0.01, warmup_steps=3)
    elif name == "ZeroOneAdamW":
        optimizer = optim.ZeroOneAdamW(ddp.parameters(), lr=0.01, warmup_steps=3, sync_every=4)
    elif name == "DGC":
        optimizer = optim.DGC(ddp.parameters(), lr=0.05)
    elif name in ("EF21Muon", COORDINATES):
        optimizer = optim.EF21Muon(ddp, lr=0.01)
    else:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    behind = optimizer if isinstance(optimizer, optim.CompressedOptimizer) else None
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=behind, exchange=exchange)


def before(name: str, spec: str, exchange: str | None, folder: str) -> None:
    """A few steps, and what every rank saves."""
    ddp, optimizer, session = started(name, spec, exchange)
    train(ddp, range(LATE if name == COORDINATES else STEPS), optimizer=optimizer)
    saved = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    torch.save(saved, f"{folder}/{session.rank}.pt")


def after(name: str, spec: str, exchange: str | None, folder: str, ranks: int) -> tuple[dict[str, Any], Trained]:
    """What this rank has taken over from so many, and four more steps."""
    states = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in reversed(range(ranks))]
    ddp, optimizer, session = started(name, spec, exchange)
    ddp.module.load_state_dict(states[-1]["model"])
    optimizer.load_state_dict(states[-1]["optimizer"])
    session.load_state_dict([state["session"] for state in states])
    taken = session.state_dict()
    if name == COORDINATES:
        own, saved = (state["state"].values() for state in (optimizer.state_dict(), states[-1]["optimizer"]))
        kept = [torch.equal(a[key], b[key]) for a, b in zip(own, saved, strict=True) for key in BASIS if key in b]
        assert kept == [True] * 6  # of three matrices
    at = LATE if name == COORDINATES else STEPS
    trained = train(ddp, range(at, at + 4), optimizer=optimizer)  # in which a matrix changes its coordinates again
    if name == COORDINATES:
        assert adrift(ddp, optimizer, session)[0] < 1e-5
    return taken, trained


def refusals(folder: str) -> dict[str, str]:
    """What is said to states that are not those of all ranks of one run."""
    states = [torch.load(f"{folder}/{rank}.pt", weights_only=True)["session"] for rank in range(4)]
    _, _, session = started("OneBitAdamW", "sign", "two_shot")
    other = {**states[3], "settings": {**states[3]["settings"], "codec": "int4"}}
    cases = {"none": [], "missing": states[:3], "twice": [*states[:3], states[0]], "other": [*states[:3], other]}
    return {case: outcome(lambda s=given: session.load_state_dict(s)) for case, given in cases.items()}


def totals(states: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """What the next mean will get from the ranks' memories, by bucket."""
    total: dict[str, Tensor] = {}
    for state in states:
        for bucket in state["memories"][0]:
            whole = torch.zeros(sum(n for _, n in bucket["segments"]), dtype=torch.float64)
            if bucket[key] is not None:
                whole += bucket[key].double() / len(states)
            if key == "residual" and bucket["owner_residual"] is not None:
                start = bucket["owner_start"]
                whole[start : start + bucket["owner_residual"].numel()] += bucket["owner_residual"].double()
            name = str(bucket["segments"])
            total[name] = total[name] + whole if name in total else whole
    return total


@pytest.mark.parametrize(("name", "spec", "exchange", "old", "new"), [
    slow("OneBitAdamW", "sign", "two_shot", 4, 2), ("OneBitAdamW", "topk(0.1)|int4", None, 2, 3),
    ("ZeroOneAdamW", "sign", "two_shot", 2, 3), slow("ZeroOneAdamW", "topk(0.1)|int4", None, 4, 2),
    ("DGC", "sign", "two_shot", 4, 2), slow("DGC", "topk(0.1)|int4", None, 2, 3),
    ("EF21Muon", "sign", "two_shot", 3, 2), slow("EF21Muon", "topk(0.1)|sign", None, 2, 3),
    slow(COORDINATES, "int4", "two_shot", 3, 2), slow(COORDINATES, "sign", "one_shot", 2, 3),
    ("SGD", "sign", "two_shot", 2, 3), slow("SGD", "topk(0.1)|int4", None, 4, 2),
])  # fmt: skip
def test_nothing_is_lost(name: str, spec: str, exchange: str | None, old: int, new: int, tmp_path: Path) -> None:
    run(old, before, name, spec, exchange, str(tmp_path))
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(old)]
    results = run(new, after, name, spec, exchange, str(tmp_path), old)
    states = [taken for taken, _ in results]
    for key in ("residual", "momentum"):
        there, here = (totals(of, key) for of in ([s["session"] for s in saved], states))
        assert there.keys() == here.keys()
        for bucket in there:
            torch.testing.assert_close(here[bucket], there[bucket], rtol=1e-5, atol=1e-6)
        assert any(bool(t.any()) for t in there.values()) == (
            key == "residual" or name in ("DGC", "EF21Muon", COORDINATES)
        )
    assert not any(bucket["owner_residual"] is not None for state in states for bucket in state["memories"][0])
    if name == "ZeroOneAdamW":  # a rank's own drift becomes the mean of all
        for part, values in states[0]["optimizer"]["0.weight"].items():
            of_all = torch.stack([s["session"]["optimizer"]["0.weight"][part] for s in saved]).mean(dim=0)
            torch.testing.assert_close(values, of_all, rtol=1e-6, atol=1e-8)  # summed in another order
    else:
        for _, trained in results[1:]:
            assert same_training(trained, results[0][1])


@pytest.mark.parametrize("name", ["OneBitAdamW", "ZeroOneAdamW"])
def test_as_many_ranks_go_on_with_their_own(name: str, tmp_path: Path) -> None:
    run(2, before, name, "sign", None, str(tmp_path))
    for rank, (taken, _) in enumerate(run(2, after, name, "sign", None, str(tmp_path), 2)):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)["session"]
        torch.testing.assert_close(taken["optimizer"], saved["optimizer"], rtol=0, atol=0)
        for one, other in zip(taken["memories"][0], saved["memories"][0], strict=True):
            assert one["segments"] == other["segments"]
            assert torch.equal(one["residual"], other["residual"])


def test_states_that_are_not_all_are_refused(tmp_path: Path) -> None:
    run(4, before, "OneBitAdamW", "sign", "two_shot", str(tmp_path))
    for said in run(2, refusals, str(tmp_path)):
        assert "no states" in said["none"]
        assert "states of ranks [0, 1, 2], expected one of each of 4" in said["missing"]
        assert "expected one of each of 4" in said["twice"]
        assert "rank 3 saved settings" in said["other"]
        assert all(text.startswith("ValueError: cannot restore: ") for text in said.values())
