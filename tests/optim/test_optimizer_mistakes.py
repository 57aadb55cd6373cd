"""Mistakes that would pass in silence: what is clipped and is no gradient, a last sync that was forgotten."""

import gc
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from test_optimizer_parameters import KINDS, SPECS, WARM, attached, wrapped
from tiers import slow, slowly
from torch import nn
from training import finite, loss_of, network, parameters_of, same, train

import commpress
from commpress.optim import OneBitAdamW


def change(how: str, parameters: list[nn.Parameter], step: int) -> None:
    """What scripts do to gradients between backward and step."""
    gradients = [p for p in parameters if p.grad is not None]
    if how == "norm" or (how == "norm in the warm-up" and step < WARM):
        nn.utils.clip_grad_norm_(gradients, 1.0)
    elif how == "value":
        nn.utils.clip_grad_value_(gradients, 0.5)
    elif how == "by hand":
        for p in gradients:
            p.grad *= 0.5  # type: ignore[operator]
    elif how == "another tensor":
        for p in gradients:
            p.grad = p.grad * 0.5  # type: ignore[operator]


def clips(name: str, how: str, views: bool, scaled: bool, closure: bool) -> list[str]:
    """What ten steps warn of in which a script changes gradients."""
    ddp = wrapped(gradient_as_bucket_view=views, unused=how == "unused")
    optimizer = KINDS[name](ddp.parameters(), **({"max_norm": 0.1} if how == "max_norm" else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    commpress.attach(ddp, SPECS[name], optimizer=optimizer, grad_scaler=scaler)

    def backward(step: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(ddp, step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None and how != "nothing":
            scaler.unscale_(optimizer)
        change(how, list(ddp.parameters()), step)
        return float(loss.detach())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            if closure:
                optimizer.step(partial(backward, step))
                continue
            backward(step)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return [str(w.message) for w in caught if "commpress" in str(w.message)]


def all_clips(name: str, how: str) -> list[list[str]]:
    """What is warned of without a scaler and with copies of buckets, and with a scaler and with views of them."""
    return [clips(name, how, both, both, False) for both in (False, True)]


def by_closures(name: str) -> tuple[bool, list[float | None], bool]:
    """Whether steps by closure are the others bit for bit; what they return."""
    results: list[Any] = []
    losses: list[float | None] = []
    for closure in (False, True):
        ddp = wrapped()
        optimizer, _ = attached(name, ddp)
        if not closure:
            results.append(train(ddp, range(12), optimizer=optimizer).parameters)
            continue

        def backward(ddp: Any = ddp, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            loss = loss_of(ddp, len(losses))
            loss.backward()
            return float(loss.detach())

        for _ in range(12):
            losses.append(optimizer.step(backward))
        results.append(parameters_of(ddp))
    return same(*results), losses, finite(results[0])


def forgot(how: str) -> tuple[list[str], bool]:
    """What is warned of when a training of local steps is over, and whether the ranks hold the same."""
    model = network(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = commpress.local_sgd(model, optimizer, "int8", every=4)
    steps = 8 if how == "ends with a sync" else 10
    failed = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        if how == "synced":
            outer.sync()
        if how == "saved":
            outer.state_dict()
        if how == "shown":
            with outer.synced():
                pass
        try:
            if how == "failed":
                raise ArithmeticError
        except ArithmeticError:
            failed = True
            del outer, optimizer
            gc.collect()
        if not failed:
            del outer, optimizer
            gc.collect()
    mine = torch.cat([p.reshape(-1) for p in parameters_of(model)])
    first = mine.clone()
    dist.broadcast(first, 0)
    return [str(w.message) for w in caught if "commpress" in str(w.message)], torch.equal(first, mine)


def unattached() -> dict[str, str]:
    """What a step says under wrappers that were attached without the optimizer."""
    said = {}
    ddp = wrapped()
    optimizer = OneBitAdamW(ddp.parameters())
    commpress.attach(ddp, "sign")
    loss_of(ddp, 0).backward()
    said["DDP"] = outcome(optimizer.step)
    model = network()
    said["diloco"] = outcome(lambda: commpress.diloco(model, OneBitAdamW(model.parameters()), every=4))
    return said


@pytest.mark.parametrize("how", ["norm", slow("value"), slow("by hand"), "another tensor"])
def test_what_is_changed_and_is_no_gradient_is_warned_of_once(how: str) -> None:
    of_rank_0, of_others = run(2, all_clips, "OneBitAdamW", how)
    assert of_others == [[], []]
    for said in of_rank_0:
        assert len(said) == 1
        assert "the grad of '0.weight' was changed between backward and OneBitAdamW.step()" in said[0]
        assert "set OneBitAdamW(..., max_norm=...)" in said[0]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_clipping_is_warned_of_under_each(name: str, closure: bool) -> None:
    said, others = run(2, clips, name, "norm", False, False, closure)
    assert others == []
    assert len(said) == 1
    assert f"{name}.step()" in said[0]


@pytest.mark.parametrize(
    ("name", "how"),
    slowly(
        [
            (name, how)
            for name in ("OneBitAdamW", "ZeroOneAdamW")
            for how in ("nothing", "unscale", "unused", "max_norm", "norm in the warm-up")
        ],
        quick=[
            ("OneBitAdamW", "unscale"),
            ("OneBitAdamW", "max_norm"),
            ("ZeroOneAdamW", "nothing"),
            ("ZeroOneAdamW", "unused"),
            ("ZeroOneAdamW", "norm in the warm-up"),
        ],
    ),
)
def test_what_is_in_order_is_not_warned_of(name: str, how: str) -> None:
    assert run(2, all_clips, name, how) == [[[], []]] * 2


@pytest.mark.parametrize("name", slowly(KINDS, quick=("ZeroOneAdamW",)))
def test_steps_by_closure_are_the_same(name: str) -> None:
    for alike, losses, sound in run(2, by_closures, name):
        assert alike
        assert sound
        assert all(isinstance(loss, float) for loss in losses)


def test_a_last_sync_that_was_forgotten_is_warned_of_by_rank_0() -> None:
    (said, _), (others, alike) = run(2, forgot, "forgotten")
    assert others == []
    assert not alike
    assert len(said) == 1
    assert "training ended 2 local steps after the last outer sync" in said[0]


def all_forgot(ways: list[str]) -> dict[str, tuple[list[str], bool]]:
    """What is warned of when a training ends in each of these ways."""
    return {how: forgot(how) for how in ways}


def test_a_training_that_ends_as_it_should_is_not() -> None:
    for results in run(2, all_forgot, ["synced", "ends with a sync", "saved", "shown", "failed"]):
        for how, (said, alike) in results.items():
            assert said == [], how
            assert alike or how not in ("synced", "ends with a sync")


def test_an_optimizer_that_nobody_attached_says_so() -> None:
    for said in run(2, unattached):
        assert said["DDP"].startswith("RuntimeError: OneBitAdamW is not attached")
        assert said["diloco"].startswith("TypeError: optimizer: OneBitAdamW exchanges by itself")


def leaves_at_exit(flag: str) -> None:
    """A program that ends without its last sync."""
    import weakref

    with open(flag, "w", buffering=1) as written:
        sys.stderr = written
        model = network(dist.get_rank())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = commpress.diloco(model, optimizer, "int8", every=4)
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        assert outer.steps == 6
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # as atexit does, which forgets it in forks from Python 3.13 on


def test_a_program_that_ends_without_its_last_sync_is_warned_of(tmp_path: Any) -> None:
    flags = [tmp_path / "rank 0", tmp_path / "rank 1"]
    run(2, _leave, [str(flag) for flag in flags], fresh=True)
    assert "2 local steps after the last outer sync" in flags[0].read_text()
    assert "outer sync" not in flags[1].read_text()


def _leave(flags: list[str]) -> None:
    leaves_at_exit(flags[dist.get_rank()])
