"""Buckets that `auto` sends in pieces, beside what makes it hard: nothing is lost, and all ranks have the same bits."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run
from scripted import Scripted
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm import auto

LAYERS, WIDTH, STEPS = 6, 40, 4
Rows = list[tuple[str, int, int]]
"""Spec, values and steps of the rows of a report."""


class Layers(nn.Module):
    """Linear layers side by side: the gradient of each is the same in all steps. A rank may leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        return sum((i + 1) * self.layers[i](x).sum() for i in used)  # type: ignore[return-value]


def scripted(session: commpress.Session, specs: list[str], checks: bool = False) -> None:
    assert session.step_buffer is not None
    assert session.step_buffer.auto is not None
    search = Scripted(*specs)
    search.checks = checks
    session.step_buffer.auto.search = search  # type: ignore[assignment]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def data() -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))


def dense(used: Callable[[int], list[int]], group: Any, steps: int) -> Tensor:
    """The sum of the exact means of so many steps; the layers' values do not matter."""
    total, module = torch.zeros(LAYERS * WIDTH * WIDTH), Layers()
    for step in range(steps):
        module.zero_grad()
        module(data(), used(step)).backward()
        mean = gradients(module)
        dist.all_reduce(mean, dist.ReduceOp.AVG, group=group)
        total += mean
    return total


def arrived(model: DistributedDataParallel, used: Callable[[int], list[int]], steps: int, scaler: Any) -> list[Tensor]:
    """The means of so many steps, in which the parameters stay as they are."""
    found, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        loss, scale = model(data(), used(step)), 1.0 if scaler is None else scaler.get_scale()
        (loss if scaler is None else scaler.scale(loss)).backward()
        found.append(gradients(model) / scale)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
    return found


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    """Of the layers that are sent first hardly anything is kept: less than is worth a code."""
    kept = {LAYERS - 1: 1, LAYERS - 2: 1, LAYERS - 3: 20}
    return {
        name: torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) % WIDTH < kept.get(i, 30)
        for i, (name, _) in enumerate(module.named_parameters())
    }


def by(spec: str, way: str) -> tuple[list[Tensor], Tensor, Rows, int]:
    """Steps by a spec, at last one by `none`: what arrived, the sum that should have, the report's rows, and the values that it
    says were not compressed."""
    torch.manual_seed(0)
    module, me = Layers(), dist.get_rank()
    model = DistributedDataParallel(module, bucket_cap_mb=0.02, find_unused_parameters=way == "unused")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1) if way == "scaler" else None
    session = commpress.attach(model, grad_scaler=scaler)
    mask = torch.ones(LAYERS * WIDTH * WIDTH)
    if way == "masks":
        session.set_masks(masks_of(module))
        mask = torch.cat([one.flatten() for one in masks_of(module).values()]).float()

    def used(step: int) -> list[int]:
        return [i for i in range(LAYERS) if way != "unused" or me == 0 or (i + step + me) % 3]

    scripted(session, [spec] * STEPS + ["none"], checks=way == "checked")
    found, wanted = arrived(model, used, STEPS + 1, scaler), dense(used, None, STEPS + 1)
    left = sum(n for why, n in session.receipt().uncompressed.items() if why.startswith("fewer"))
    return found, mask * wanted, [(row.spec, row.values, row.steps) for row in session.report().rows], left


def in_pieces_and_whole(way: str) -> tuple[Any, Any]:
    with mock.patch.object(auto, "PIECE", 8000):  # two layers
        return by("int8 in 4 MB", way), by("int8", way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["masks", "scaler", "unused", "checked"])
def test_pieces_lose_nothing_and_bring_what_whole_buckets_bring(way: str) -> None:
    first, *others = run(3, in_pieces_and_whole, way)
    for found, wanted, _, _ in first:
        assert torch.allclose(sum(found), wanted, rtol=1e-4, atol=1e-3)
    (pieces, wanted, rows, left), (whole, _, whole_rows, _) = first
    assert not torch.allclose(
        sum(pieces[:-1]), STEPS / (STEPS + 1) * wanted, rtol=1e-4, atol=1e-3
    )  # a residual was left
    for one, other in zip(pieces, whole, strict=True):
        assert (one - other).abs().max() < 0.05 * other.abs().max()
    for of_other_rank, _ in others:
        assert all(torch.equal(*both) for both in zip(pieces, of_other_rank[0], strict=True))
    coded, coded_whole = ([(n, steps) for spec, n, steps in of if spec == "int8"] for of in (rows, whole_rows))
    assert coded == coded_whole  # a row is a bucket
    layer = WIDTH * WIDTH
    assert left == (round(2 * layer * STEPS / (STEPS + 1)) if way == "masks" else 0)


def restarted(spec: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Steps by a spec on three ranks, which two of them continue, at last by `none`: the sum of what arrived, what should have,
    and the means of the two; the third rank has none."""
    torch.manual_seed(0)
    module = Layers()
    model = DistributedDataParallel(module, bucket_cap_mb=0.02)
    session = commpress.attach(model)
    all_used: Callable[[int], list[int]] = lambda step: list(range(LAYERS))  # noqa: E731
    scripted(session, [spec] * STEPS)
    total, wanted = sum(arrived(model, all_used, STEPS, None)), dense(all_used, None, STEPS)
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, dict(session.state_dict()))
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return torch.zeros(()), torch.zeros(()), []
    again = DistributedDataParallel(Layers(), bucket_cap_mb=0.02, process_group=group)
    session = commpress.attach(again)
    session.load_state_dict(states)
    scripted(session, [spec, spec, "none"])
    means = arrived(again, all_used, 3, None)
    return total + sum(means), wanted + dense(all_used, group, 3), means


def restarted_in_pieces() -> tuple[Tensor, Tensor, list[Tensor]]:
    with mock.patch.object(auto, "PIECE", 8000):
        return restarted("int8 in 4 MB")


@pytest.mark.slow
def test_pieces_lose_nothing_when_fewer_ranks_go_on() -> None:
    (total, wanted, means), (_, _, others), _ = run(3, restarted_in_pieces)
    assert torch.allclose(total, wanted, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(*both) for both in zip(means, others, strict=True))
