"""Questions that travel in line: no rank waits for another in the middle of a backward, and all know the same a step later."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, network, parameters_of, same

import commpress
from commpress.comm.agreement import Settings
from commpress.comm.collectives import Collectives
from commpress.comm.plan import Plan
from commpress.comm.question import ROOM

HELD = 5.0
"""Seconds after which a rank that waits for ever is an error."""


def trained_while_held(optimizer: str, steps: int, unused: bool) -> tuple[list[Tensor], str]:
    """Train while rank 1 waits before each backward for what the others do inside theirs, behind their buckets."""
    me, group = dist.get_rank(), dist.new_group()
    model = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=unused)
    if optimizer:
        stepper: Any = getattr(commpress.optim, optimizer)(model.parameters(), lr=0.01, warmup_steps=3)
        session = commpress.attach(model, "sign", optimizer=stepper)
    else:
        stepper = torch.optim.SGD(model.parameters(), lr=0.01)
        session = commpress.attach(model)

    def meet(_: object = None) -> None:
        dist.all_reduce(torch.zeros(1), group=group)

    for step in range(steps):
        stepper.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + me)
        x = 1 * torch.randn(4, 32, generator=generator).requires_grad_()
        loss = model(x).square().sum()
        if me == 1:
            meet()
        else:
            x.register_hook(meet)
        loss.backward()
        stepper.step()
    return parameters_of(model), session.explain()


def test_a_rank_held_in_a_collective_of_the_users_does_not_stop_a_search() -> None:
    (one, explained), (other, told) = run(2, trained_while_held, "", 60, False, group_timeout=HELD)
    assert same(one, other)
    assert explained == told
    assert "chosen after" in explained


@pytest.mark.parametrize("unused", [False, True])
def test_a_rank_held_in_a_collective_of_the_users_does_not_stop_a_change_of_phase(unused: bool) -> None:
    (one, _), (other, _) = run(2, trained_while_held, "OneBitAdamW", 6, unused, group_timeout=HELD)
    assert same(one, other)


def collectives() -> Collectives:
    group = dist.group.WORLD
    assert group is not None
    return Collectives(group, torch.device("cpu"), Plan.of("none"))


def answered() -> tuple[list[Settings], str]:
    traffic = collectives().traffic
    question = traffic.send_question({"rank": dist.get_rank(), "text": "ä" * 100}, "who is there")
    return question.answers(), outcome(lambda: traffic.send_question({"text": "x" * ROOM}, "too much"))


def test_all_ranks_read_what_all_have_said() -> None:
    for answers, refused in run(3, answered):
        assert answers == [{"rank": rank, "text": "ä" * 100} for rank in range(3)]
        assert refused.startswith("ValueError: 8204 bytes to tell the other ranks (")


def unequal() -> tuple[str, bool]:
    """What an exchange says behind a comparison of settings that differ; whether its tensor is as it was."""
    own = collectives()
    own.traffic.compare({"colour": "red"}, "a colour")
    x = torch.ones(1000)
    own.all_reduce(x, (), 0).wait()
    own.traffic.compare({"colour": ("red", "blue", "red")[dist.get_rank()]}, "a colour")
    x = torch.full((1000,), float(dist.get_rank()))
    work = own.all_reduce(x, (), 0)
    return outcome(work.wait), bool((x == dist.get_rank()).all())


def test_nothing_travels_behind_a_comparison_that_fails() -> None:
    for said, untouched in run(3, unequal):
        assert said.startswith("DisagreementError: commpress: rank 1 has colour 'blue', rank 0 has 'red'")
        assert untouched
