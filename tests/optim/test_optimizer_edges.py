"""Where an optimizer meets what is rare: other orders of memory, one rank, states of other kinds, saving at a bad moment."""

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
from commpress.optim import DGC, OneBitAdamW, ZeroOneAdamW


def wrapped(model: nn.Module | None = None, **settings: Any) -> DistributedDataParallel:
    """A network in small buckets."""
    return DistributedDataParallel(network() if model is None else model, bucket_cap_mb=SMALL_BUCKETS, **settings)


class Images(nn.Module):
    """A convolution, so that there is an order of memory to choose."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution, self.head = nn.Conv2d(2, 16, 3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.convolution(x.view(-1, 2, 4, 4)).flatten(1))
        return y


def of_images(channels_last: bool, saved: dict[str, Any] | None, steps: range) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters after these steps, and what would be saved then. `none` knows no order of memory."""
    model = Images()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ddp = wrapped(model)
    optimizer = OneBitAdamW(ddp.parameters(), lr=0.01, warmup_steps=2)
    commpress.attach(ddp, "none", optimizer=optimizer)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    train(ddp, steps, optimizer=optimizer)
    return parameters_of(ddp), {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def in_both_orders() -> tuple[list[list[Tensor]], list[Tensor]]:
    """Six steps in each order of memory, and three in one and three in the other; the last convolution's strides."""
    whole = [of_images(channels_last, None, range(6))[0] for channels_last in (False, True)]
    _, saved = of_images(False, None, range(3))
    return [*whole, of_images(True, saved, range(3, 6))[0]], [whole[0][0], whole[1][0]]


def never_used(warmup_steps: int | None) -> tuple[list[Tensor], bool]:
    """A layer that no step uses, beside the network."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never = network(), nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    ddp = wrapped(Beside(), find_unused_parameters=True)
    optimizer = OneBitAdamW(ddp.parameters(), lr=0.001, betas=(0.9, 0.9), warmup_steps=warmup_steps)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    return train(ddp, range(60), optimizer=optimizer).parameters, optimizer.frozen


def saved_after_a_skip() -> tuple[list[Tensor], list[Tensor], bool]:
    """A run that is saved when a step was skipped, and the same without that step; whether the saved memories are finite."""

    def started() -> tuple[DistributedDataParallel, DGC, torch.amp.GradScaler, commpress.Session]:
        ddp = wrapped()
        optimizer, scaler = DGC(ddp.parameters(), lr=0.05), torch.amp.GradScaler("cpu", init_scale=64.0)
        return ddp, optimizer, scaler, commpress.attach(ddp, "topk(0.1)", optimizer=optimizer, grad_scaler=scaler)

    def step(ddp: nn.Module, optimizer: DGC, scaler: torch.amp.GradScaler, number: int, bad: bool) -> None:
        optimizer.zero_grad()
        loss = loss_of(ddp, number) * (torch.inf if bad and dist.get_rank() == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    results, memories = [], []
    for skips in (True, False):
        ddp, optimizer, scaler, session = started()
        for number in range(4):
            step(ddp, optimizer, scaler, number, False)
        if skips:
            step(ddp, optimizer, scaler, 99, True)
        state = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        kept = session.state_dict()
        memories += [bucket[key] for bucket in kept["memories"][0] for key in ("residual", "momentum")]
        ddp, optimizer, scaler, session = started()
        ddp.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        session.load_state_dict(kept)
        for number in range(4, 8):
            step(ddp, optimizer, scaler, number, False)
        results.append(parameters_of(ddp))
    return results[0], results[1], finite(memories)


def refusals() -> dict[str, str]:
    """What is said to what does not go together."""
    me = dist.get_rank()
    said = {}
    ddp = wrapped()
    behind = OneBitAdamW(ddp.parameters()) if me else None
    said["one rank's optimizer"] = outcome(lambda: commpress.attach(ddp, "sign", optimizer=behind))
    scaler = torch.amp.GradScaler("cpu") if me else None
    said["one rank's scaler"] = outcome(lambda: commpress.attach(ddp, "sign", grad_scaler=scaler))
    view = nn.Linear(8, 8)
    view.weight = nn.Parameter(torch.randn(8, 16)[:, ::2])
    strided = DistributedDataParallel(view)
    said["gaps"] = outcome(lambda: commpress.attach(strided, "sign", optimizer=OneBitAdamW(strided.parameters())))
    first, second = wrapped(), wrapped()
    optimizer = OneBitAdamW(first.parameters(), warmup_steps=1)
    session = commpress.attach(first, "sign", optimizer=optimizer)
    train(first, range(3), optimizer=optimizer)
    plain = commpress.attach(second, "sign")
    said["state of an optimizer"] = outcome(lambda: plain.load_state_dict(session.state_dict()))
    said["state of none"] = outcome(lambda: session.load_state_dict(plain.state_dict()))
    return said


def forced() -> tuple[list[Tensor], list[str]]:
    """An exchange that the warm-up's codec cannot use."""
    ddp = wrapped()
    optimizer = OneBitAdamW(ddp.parameters(), warmup_steps=3, warmup_spec="int8")
    session = commpress.attach(ddp, "bf16", exchange="all_reduce", optimizer=optimizer)
    return train(ddp, range(6), optimizer=optimizer).parameters, [row.how for row in session.report().rows]


def withheld(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What this rank remembers of three steps of very sparse gradients."""
    ddp = wrapped()
    session = commpress.attach(ddp, "topk(0.01)")
    train(ddp, range(3))
    return [session.state_dict()]


def alone(states: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """What one rank gets that goes on with the memories of two, without gradients of its own; and what they remembered."""
    ddp = wrapped()
    session = commpress.attach(ddp, "topk(0.01)")
    session.load_state_dict(states)
    taken = torch.cat([bucket["residual"] for bucket in session.state_dict()["memories"][0]])
    (0.0 * loss_of(ddp, 0)).backward()
    assert not any(bucket["residual"] is not None for bucket in session.state_dict()["memories"][0])
    return torch.cat([p.grad.view(-1) for p in ddp.parameters() if p.grad is not None]).sum(), taken.sum()


def two_models(specs: tuple[str, str]) -> list[str]:
    """Two models whose optimizers step in turn: what is warned of."""
    import warnings

    models = [wrapped(network(seed)) for seed in (0, 1)]
    for model, spec in zip(models, specs, strict=True):
        commpress.attach(model, spec)
    optimizers = [torch.optim.SGD(models[0].parameters(), lr=0.1), torch.optim.AdamW(models[1].parameters())]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, range(1), optimizer=optimizer)
    return [str(w.message) for w in caught if "commpress" in str(w.message)]


def inside_synced() -> tuple[bool, bool]:
    """Whether gradients can be had inside, and before."""
    ddp = wrapped()
    optimizer = ZeroOneAdamW(ddp.parameters(), warmup_steps=1)
    commpress.attach(ddp, "sign", optimizer=optimizer)
    train(ddp, range(4), optimizer=optimizer)
    with optimizer.synced():
        return loss_of(ddp.module, 0).requires_grad, torch.is_grad_enabled()


def test_any_order_of_memory_gives_the_same_training() -> None:
    for (contiguous, last, mixed), (one, other) in run(2, in_both_orders):
        assert one.stride() != other.stride()
        for a, b, c in zip(contiguous, last, mixed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warmup_steps", [None, slow(5)])
def test_parameters_that_are_never_used(warmup_steps: int | None) -> None:
    (one, frozen), (other, _) = run(2, never_used, warmup_steps)
    assert frozen or warmup_steps is None  # the variance of so small a batch may not settle in so few steps
    assert same(one, other)
    assert finite(one)


def test_saved_after_a_skipped_step() -> None:
    for skipped, plain, sound in run(2, saved_after_a_skip):
        assert sound
        for a, b in zip(skipped, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_does_not_go_together_is_said() -> None:
    for said in run(2, refusals):
        assert "rank 1 has optimizer 'OneBitAdamW', rank 0 has None" in said["one rank's optimizer"]
        assert "rank 1 has grad_scaler True, rank 0 has False" in said["one rank's scaler"]
        assert "ValueError: parameter 'weight' has strides (16, 2)" in said["gaps"]
        for case in ("state of an optimizer", "state of none"):
            assert "cannot restore: the saved state has settings" in said[case]
            assert "OneBitAdamW" in said[case]


def test_a_forced_exchange_that_the_warm_up_cannot_use() -> None:
    (one, how), (other, _) = run(2, forced)
    assert same(one, other)
    assert {text for text in how if "not compressed" not in text} == {"int8 by one_shot", "bf16 by all_reduce"}


def test_a_single_rank_applies_what_others_had_withheld() -> None:
    states = [state for (state,) in run(2, withheld, ())]
    ((applied, remembered),) = run(1, alone, states)
    assert remembered.abs() > 0
    torch.testing.assert_close(applied, remembered, rtol=1e-4, atol=1e-5)


def test_two_models_are_each_advised() -> None:
    said, others = run(2, two_models, ("sign", "topk(0.01)"))
    assert others == []
    assert len(said) == 1
    assert "topk(0.01)" in said[0]
    assert "AdamW" in said[0]


def test_gradients_can_be_had_of_the_synced_model() -> None:
    for found in run(2, inside_synced):
        assert found == (True, True)
