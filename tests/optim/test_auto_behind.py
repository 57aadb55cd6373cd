"""`auto` behind a compressed optimizer, on real ranks and a clock of their own: what it chooses, and that nothing is lost."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from scripted import Scripted
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, by_dimensions, network, parameters_of, same, same_training, train

import commpress
from commpress.comm import auto as auto_module
from commpress.comm.auto_behind import AutoBehind
from commpress.comm.search import FIRST_TURN, PLAIN
from commpress.comm.search import WARM_UP as NOT_COUNTED
from commpress.optim import DGC, CompressedOptimizer, EF21Muon, Growing, OneBitAdamW, ZeroOneAdamW
from commpress.optim.intervals import candidates

WARM_UP = 8
COMPUTING = 0.1
"""Seconds of a step without its bytes, on the clock of a test."""
STEPS = 160
MAKERS: dict[str, Callable[..., CompressedOptimizer]] = {
    "OneBitAdamW": lambda p, **more: OneBitAdamW(p, **{"lr": 0.01, "warmup_steps": WARM_UP, **more}),
    "ZeroOneAdamW": lambda p, **more: ZeroOneAdamW(p, **{"lr": 0.01, "warmup_steps": WARM_UP, "sync_every": 4, **more}),
    "DGC": lambda p, **more: DGC(p, **{"lr": 0.05, "warmup_steps": WARM_UP, **more}),
    "EF21Muon": lambda p, **more: EF21Muon(by_dimensions(p), **{"lr": 0.01, **more}),
}


def attached(
    name: str, spec: str | None = None, **settings: Any
) -> tuple[DistributedDataParallel, CompressedOptimizer, commpress.Session]:
    """A network, its optimizer and its session."""
    model = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    optimizer = MAKERS[name](model.parameters(), **settings)
    given = () if spec is None else (spec,)
    return model, optimizer, commpress.attach(model, *given, optimizer=optimizer)


class Clock:
    """A clock on which a step takes COMPUTING, and what its bytes take on a link of `bytes_per_second`."""

    def __init__(self, session: commpress.Session, bytes_per_second: float) -> None:
        self.session, self.rate = session, bytes_per_second
        self.now, self.sent = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def tick(self) -> int:
        """A step is over; returns the bytes that it has sent."""
        before, self.sent = self.sent, self.session.report().sent_bytes
        self.now += COMPUTING + (self.sent - before) / self.rate
        return self.sent - before


@contextlib.contextmanager
def clocked(session: commpress.Session, bytes_per_second: float) -> Iterator[Clock]:
    """While the block runs, `auto` sees a clock of the test's own, and predicts that all pay: what sends less, more."""
    clock = Clock(session, bytes_per_second)

    def predicted(auto: AutoBehind, name: str, cluster: object) -> float:
        return 1 - 0.05 * list(auto._plans).index(name)

    with (
        mock.patch.object(auto_module, "time", clock),
        mock.patch.object(AutoBehind, "_step_seconds", predicted),
        mock.patch.object(
            AutoBehind, "_exchanged", return_value=None
        ),  # no clock of the test's: it would seem to drift
    ):
        yield clock


