"""The guard of `auto` on real ranks: what a checked step measures, and how all ranks back off from a spec that hurts."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from clocked import by_clock
from ranks import outcome, run
from scripted import Scripted
from tiers import slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, loss_of, network, parameters_of, same, sgd, train

import commpress
from commpress.comm.auto import Auto
from commpress.comm.search import LOOK
from commpress.kernels import table


def replica() -> DistributedDataParallel:
    return DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)


def auto_of(session: commpress.Session) -> Auto:
    assert session.step_buffer is not None
    assert session.step_buffer.auto is not None
    return session.step_buffer.auto


def parameters_of_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def prune(session: commpress.Session, model: DistributedDataParallel) -> Tensor:
    """Prune half of all matrices; returns which values are kept, as `parameters_of_gradient` has them."""
    kept = {name: p > 0 if p.dim() > 1 else torch.ones_like(p).bool() for name, p in model.module.named_parameters()}
    session.set_masks({name: mask for name, mask in kept.items() if mask.dim() > 1})
    return torch.cat([mask.flatten() for mask in kept.values()])


def watched(spec: str, masked: bool) -> tuple[float | None, float]:
    """The error of a step's means as it is noted, and what it is of the values that are sent."""
    model, plain = replica(), replica()
    session = commpress.attach(model)
    kept = prune(session, model) if masked else slice(None)
    auto, search = auto_of(session), Scripted(spec, spec)
    search.checks = True
    auto.search = search  # type: ignore[assignment]
    for one in (model, plain):
        loss_of(one, 0).backward()
    got, dense = (parameters_of_gradient(one)[kept] for one in (model, plain))
    assert auto.watch is not None
    return auto.watch.error(), float((got - dense).norm() / dense.norm())


@pytest.mark.parametrize(("world_size", "masked"), [(2, False), (3, False), slow(2, True), (3, True)])
def test_the_error_that_is_noted_is_that_of_the_means(world_size: int, masked: bool) -> None:
    for spec in ("int4", "int8", "bf16"):
        for noted, true in run(world_size, watched, spec, masked):
            assert noted == pytest.approx(true, rel=0.2)  # it has a sample of each bucket


def overflown(spec: str) -> float | None:
    """The error of a step in which a value of one rank, between those that are looked at, is infinite."""
    model = DistributedDataParallel(nn.Linear(600, 20, bias=False))
    session = commpress.attach(model)
    search = Scripted(spec, spec)
    search.checks = True
    auto_of(session).search = search  # type: ignore[assignment]
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(dist.get_rank()))
    x[0, 1] = float("inf") if dist.get_rank() == 1 else 0.0
    model(x).sum().backward()
    assert not parameters_of_gradient(model).isfinite().all()
    watch = auto_of(session).watch
    assert watch is not None
    return watch.error()


def test_gradients_that_are_not_finite_say_nothing_of_a_codec() -> None:
    for spec in ("int4", "bf16"):
        assert run(2, overflown, spec) == [None, None]


def watched_residual(spec: str, masked: bool) -> tuple[float | None, float]:
    """The residual as it is noted on this rank, and what it is of all ranks together."""
    model = replica()
    session = commpress.attach(model)
    kept = prune(session, model) if masked else slice(None)
    auto, search = auto_of(session), Scripted(*[spec] * 5)
    search.checks = True
    auto.search = search  # type: ignore[assignment]
    train(model, range(3))
    held, (collectives,) = torch.zeros((), dtype=torch.float64), session.collectives
    for memory in collectives.feedback.memories.values():
        for values, times in ((memory.residual, 1), (memory.owner_residual, collectives.world_size)):
            if values is not None:
                held += times * values.double().square().sum()
    bare = network()
    bare.load_state_dict(model.module.state_dict())
    loss_of(bare, 3).backward()
    squares = torch.stack([held, parameters_of_gradient(bare)[kept].double().square().sum()])
    loss_of(model, 3).backward()
    dist.all_reduce(squares)
    assert auto.watch is not None
    return auto.watch.residual(), float((squares[0] / squares[1]).sqrt())


@pytest.mark.parametrize(("world_size", "masked"), [(2, False), (3, False), (2, True), slow(3, True)])
def test_the_residual_that_is_noted_is_that_of_all_ranks_together(world_size: int, masked: bool) -> None:
    found = run(world_size, watched_residual, "int4", masked)
    assert len({noted for noted, _ in found}) == 1
    for noted, true in found:
        assert noted == pytest.approx(true, rel=0.2)


class Scaler:
    def get_scale(self) -> float:
        return 1.0


def checked_with_a_layer_that_is_pruned() -> Tensor:
    """Steps whose error is looked into, in which one bucket has nothing to send but whether it is finite."""
    layers = [nn.Linear(300, 300, bias=False) for _ in range(4)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.3)
    session = commpress.attach(model, grad_scaler=Scaler())
    search = Scripted(*["bf16"] * 61)
    search.checks = True
    auto_of(session).search = search  # type: ignore[assignment]
    masks = {
        name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.module.named_parameters() if name == "2.weight"
    }
    session.set_masks(masks)
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(60):
        model(x).sum().backward()
    return parameters_of_gradient(model)


@pytest.mark.slow
def test_all_collectives_of_a_checked_step_come_in_one_order() -> None:
    first, *others = run(3, checked_with_a_layer_that_is_pruned)
    assert all(torch.equal(first, other) for other in others)


CLOCK = {"none": 1.0, "bf16": 0.9, "int8": 0.6, "int4": 0.5}
"""Seconds of a step, as far as the ranks of a test say."""


