"""EF21Muon under DeepSpeed: at ZeRO 0 as under DDP, at ZeRO 1 and 2 sharded, as under FSDP2."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import RANKS, engine, rows, same_on_all_ranks, train, weights
from ranks import outcome, run
from scripted import Scripted
from tiers import slow
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import adrift, by_dimensions, exact_products, network, same
from training import train as train_ddp

import commpress
from commpress.hooks.deepspeed import attach
from commpress.optim import EF21Muon

LIBRARIES = ("engines",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

SMALL = {"reduce_bucket_size": 3000}
WIDE = 256
"""A width at which matrices are coded in other coordinates."""
Make = Callable[[Iterable[Tensor]], EF21Muon]


def muon(parameters: Iterable[Tensor], **settings: Any) -> EF21Muon:
    """An EF21Muon of the network, biases apart."""
    return EF21Muon(by_dimensions(parameters), **{"lr": 1e-2, "others_spec": "none", **settings})


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """How far the parameters of one training are from the other's, as a share of how far that one went."""
    start = [p.detach() for p in network().parameters()]
    a, b, c = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (one, other, start))
    return float((a - b).norm() / (b - c).norm())


SETUPS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2, "zero": SMALL},
    "ZeRO 2, accumulated": {"stage": 2, "gradient_accumulation_steps": 2},
}


@exact_products
def beside_ddp(names: list[str]) -> list[tuple[str, float, bool]]:
    """How far engines in which nothing is left out are from DDP, and whether their ranks have the same bits."""
    found = []
    for name in names:
        e = engine(**SETUPS[name], optimizer=muon, gradient_clipping=0.0)
        attach(e, "none")
        accumulate = SETUPS[name].get("gradient_accumulation_steps", 1)
        train(e, range(8 * accumulate))
        ddp = DistributedDataParallel(network())
        optimizer = muon(ddp.parameters())
        commpress.attach(ddp, "none", optimizer=optimizer)
        train_ddp(ddp, range(8), optimizer=optimizer, accumulate=accumulate)
        apart = distance(weights(e), [p.detach() for p in ddp.parameters()])
        found.append((name, apart, same_on_all_ranks(weights(e))))
    return found


@pytest.mark.parametrize("names", [["ZeRO 2"], slow(["ZeRO 0", "ZeRO 1", "ZeRO 2, accumulated"])], ids=" and ".join)
def test_exact_it_steps_as_under_ddp(names: list[str]) -> None:
    for found in run(RANKS, beside_ddp, names, timeout=120):
        for name, apart, alike in found:
            assert apart < 1e-3, (name, apart)
            assert alike, name


CODED: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2, "zero": SMALL},
    "ZeRO 2, bf16": {"stage": 2, "bf16": {"enabled": True}},
}


def coded(name: str) -> dict[str, Any]:
    """A training by `sign`, with parameters by `int4`: losses before and after, what is held and what was sent."""
    e = engine(**CODED[name], optimizer=lambda p: muon(p, others_spec="int8", max_norm=1.0))
    session = attach(e, "sign", parameters="int4")
    losses = train(e, range(25))
    tensors = [x for state in e.basic_optimizer.state.values() for x in state.values()]
    return {
        "losses": (losses[0], losses[-1]),
        "agree": same_on_all_ranks(weights(e)),
        "held": sum(x.numel() for x in tensors),
        "flat": sum(flat.numel() for flat in e.optimizer.single_partition_of_fp32_groups),
        "feedback": [m.tensors() for c in session.collectives for m in c.feedback.memories.values()],
        "updates": {(row.spec, row.values, row.steps) for row in rows(session, "updates")},
        "gradients": {row.spec for row in rows(session, "gradients") if not row.reason},
    }


@pytest.mark.parametrize("name", [slow("ZeRO 1"), "ZeRO 2", slow("ZeRO 2, bf16")])
def test_it_is_sharded(name: str) -> None:
    for got in run(RANKS, coded, name, timeout=120):
        assert got["losses"][1] < 0.9 * got["losses"][0]
        assert got["agree"]
        assert got["held"] <= 3 * got["flat"] + 10
        assert not any(got["feedback"])
        assert got["updates"] == {(spec, 32 * 64 + 64 * 64 + 64 * 10, 25) for spec in ("sign", "int8")}
        assert got["gradients"] == {"int8"}


RESUMED: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2, "zero": SMALL},
}