def searched(name: str, bytes_per_second: float, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A run by `auto` on this rank."""
    model, optimizer, session = attached(name, **settings)
    sent, specs = [], []
    with clocked(session, bytes_per_second) as clock:
        for step in range(steps):
            train(model, [step], optimizer=optimizer)
            sent.append(clock.tick())
            specs.append(session.report().spec)
    with optimizer.synced() if isinstance(optimizer, ZeroOneAdamW) else contextlib.nullcontext():
        parameters = parameters_of(model)
    return {
        "parameters": parameters,
        "sent": sent,
        "specs": specs,
        "table": session.explain(),
        "receipt": str(session.receipt()),
        "choices": [choice.spec for choice in session.report().choices],
        "rows": {row.spec for row in session.report().rows},
    }


@pytest.mark.parametrize(
    ("name", "world_size", "chosen"),
    [
        ("OneBitAdamW", 2, "topk(0.1)|sign"),
        slow("OneBitAdamW", 3, "topk(0.1)|sign"),
        slow("ZeroOneAdamW", 2, "topk(0.1)|sign every 4"),
        slow("ZeroOneAdamW", 3, "topk(0.1)|sign every 4"),
        slow("DGC", 2, "topk(0.001)"),
    ],
)
def test_on_a_slow_link_all_ranks_choose_what_sends_least(name: str, world_size: int, chosen: str) -> None:
    first, *others = run(world_size, searched, name, 1e3, STEPS, {})
    for other in others:
        assert same(first["parameters"], other["parameters"])
        assert other["table"] == first["table"]
        assert other["specs"] == first["specs"]
    assert first["specs"][: WARM_UP + 2] == ["auto: none, still looking"] * (WARM_UP + 2)
    assert first["specs"][-1] == f"auto: {chosen}"
    assert first["choices"][-1] == chosen
    assert f"auto: {chosen}, chosen after" in first["table"].replace("\n", " ").replace("  ", " ")
    assert first["receipt"].startswith(f"commpress {chosen}: a step takes")
    assert {"none", chosen.split()[0]} <= first["rows"]


@pytest.mark.slow
def test_on_a_fast_link_nothing_is_compressed_nor_put_off() -> None:
    first, other = run(2, searched, "ZeroOneAdamW", 1e12, 2 * STEPS, {})  # what is as fast as none meets it again
    assert first["specs"][-1] == other["specs"][-1] == "auto: none"
    assert set(first["sent"][-20:]) == {first["sent"][0]}
    assert 0 in first["sent"]  # local steps were tried


@pytest.mark.parametrize(("bytes_per_second", "chosen"), [(1e3, "int8"), slow(1e12, "none")])
def test_muon_has_no_warm_up_and_is_compressed_where_that_pays(bytes_per_second: float, chosen: str) -> None:
    first, other = run(2, searched, "EF21Muon", bytes_per_second, 60, {})
    plain = NOT_COUNTED + FIRST_TURN
    assert first["specs"][:plain] == ["auto: none, still looking"] * plain
    assert first["specs"][-1] == other["specs"][-1] == f"auto: {chosen}"
    assert {"none", "int8"} <= first["rows"]
    assert same(first["parameters"], other["parameters"])


def looking_again() -> list[tuple[str, str, str, str]]:
    """In the steps of a second search: its state, the spec on trial, what the receipt calls the traffic, and its first line."""
    model, optimizer, session = attached("OneBitAdamW")
    assert session.step_buffer is not None
    assert session.step_buffer.auto is not None
    search, seen = session.step_buffer.auto.search, []
    with clocked(session, 1e3) as clock:
        for step in range(STEPS):
            clock.now += 50 * (step >= 100)  # from there on steps are far longer
            train(model, [step], optimizer=optimizer)
            clock.tick()
            if search.choice is not None and search.state in ("plain", "trying") and len(search.choices) == 1:
                receipt = session.receipt()
                seen.append((search.spec, session.report().spec, receipt.spec, str(receipt).splitlines()[0]))
    return seen


@pytest.mark.slow
def test_while_it_looks_again_report_and_receipt_name_the_choice_whose_steps_they_tell() -> None:
    for seen in run(2, looking_again):
        tried = {spec for spec, *_ in seen}
        assert "none" in tried
        assert len(tried) == 3
        for _, report, receipt, line in seen:
            assert (report, receipt) == ("auto: topk(0.1)|sign", "topk(0.1)|sign")
            assert line.startswith("commpress topk(0.1)|sign: a step takes")


def warmed_up(name: str, settings: dict[str, Any]) -> bool:
    """Whether the warm-up by `auto` has the bits of one by a fixed spec."""
    trained = []
    for spec in (None, "sign"):
        model, optimizer, _ = attached(name, spec, **settings)
        trained.append(train(model, range(WARM_UP), optimizer=optimizer))
    return same_training(*trained)


@pytest.mark.parametrize(
    ("name", "settings"), [("OneBitAdamW", {}), ("ZeroOneAdamW", {"warmup_spec": "int4"}), ("DGC", {})]
)
def test_the_warm_up_has_the_bits_of_a_fixed_spec(name: str, settings: dict[str, Any]) -> None:
    assert run(2, warmed_up, name, settings) == [True, True]


def coarse_warm_up() -> tuple[list[str], str, int]:
    """The specs of a run whose warm-up is not exact, and the step of the choice."""
    model, optimizer, session = attached("OneBitAdamW", warmup_spec="int8")
    specs = []
    with clocked(session, 1e12) as clock:
        for step in range(60):
            train(model, [step], optimizer=optimizer)
            clock.tick()
            specs.append(session.report().spec)
    return specs, session.explain(), session.report().steps


def test_steps_of_a_warm_up_that_is_not_exact_are_no_plain_ones() -> None:
    for specs, table, _ in run(2, coarse_warm_up):
        first = next(i for i, spec in enumerate(specs) if spec != "auto: none, still looking")
        assert first == WARM_UP + NOT_COUNTED + FIRST_TURN + 1  # in the last one the ranks tell each other
        assert f"{COMPUTING * 1e3:.1f}" in table


def constant(candidates: list[str], spec: str = "auto", drop: int = -1, sync_every: int | Growing = 4) -> Tensor:
    """Where one step a candidate behind a warm-up, and all that n has yet to move, lead the parameters to, under gradients that
    are always the same; in the mean of the ranks. From step `drop` on the rate is a tenth."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(600, 2, bias=False))
    optimizer = ZeroOneAdamW(
        model.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=2, sync_every=sync_every
    )
    session = commpress.attach(model, spec, optimizer=optimizer)
    assert session.step_buffer is not None
    if session.step_buffer.auto is not None:
        session.step_buffer.auto.search = Scripted(PLAIN, PLAIN, *candidates)  # type: ignore[assignment]
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(2 + len(candidates)):
        optimizer.param_groups[0]["lr"] *= 0.1 if step == drop else 1
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    group, weight = optimizer.param_groups[0], model.module.weight
    momentum = optimizer.state[weight]["exp_avg"] / group["unit"]
    dist.all_reduce(momentum)
    with optimizer.synced():
        return weight.detach() - group["lr"] * 0.9 / (1 - 0.9) * momentum / dist.get_world_size()


@pytest.mark.parametrize("world_size", [slow(2), 3])
def test_what_was_withheld_arrives_in_full_when_the_interval_changes(world_size: int) -> None:
    often, seldom = ["topk(0.1)|sign"] * 4, ["topk(0.1)|sign every 4"] * 8
    trials = [*seldom, "none", *seldom, *often, *seldom, "none"]  # which brings all that is left
    plain = run(world_size, constant, ["none"] * len(trials))[0]
    start = run(world_size, constant, [])[0]
    for found in run(world_size, constant, trials):
        assert torch.allclose(found - start, plain - start, rtol=1e-3, atol=1e-4)
    for found in run(world_size, constant, [*trials[:-1], "sign"]):
        assert not torch.allclose(found - start, plain - start, rtol=1e-3, atol=1e-4)


def test_a_growing_interval_loses_nothing_either() -> None:
    often, seldom = ["topk(0.1)|sign"] * 4, ["topk(0.1)|sign every 2"] * 4 + ["topk(0.1)|sign every 4"] * 8
    by_hand = run(2, constant, [*often, *seldom], "topk(0.1)|sign", -1, Growing(4, 1, 4))
    assert same(run(2, constant, [*often, *seldom]), by_hand)


def test_a_change_of_the_rate_is_no_change_of_the_interval() -> None:
    trials = ["topk(0.1)|sign every 4"] * 12
    by_hand = run(2, constant, trials, "topk(0.1)|sign", 9)
    assert same(run(2, constant, trials, "auto", 9), by_hand)


def unlike() -> tuple[str, str]:
    """What ranks are told whose optimizers differ in their settings, and whose states do in the middle of a search."""
    me = dist.get_rank()
    model, optimizer, _ = attached("ZeroOneAdamW", sync_every=(4, 2)[me])
    differ = outcome(lambda: train(model, range(2), optimizer=optimizer))
    model, optimizer, _ = attached("OneBitAdamW")
    train(model, range(WARM_UP + 4), optimizer=optimizer)
    if me:
        optimizer.param_groups[0]["frozen_at"] = 0
    return differ, outcome(lambda: train(model, range(30), optimizer=optimizer))


def test_ranks_of_unlike_optimizers_end_with_a_disagreement() -> None:
    for differ, later in run(2, unlike):
        assert "DisagreementError" in differ
        assert "all ranks must use the same optimizer's groups" in differ
        assert "DisagreementError" in later


def resumed(steps: int) -> tuple[list[str], list[Tensor]]:
    """The specs of a run that goes on from a state in the middle of a search, and its parameters."""
    model, optimizer, session = attached("ZeroOneAdamW")
    with clocked(session, 1e4) as clock:
        for step in range(steps):
            train(model, [step], optimizer=optimizer)
            clock.tick()
    again, other, following = attached("ZeroOneAdamW")
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    following.load_state_dict(session.state_dict())
    specs = []
    with clocked(following, 1e4) as clock:
        for step in range(steps, steps + 130):
            train(again, [step], optimizer=other)
            clock.tick()
            specs.append(following.report().spec)
    assert isinstance(other, ZeroOneAdamW)
    with other.synced():
        return specs, parameters_of(again)


def test_a_restored_run_searches_anew_on_all_ranks_alike() -> None:
    (specs, parameters), (others, theirs) = run(2, resumed, 35)
    assert specs == others
    assert specs[0] == "auto: none, still looking"
    assert specs[-1] == "auto: topk(0.1)|sign every 4"
    assert same(parameters, theirs)


def refusals() -> dict[str, str]:
    model = DistributedDataParallel(network())
    one_bit = OneBitAdamW(model.parameters())
    return {
        "budget": outcome(lambda: commpress.attach(model, "auto(error=0.3)", optimizer=one_bit)),
        "feedback": outcome(lambda: commpress.attach(model, optimizer=one_bit, error_feedback=False)),
        "plain": outcome(lambda: commpress.attach(model, optimizer=torch.optim.SGD(model.parameters()))),
    }


def test_what_auto_cannot_do_behind_an_optimizer_is_refused_by_name() -> None:
    for got in run(2, refusals):
        assert "auto(error=0.3): OneBitAdamW sends no gradients, whose error a budget limits" in got["budget"]
        assert "error_feedback=False: the specs that auto chooses for OneBitAdamW keep" in got["feedback"]
        assert "optimizer: expected one of commpress.optim, got SGD" in got["plain"]


def names(sync_every: int | Growing) -> list[str]:
    """The candidates of an optimizer at the end of its warm-up."""
    optimizer = ZeroOneAdamW(network().parameters(), sync_every=sync_every)
    return [str(candidate) for candidate in optimizer.candidates()]


def test_what_sends_more_is_gentler_and_no_interval_is_above_the_bound() -> None:
    assert names(1) == ["none", "int4", "sign", "topk(0.1)|sign"]
    every_three = names(3)
    assert every_three[:4] == ["none", "none every 2", "none every 3", "int4"]
    assert every_three[-1] == "topk(0.1)|sign every 3"
    assert len(every_three) == 12
    # a schedule that has not come far yet: all at its own interval, which may grow
    assert names(Growing(10, 1, 8)) == [
        "none",
        "none every 8",
        "int4 every 8",
        "sign every 8",
        "topk(0.1)|sign every 8",
    ]
    assert {candidate.now for candidate in candidates(["int4"], 2, 16)} == {1, 2}