@contextlib.contextmanager
def warned_of() -> Iterator[list[str]]:
    """While the block runs, `auto` finds int4 the fastest; what it warns of is kept."""
    warned: list[str] = []
    with (
        by_clock(CLOCK.__getitem__),
        mock.patch.dict(table.KERNELS),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        yield warned
        warned += [str(w.message) for w in caught if "; from step" in str(w.message)]


def breaks(spec: str | None, at: int, steps: int) -> dict[str, Any]:
    """Train on, when nothing has begun to arrive by int4; what came of it, beside plain training."""
    model, plain = replica(), replica()
    with warned_of() as said:
        session, optimizer = commpress.attach(model, spec), sgd(model, lr=0.02)
        train(model, range(at), optimizer=optimizer)
        sound = table.KERNELS["mean", "int4", "cpu"].run

        def lost(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
            sound(codec, payloads, count, out)
            out.zero_()

        table.KERNELS["mean", "int4", "cpu"] = table.Kernel(lost)
        trained = train(model, range(at, steps), optimizer=optimizer)
    train(plain, range(steps), optimizer=sgd(plain, lr=0.02))
    with torch.no_grad():
        losses = [float(sum(loss_of(m.module, 1000 + i) for i in range(32)) / 32) for m in (model, plain)]
    return {"losses": losses, "said": said, "parameters": trained.parameters, "explained": session.explain()}


@pytest.mark.slow
def test_a_spec_that_hurts_gives_way_on_all_ranks_and_the_loss_is_that_of_plain_training() -> None:
    first, second = run(2, breaks, None, 60, 300)
    assert same(first["parameters"], second["parameters"])
    guarded, plain = first["losses"]
    assert guarded < 1.03 * plain
    (told,) = first["said"]
    assert second["said"] == []  # once, on the rank that leads
    assert "the means of int4 were off by 1.00" in told
    assert " on int8" in told
    assert "int8 at step" in first["explained"]
    unguarded, plain = run(2, breaks, "int4", 60, 300)[0]["losses"]
    assert unguarded > 2 * plain


def hurt(how: str, at: int) -> dict[str, Any]:
    """Train while int4 hurts from step `at` on: rank 1 keeps too much as its residual, the means have the wrong sign in all
    steps whose error is not measured, or the loss of rank 1 is not finite."""
    model = replica()
    with warned_of() as said:
        session, optimizer = commpress.attach(model), sgd(model, lr=0.02)
        auto = auto_of(session)
        encode, mean = (table.KERNELS[op, "int4", "cpu"].run for op in ("encode", "mean"))

        def grows(codec: Any, x: Tensor, residual: Tensor | None, *more: Any) -> None:
            encode(codec, x, residual, *more)
            if residual is not None:
                residual += 6 * x  # more is left out than there was

        def turns(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
            mean(codec, payloads, count, out)
            if auto.watch is None:
                out.neg_()

        for step in range(at + 5 * LOOK):
            if step == at and how == "residual" and dist.get_rank() == 1:
                table.KERNELS["encode", "int4", "cpu"] = table.Kernel(grows)
            if step == at and how == "loss":
                table.KERNELS["mean", "int4", "cpu"] = table.Kernel(turns)
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            not_finite = at <= step < at + 2 * LOOK and how == "not finite" and dist.get_rank() == 1
            session.note_loss(float("nan") if not_finite else loss)
    choices = [(choice.spec, choice.step, choice.cause) for choice in session.report().choices]
    return {"said": said, "choices": choices, "explained": session.explain(), "parameters": parameters_of(model)}


@pytest.mark.parametrize(
    ("how", "at", "cause"),
    [
        ("residual", 60, r"the residual of int4 was [\d.]+ times the gradient, more than 3"),
        slow("loss", 150, r"the loss rose to [\d.]+ from a mean of [\d.]+ under int4"),
        slow("not finite", 60, r"the loss was nan under int4"),
    ],
)
def test_all_ranks_back_off_at_one_step_and_say_why_once(how: str, at: int, cause: str) -> None:
    first, second = run(2, hurt, how, at)
    assert first["choices"] == second["choices"]
    assert [spec for spec, _, _ in first["choices"]][:2] == ["int4", "int8"]
    assert at <= first["choices"][1][1] <= at + 4 * LOOK
    assert re.fullmatch(cause, first["choices"][1][2])
    assert [line for line in first["said"] if re.search(f"{cause}; from step .* on int8", line)] == first["said"][:1]
    assert second["said"] == []
    assert " ".join(re.sub("[│─┃]", "", first["explained"]).split()).count("hurt") == 1
    assert same(first["parameters"], second["parameters"])


def noted(loss: Any) -> str:
    return outcome(lambda: commpress.attach(replica()).note_loss(loss))


def test_a_loss_of_several_values_is_refused() -> None:
    said = "ValueError: note_loss: expected a number or a tensor with one value, got one of shape [3]"
    assert run(1, noted, torch.ones(3)) == [said]
    assert run(1, noted, torch.ones(1, requires_grad=True)) == [""]


def drifted() -> list[str]:
    """A rank's parameter changes by its last bit while `auto` sends by int4; what each backward says."""
    model = replica()
    session, optimizer = commpress.attach(model, verify=2), sgd(model)
    auto_of(session).search = Scripted("none", "none", *["int4"] * 4)  # type: ignore[assignment]
    said = []
    for step in range(5):
        if step == 4 and dist.get_rank() == 1:
            with torch.no_grad():
                model.module[2].weight.view(-1)[:1].view(torch.int32).add_(1)
        optimizer.zero_grad()
        said.append(outcome(lambda step=step: loss_of(model, step).backward()))  # type: ignore[misc]
        optimizer.step()
    return said


def test_a_replica_that_drifts_under_auto_is_named() -> None:
    for said in run(2, drifted):
        assert said[:-1] == [""] * 4
        assert re.search(r"rank 1 \(.*\) has other values of parameter '2.weight' in step 4", said[-1])
