"""`auto` under DeepSpeed's ZeRO 1 to 3: plain at first, one choice on all ranks, nothing lost when the spec changes."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from engines import RANKS, adamw, config, engine, fresh, same_on_all_ranks, train, weights
from ranks import outcome, run
from scripted import Scripted
from test_auto import PLAIN_STEPS
from test_auto_fsdp import counted_behind_evaluations, evaluated, require_whole_steps
from tiers import slowly
from torch import nn
from training import batch, network, same

from commpress.comm.search import Search
from commpress.comm.sharded_auto import ShardedAuto
from commpress.hooks.deepspeed import attach, initialize
from commpress.optim import OneBitAdamW, ZeroOneAdamW

LIBRARIES = ("engines",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

STAGES = (1, 2, 3)
SPLIT = {"reduce_bucket_size": 3000}
PAIRS = {"none": 1.0, "int4": 0.7, "none, parameters int8": 0.8, "int4, parameters int8": 0.5}
"""Seconds of a step by candidate, as far as the ranks of a test say."""


def searched(stage: int) -> dict[str, Any]:
    """A search from the first step on, beside plain training: at first as it is, then by a clock that says what is fastest."""
    plain, model = engine(stage, SPLIT), engine(stage, SPLIT)
    clock = mock.patch.multiple(
        Search,
        medians=lambda self: {spec: PAIRS[spec] for spec in self._seconds},
        turns=lambda self: {spec: [PAIRS[spec]] * (self._round + 1) for spec in self._seconds},
    )
    real, predicted = ShardedAuto._predicted, []

    def told(self: ShardedAuto, everyone: Any, seconds: float) -> dict[str, float]:
        predicted.append(real(self, everyone, seconds))
        return PAIRS

    with clock, mock.patch.object(ShardedAuto, "_predicted", told):
        session = attach(model, "auto", parameters="auto")
        for e in (plain, model):
            train(e, range(PLAIN_STEPS))
        began = same(weights(plain), weights(model))
        losses = [train(e, range(PLAIN_STEPS, 50))[-8:] for e in (plain, model)]
    mean = torch.tensor(losses, dtype=torch.float32, device="cpu").mean(1)
    dist.all_reduce(mean)
    rows = session.report().rows
    return {
        "plain at first": began,
        "alike": same_on_all_ranks(weights(model)),
        "losses": (mean / dist.get_world_size()).tolist(),
        "explained": session.explain(),
        "spec": session.report().spec,
        "receipt": str(session.receipt()),
        "choices": session.report().choices,
        "specs": {role: {row.spec for row in rows if row.role == role} for role in ("gradients", "parameters")},
        "predicted": predicted[0],
    }


@pytest.mark.parametrize("stage", slowly(STAGES, quick=(3,)))
def test_all_ranks_choose_the_same_for_gradients_and_parameters(stage: int) -> None:
    first, *others = run(RANKS, searched, stage, timeout=120)
    assert first["plain at first"]
    assert first["alike"]
    plain, auto = first["losses"]
    assert auto < plain + 0.06
    assert first["spec"] == "auto: int4, parameters int8"
    assert first["choices"][-1].spec == "int4, parameters int8"
    assert first["choices"][-1].seconds("none") == 1.0
    assert "a step takes 0.5000 s, without compression 1.0000 s" in first["receipt"]
    assert first["specs"]["gradients"] == {"none", "int4"}
    assert first["specs"]["parameters"] == {"none", "int8"}
    assert len(first["predicted"]) == 12
    assert all(seconds > 0 for seconds in first["predicted"].values())
    assert first["predicted"]["int4"] != first["predicted"]["none"]
    for other in others:
        assert other["plain at first"]
        assert other["explained"] == first["explained"]
        assert other["predicted"] == first["predicted"]


def with_evaluations() -> tuple[list[Any], list[Any]]:
    e = engine(3, SPLIT)
    session = attach(e, "auto", parameters="auto")

    def evaluate() -> None:
        e.eval()
        with torch.no_grad():
            e(batch(0, 0)[0])
        e.train()

    return evaluated(e, session, lambda steps: train(e, range(steps)), evaluate)


@pytest.mark.slow
def test_an_evaluation_between_two_steps_is_no_part_of_their_traffic() -> None:
    for (before, behind, again), (later, waited) in run(RANKS, with_evaluations, timeout=120):
        assert behind == before == again
        assert later["parameters"]["costs"]["none"][0] > 0
        assert waited > 0  # training counts again


def counted_behind() -> tuple[list[int], list[int], int]:
    e = engine(3, SPLIT)
    session = attach(e, "auto", parameters="auto")

    def evaluate() -> None:
        with torch.no_grad():
            e(batch(0, 0)[0])

    return counted_behind_evaluations(session, lambda steps: train(e, range(steps)), evaluate)


@pytest.mark.slow
def test_a_step_that_finds_parameters_which_an_evaluation_has_gathered_does_not_count() -> None:
    for found in run(RANKS, counted_behind, timeout=120):
        require_whole_steps(*found)


def one_layer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(600, 4, bias=False)


def arrived(stage: int, *specs: str) -> tuple[float, float]:
    """How far plain SGD on a fixed gradient, and SGD by these specs in turn, are from each other, and how far they went."""
    unclipped: dict[str, Any] = {"model": one_layer, "gradient_clipping": 0.0}
    engines = [engine(stage, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **unclipped) for _ in range(2)]
    start = weights(engines[0])[0]
    session = attach(engines[1], "auto")
    assert session._auto is not None
    session._auto.search = Scripted(*specs)  # type: ignore[assignment]
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float32, device="cpu")
    for e in engines:
        for _ in specs[:-1]:
            e.backward(e(x).sum())
            e.step()
    plain, ours = (weights(e)[0] for e in engines)
    return float((plain - ours).norm()), float((plain - start).norm())


@pytest.mark.parametrize("stage", STAGES)
def test_what_feedback_holds_arrives_when_the_spec_changes(stage: int) -> None:
    for far, went in run(RANKS, arrived, stage, "int4", "int4", "int8", "int4", "none", "none"):
        assert far < 1e-5 * went
    for far, went in run(RANKS, arrived, stage, "int4", "int4", "none"):
        assert far > 1e-5 * went


def counted(stage: int) -> int:
    """The steps that a search has counted, of 8 backwards that make 4 steps."""
    e = engine(stage, gradient_accumulation_steps=2)
    session = attach(e, "auto")
    train(e, range(8))
    assert session._auto is not None
    return session._auto.search.steps


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_one_of_the_optimizer(stage: int) -> None:
    assert run(RANKS, counted, stage) == [3] * RANKS  # the fourth goes on


def where_a_rank_is_held_back(stage: int) -> int:
    """The steps of a search where rank 0 waits, before each of its forwards, for what the others do behind theirs."""
    e = engine(stage)
    session = attach(e, "auto")
    own = dist.new_group(list(range(RANKS)))
    for step in range(12):
        if dist.get_rank() == 0:
            dist.barrier(own)
        x, y = batch(step, dist.get_rank())
        loss = nn.functional.cross_entropy(e(x).float(), y)
        if dist.get_rank() != 0:
            dist.barrier(own)
        e.backward(loss)
        e.step()
    assert session._auto is not None
    assert session._auto.search.state != "plain"  # the ranks have told each other how long its steps took
    return session._auto.search.steps


def test_no_rank_waits_for_another_in_its_forward() -> None:
    assert run(RANKS, where_a_rank_is_held_back, 1) == [11] * RANKS


def by_block_and_resumed() -> list[Any]:
    """A block with auto; its state goes on, and not where only gradients are looked for."""
    block = {"gradients": "auto", "parameters": "auto"}
    fresh()
    e, again = (
        initialize(model=m, optimizer=adamw(m.parameters()), config=config(2, commpress=block))[0]
        for m in (network(), network())
    )
    other = engine(2)
    attach(other, "auto")
    e.commpress._auto.search = Scripted(*["int4"] * 5)
    train(e, range(3))
    state = e.commpress.state_dict()
    again.commpress.load_state_dict(state)
    train(again, range(1))  # by none, which sends along what was kept
    kept = [b["residual"] is not None for m in (state, again.commpress.state_dict()) for b in m["memories"][0]]
    refused = outcome(lambda: other.commpress.load_state_dict(state))
    return [kept, again.commpress.report().spec, refused]


def test_a_block_takes_auto_and_its_state_goes_on() -> None:
    for kept, spec, refused in run(RANKS, by_block_and_resumed):
        assert kept == [True, False]
        assert spec == "auto: none, still looking"
        assert "the saved state has auto 'gradients and parameters', this run has True" in refused


def behind(stage: int) -> dict[str, Any]:
    """A search behind 0/1 Adam, every rank of which holds all, from its warm-up on."""
    e = engine(stage, optimizer=lambda p: ZeroOneAdamW(p, lr=1e-2, warmup_steps=8, sync_every=2))
    session = attach(e, "auto")
    # 8 steps of warm-up, 4 as they are, and a search of at most 50 steps, times the longest interval
    losses = train(e, range(130))
    with e.basic_optimizer.synced():
        alike = same_on_all_ranks(weights(e))
    assert session.step_buffer is not None
    candidates = {str(one) for one in e.basic_optimizer.candidates()}
    return {"alike": alike, "spec": session.report().spec, "candidates": candidates, "losses": losses}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_auto_chooses_behind_an_optimizer_that_every_rank_holds(stage: int) -> None:
    first, *others = run(RANKS, behind, stage)
    assert first["alike"]
    assert first["spec"].removeprefix("auto: ") in first["candidates"]  # and no longer looks
    assert all(other["spec"] == first["spec"] for other in others)
    assert sum(first["losses"][-5:]) < sum(first["losses"][:5])


def refusals() -> list[str]:
    me = dist.get_rank()
    behind = [engine(1, optimizer=lambda p: OneBitAdamW(p, warmup_steps=3)) for _ in range(2)]
    return [
        outcome(lambda: attach(engine(1), "auto", parameters="auto" if me else "none")),
        outcome(lambda: attach(engine(1), "auto(error=0.3)")),
        outcome(lambda: attach(engine(0), "auto", parameters="auto")),
        outcome(lambda: attach(behind[0], "auto", parameters="auto")),
        outcome(lambda: attach(behind[1], "sign", parameters="auto")),
    ]


def test_what_auto_cannot_do_is_refused_by_name_on_all_ranks() -> None:
    for differ, error, replicas, optimizer, behind in run(RANKS, refusals):
        assert "parameters by auto" in differ
        assert "auto(error=0.3): the error of sharded means is not measured" in error
        assert "parameters 'auto': ZeRO 0 sends no parameters; leave it out" in replicas
        assert "OneBitAdamW needs one spec of the gradients" in optimizer
        assert "parameters: auto beside gradients by sign: one search decides for both" in behind
