"""A run that AdamW has begun goes on compressed from the first step, under AdamW's own variance."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, finite, loss_of, network, parameters_of, same, train

import commpress
from commpress.comm.meter import Report
from commpress.optim import OneBitAdamW, ZeroOneAdamW

WORLD_SIZE = 2
LR, BEFORE = 0.003, 40
"""The rate of all runs here, and AdamW's steps before."""
BETAS = (0.8, 0.99)
"""AdamW's; other ones than the compressed optimizer's."""
KINDS: dict[str, Callable[..., OneBitAdamW | ZeroOneAdamW]] = {
    "OneBitAdamW": OneBitAdamW,
    "ZeroOneAdamW": ZeroOneAdamW,
}


def begun(steps: int = BEFORE, **settings: Any) -> tuple[DistributedDataParallel, torch.optim.AdamW]:
    """A network that AdamW has trained on all ranks."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    adamw = torch.optim.AdamW(ddp.parameters(), **{"lr": LR, **settings})
    train(ddp, range(steps), optimizer=adamw)
    return ddp, adamw


def taken_over(
    model: nn.Module, kind: str, spec: str, variance_from: Any, **settings: Any
) -> tuple[DistributedDataParallel, OneBitAdamW | ZeroOneAdamW, commpress.Session]:
    """A copy of a model, attached, that goes on from a state."""
    ddp = DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=SMALL_BUCKETS)
    optimizer = KINDS[kind](ddp.parameters(), lr=LR, variance_from=variance_from, **settings)
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer)


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """The mean loss over batches that no run has seen."""
    return sum(float(loss_of(model, step, 0)) for step in range(1000, 1020)) / 20


def goes_on(kind: str, spec: str, settings: dict[str, Any]) -> tuple[list[Tensor], Report, dict[str, float]]:
    """Parameters, what was sent, and losses: before, after 60 steps more by AdamW, and after 60 compressed ones."""
    ddp, adamw = begun()
    losses = {"before": held_out(ddp.module)}
    other, optimizer, session = taken_over(ddp.module, kind, spec, adamw.state_dict(), **settings)
    assert optimizer.frozen
    assert not optimizer.takes_means
    train(ddp, range(BEFORE, BEFORE + 60), optimizer=adamw)
    train(other, range(BEFORE, BEFORE + 60), optimizer=optimizer)
    losses["dense"] = held_out(ddp.module)
    if isinstance(optimizer, ZeroOneAdamW):
        with optimizer.synced():
            return parameters_of(other), session.report(), {**losses, "compressed": held_out(other.module)}
    return parameters_of(other), session.report(), {**losses, "compressed": held_out(other.module)}


def first_step(kind: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters after an exact step, by the formula, and before. The optimizer is given, not its state."""
    ddp, adamw = begun(betas=BETAS)
    before = parameters_of(ddp)
    settings: dict[str, Any] = {"sync_every": 1} if kind == "ZeroOneAdamW" else {}
    optimizer = KINDS[kind](ddp.parameters(), lr=LR, variance_from=adamw, **settings)
    state = {p: {k: v.clone() for k, v in adamw.state[p].items()} for p in ddp.parameters()}
    commpress.attach(ddp, "none", optimizer=optimizer)
    probe = copy.deepcopy(ddp.module)
    loss_of(probe, BEFORE).backward()
    expected = []
    for p, other in zip(ddp.parameters(), probe.parameters(), strict=True):
        mine, g = state[p], other.grad
        assert g is not None
        steps = float(mine["step"])
        d = (mine["exp_avg_sq"] / (1 - BETAS[1] ** steps)).sqrt() + 1e-8
        fresh = (g / d).clamp(-2 * WORLD_SIZE**0.5, 2 * WORLD_SIZE**0.5)  # what one gradient counts for at most
        dist.all_reduce(fresh)
        n = 0.9 * mine["exp_avg"] / (1 - BETAS[0] ** steps) / d + 0.1 * fresh / WORLD_SIZE
        expected.append(p.detach() * (1 - LR * 0.01) - LR * n)
    train(ddp, [BEFORE], optimizer=optimizer)
    return parameters_of(ddp), expected, before