def by_script(stage: int) -> tuple[set[tuple[str, str]], str, bool]:
    """The specs of what was sent by role, the spec of the report, and whether all ranks have the same bits, by `auto`."""
    e = engine(stage, optimizer=partial(muon, others_spec="int8"))
    session = attach(e)
    assert session._auto is not None
    session._auto.search = Scripted("none", "none", "int8", "int8", "int8")  # type: ignore[assignment]
    train(e, range(5))
    report = session.report()
    return {(row.role, row.spec) for row in report.rows}, report.spec, same_on_all_ranks(weights(e))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_auto_finds_the_spec_of_the_momentum(stage: int) -> None:
    for sent, spec, same_bits in run(RANKS, by_script, stage, timeout=120):
        assert {("updates", "none"), ("updates", "int8")} <= sent
        assert {of for role, of in sent if role == "gradients"} <= {"int8", "none"}
        assert spec == "momentum auto, gradients int8, parameters none; auto: int8, still looking"
        assert same_bits


def resumed(folder: str, names: list[str]) -> list[tuple[str, bool]]:
    """Whether a run goes on as the unbroken one."""
    found = []
    for name in names:
        e = engine(**RESUMED[name], optimizer=muon)
        session = attach(e, "sign")
        train(e, range(4))
        e.save_checkpoint(folder, tag=name)
        state = copy.deepcopy(session.state_dict())
        train(e, range(4, 7))
        again = engine(**RESUMED[name], optimizer=muon)
        kept = attach(again, "sign")
        again.load_checkpoint(folder, tag=name)
        kept.load_state_dict(state)
        train(again, range(4, 7))
        found.append((name, same(weights(e), weights(again))))
    return found


@pytest.mark.parametrize("names", [["ZeRO 2"], slow(["ZeRO 0", "ZeRO 1"])], ids=" and ".join)
def test_a_resumed_run_is_the_unbroken_one(names: list[str], tmp_path: Path) -> None:
    for found in run(RANKS, resumed, str(tmp_path), names, timeout=120):
        assert all(equal for _, equal in found), found


def wide() -> Any:
    """An engine of ZeRO 0 whose matrices are wide enough for other coordinates."""
    return engine(0, optimizer=muon, model=lambda: network(width=WIDE), gradient_clipping=0.0)


def turned() -> tuple[float, float, int, bool]:
    """After two changes of coordinates: how far estimate and residuals together, and the estimate alone, are from the mean
    momentum; the matrices in other ones; whether a run that was restarted between the changes is the unbroken one."""
    e = wide()
    session = attach(e, "int4")
    train(e, range(12))
    states = copy.deepcopy((e.module.state_dict(), e.basic_optimizer.state_dict(), session.state_dict()))
    train(e, range(12, 27))
    found = *adrift(e, e.basic_optimizer, session), sum("basis_vectors" in s for s in e.basic_optimizer.state.values())
    whole = weights(e)
    again = wide()
    kept = attach(again, "int4")
    for part, state in zip((again.module, again.basic_optimizer, kept), states, strict=True):
        part.load_state_dict(state)
    train(again, range(12, 27))
    return *found, same(whole, weights(again))


@pytest.mark.slow
def test_at_zero_0_a_coarse_code_has_coordinates_of_its_own_and_loses_nothing() -> None:
    for off, alone, count, unbroken in run(RANKS, turned, timeout=120):
        assert off < 1e-5 < 1e-2 < alone
        assert count == 3
        assert unbroken


def refused() -> list[str]:
    """What does not work, in its own words."""
    said = [
        outcome(lambda: attach(engine(3, optimizer=muon), "sign")),
        outcome(lambda: attach(engine(2, optimizer=muon), "auto(error=0.3)")),
        outcome(lambda: attach(engine(1, optimizer=muon), "sign", error_feedback=False)),
        outcome(lambda: attach(engine(2, optimizer=muon), "sign", exchange="one_shot")),
    ]
    return said


def test_what_is_not_possible_says_so() -> None:
    of_ranks = run(RANKS, refused, timeout=120)
    stage, auto, feedback, exchange = of_ranks[0]
    assert "EF21Muon under ZeRO 3: expected ZeRO 0, 1 or 2" in stage
    assert "expected auto without a budget" in auto
    assert "error_feedback=False: EF21Muon adds up what it receives" in feedback
    assert "exchange 'one_shot': ZeRO 2 sends each part of a gradient to its owner" in exchange
    assert all(found == of_ranks[0] for found in of_ranks)
