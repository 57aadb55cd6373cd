"""Ranks of a node make a part of the matrices each: the same bits on all of them, and the steps of ranks that make all."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, network, parameters_of, same, train

import commpress
from commpress.comm.meter import Report
from commpress.optim import EF21Muon, muon, shared_products
from commpress.optim.newton_schulz import newton_schulz
from commpress.optim.shared_products import shared_out

STEPS = 6


def trained(ranks_per_node: str, spec: str = "sign") -> tuple[list[list[Tensor]], int, Report]:
    """Parameters after each step, how many matrices this rank has made, and what was sent."""
    made = 0

    def counted(matrices: Tensor) -> Tensor:
        nonlocal made
        made += len(matrices)
        return newton_schulz(matrices)

    with (
        mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": ranks_per_node}),
        mock.patch.object(shared_products, "FEWEST", 0),
        mock.patch.object(muon, "newton_schulz", counted),
    ):
        ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
        optimizer = EF21Muon(ddp, lr=0.01)
        session = commpress.attach(ddp, spec, optimizer=optimizer)
        history = [train(ddp, [step], optimizer=optimizer).parameters for step in range(STEPS)]
    return history, made, session.report()


def both(ranks_per_node: str) -> tuple[Any, Any]:
    return trained(ranks_per_node), trained("1")


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, "2"), slow(3, "3"), (4, "2")])
def test_what_a_node_shares_out_has_the_same_bits_on_all_ranks(world_size: int, ranks_per_node: str) -> None:
    results = run(world_size, both, ranks_per_node)
    first = results[0][0][0]
    for (history, _, report), (alone, made_alone, _) in results:
        assert all(same(one, other) for one, other in zip(history, first, strict=True))
        assert made_alone == 3 * STEPS
        start, a, b = (
            torch.cat([p.reshape(-1) for p in each]) for each in (parameters_of(network()), history[-1], alone[-1])
        )
        assert float((a - b).norm() / (b - start).norm()) < 1e-4
        (row,) = [row for row in report.rows if row.role == "updates"]
        assert row.sent_bytes == row.inside_bytes == report.inside_bytes > 0
    nodes = world_size // int(ranks_per_node)
    assert sum(made for (_, made, _), _ in results) == nodes * 3 * STEPS
    assert max(made for (_, made, _), _ in results) < 3 * STEPS


def unlike() -> str:
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": ("2", "1")[dist.get_rank()]}):
        ddp = DistributedDataParallel(network())
        optimizer = EF21Muon(ddp, lr=0.01)
        commpress.attach(ddp, "sign", optimizer=optimizer)
        return outcome(lambda: train(ddp, range(2), optimizer=optimizer))


def test_ranks_that_share_out_unlike_end_with_a_disagreement() -> None:
    for said in run(2, unlike, fresh=True):
        assert "DisagreementError" in said
        assert "2 ranks a node" in said
        assert "1 ranks a node" in said


def test_matrices_are_shared_out_by_their_work() -> None:
    assert shared_out([8, 1, 4, 3, 1], 2) == [0, 1, 1, 1, 0]
    assert shared_out([5, 5, 5], 4) == [0, 1, 2]
    loads = [0, 0, 0]
    for owner, work in zip(shared_out(works := [7, 7, 5, 5, 3, 3, 2], 3), works, strict=True):
        loads[owner] += work
    assert max(loads) - min(loads) <= 2