def resumed(kind: str, again: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A run's parameters, and those of one that was stopped in the middle, with `variance_from` once more or without."""
    ddp, adamw = begun(8)
    whole, optimizer, session = taken_over(ddp.module, kind, "sign", adamw.state_dict())
    train(whole, range(5), optimizer=optimizer)
    saved = copy.deepcopy((whole.module.state_dict(), optimizer.state_dict(), session.state_dict()))
    train(whole, range(5, 11), optimizer=optimizer)
    source = adamw.state_dict() if again else None
    part, optimizer, session = taken_over(ddp.module, kind, "sign", source)
    for holder, state in zip((part.module, optimizer, session), saved, strict=True):
        holder.load_state_dict(state)
    train(part, range(5, 11), optimizer=optimizer)
    return parameters_of(whole), parameters_of(part), parameters_of(ddp)


def saved_before_a_step() -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of a run, and of one that goes on from its state before the first step."""
    ddp, adamw = begun(8)
    one, optimizer, _ = taken_over(ddp.module, "OneBitAdamW", "sign", adamw.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    train(one, range(4), optimizer=optimizer)
    other, optimizer, _ = taken_over(ddp.module, "OneBitAdamW", "sign", None, warmup_steps=50)
    optimizer.load_state_dict(saved)
    train(other, range(4), optimizer=optimizer)
    return parameters_of(one), parameters_of(other)


def unlike(kind: str) -> str:
    """What a rank says if rank 1 has another variance."""
    ddp, adamw = begun(3)
    state = copy.deepcopy(adamw.state_dict())
    if dist.get_rank() == 1:
        state["state"][2]["exp_avg_sq"] *= 1.5
    other, optimizer, _ = taken_over(ddp.module, kind, "sign", state)
    return outcome(lambda: train(other, [3], optimizer=optimizer))


def under_auto() -> tuple[set[str], bool, bool]:
    """The specs of the first two steps without a spec, whether the replicas' values moved, and whether the variance stood."""
    ddp, adamw = begun(3)
    other = DistributedDataParallel(copy.deepcopy(ddp.module), bucket_cap_mb=SMALL_BUCKETS)
    optimizer = OneBitAdamW(other.parameters(), lr=LR, variance_from=adamw.state_dict())
    session = commpress.attach(other, optimizer=optimizer)
    train(other, range(2), optimizer=optimizer)
    frozen = all("inverse" in state and "exp_avg_sq" not in state for state in optimizer.state.values())
    return {row.spec for row in session.report().rows}, not same(parameters_of(other), parameters_of(ddp)), frozen


@pytest.mark.parametrize(("kind", "spec", "settings"), [
    ("OneBitAdamW", "sign", {}), slow("OneBitAdamW", "topk(0.1)|sign", {}),
    slow("ZeroOneAdamW", "sign", {"sync_every": 2}), slow("ZeroOneAdamW", "sign", {"sync_every": 2, "refresh_every": 4}),
])  # fmt: skip
def test_it_goes_on_compressed_and_near_to_adamw(kind: str, spec: str, settings: dict[str, Any]) -> None:
    results = run(WORLD_SIZE, goes_on, kind, spec, settings)
    for parameters, report, losses in results:
        assert same(parameters, results[0][0])
        assert finite(parameters)
        if "refresh_every" not in settings:
            assert {row.spec for row in report.rows if row.sent_bytes} == {spec}
            assert report.dense_bytes > 20 * report.sent_bytes
        gained = losses["before"] - losses["dense"]
        assert gained > 0.2 * losses["before"]
        assert abs(losses["compressed"] - losses["dense"]) < 0.2 * gained


@pytest.mark.parametrize("kind", KINDS)
def test_its_first_step_has_the_variance_and_the_momentum_of_adamw(kind: str) -> None:
    for actual, expected, before in run(WORLD_SIZE, first_step, kind):
        for a, e, b in zip(actual, expected, before, strict=True):
            assert float((e - b).abs().max()) > LR / 4
            assert float((a - e).abs().max()) < 1e-6


@pytest.mark.parametrize(("kind", "again"), [("OneBitAdamW", False), ("ZeroOneAdamW", True)])
def test_a_resumed_run_goes_on_bit_for_bit(kind: str, again: bool) -> None:
    for whole, part, before in run(WORLD_SIZE, resumed, kind, again):
        assert same(whole, part)
        assert not same(whole, before)


def test_a_state_saved_before_the_first_step_has_the_variance() -> None:
    for one, other in run(WORLD_SIZE, saved_before_a_step):
        assert same(one, other)


@pytest.mark.parametrize("kind", [slow("OneBitAdamW"), "ZeroOneAdamW"])
def test_ranks_of_another_variance_all_fail(kind: str) -> None:
    for said in run(WORLD_SIZE, unlike, kind):
        assert re.search(r"rank 1 has frozen variance \(sum of its bytes\) \d+, rank 0 has \d+", said), said


def test_auto_begins_behind_it_with_plain_steps() -> None:
    for specs, moved, frozen in run(WORLD_SIZE, under_auto):
        assert specs == {"none"}
        assert moved
        assert frozen


def stepped(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> Any:
    """The optimizer of a model after three steps, in this process."""
    optimizer = kind(model.named_parameters() if settings.pop("named", False) else model.parameters(), **settings)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, 0).backward()
        optimizer.step()
    return optimizer


def changed(key: str, value: Any) -> dict[str, Any]:
    """A state of AdamW in which one tensor of parameter 2 is another."""
    state: dict[str, Any] = stepped(network()).state_dict()
    before = state["state"][2][key]
    state["state"][2][key] = value(before) if callable(value) else value
    return state


@pytest.mark.parametrize(("source", "error", "message"), [
    (lambda: {**stepped(network()).state_dict(), "state": {}}, ValueError, "no state of parameter 0 of group 0"),
    (lambda: torch.optim.AdamW(network().parameters()).state_dict(), ValueError, "expected one that has stepped"),
    (lambda: stepped(network()), ValueError, "not held by the AdamW given"),
    (lambda: stepped(network()[:3]).state_dict(), ValueError, "groups have [4] parameters, the optimizer's [6]"),
    (lambda: stepped(network(), torch.optim.SGD, momentum=0.9, lr=0.1).state_dict(), ValueError, "has ['momentum_buffer']"),
    (lambda: stepped(network(), amsgrad=True).state_dict(), ValueError, "made with amsgrad=True"),
    (lambda: stepped(network(), maximize=True).state_dict(), ValueError, "made with maximize=True"),
    (lambda: changed("step", torch.zeros(())), ValueError, "parameter 2 of group 0 is of step 0, expected 1 or more"),
    (lambda: changed("exp_avg_sq", lambda x: x[:5]), ValueError, "has shape (5, 64), the parameter (64, 64)"),
    (lambda: changed("exp_avg_sq", lambda x: x * float("inf")), ValueError, "exp_avg_sq of parameter 2 of group 0 has values"),
    (lambda: changed("exp_avg", lambda x: x * float("nan")), ValueError, "exp_avg of parameter 2 of group 0 has values"),
    (lambda: changed("exp_avg_sq", torch.zeros_like), ValueError, "goes from 0 to 0"),
    (lambda: changed("exp_avg_sq", torch.neg), ValueError, "expected none below 0"),
    (lambda: network().state_dict(), TypeError, "expected a torch.optim.AdamW or its state_dict(), got ['0.bias'"),
    (lambda: 7, TypeError, "got int"),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_states_that_do_not_fit(kind: str, source: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KINDS[kind](network().parameters(), variance_from=source())


def test_warm_up_steps_beside_a_variance() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps 60 and variance_from: expected one of them"):
        OneBitAdamW(network().parameters(), warmup_steps=60, variance_from=stepped(network()).state_dict())


def test_names_say_which_state_is_whose() -> None:
    model = network()
    state = stepped(model, named=True).state_dict()
    matrices = [(f"module.{name}", p) for name, p in model.named_parameters() if p.dim() > 1]
    vectors = [(f"module.{name}", p) for name, p in model.named_parameters() if p.dim() == 1]
    named = OneBitAdamW([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], variance_from=state)
    for index, p in enumerate(model.parameters()):
        assert torch.equal(named.state[p]["exp_avg_sq"], state["state"][index]["exp_avg_sq"])
    with pytest.raises(ValueError, match=r"has no parameter 'another', but \['0.bias'"):
        OneBitAdamW([("another", network()[0].weight)], variance_from=state)


def test_what_does_not_train_needs_no_state() -> None:
    model = network()
    model[0].requires_grad_(False)
    adamw = stepped(model)
    optimizer = OneBitAdamW(model.parameters(), variance_from=adamw.state_dict())
    assert set(optimizer.state) == set(model[1:].parameters())
