"""The order in which model, optimizer and session are loaded, where each rank has local steps of its own."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch.nn.parallel import DistributedDataParallel
from training import loss_of, network

import commpress
from commpress.optim import ZeroOneAdamW

Outcome = tuple[bool, list[str]]


def made() -> tuple[DistributedDataParallel, ZeroOneAdamW, commpress.Session]:
    ddp = DistributedDataParallel(network())
    optimizer = ZeroOneAdamW(ddp.parameters(), lr=1e-2, warmup_steps=2, sync_every=4)
    return ddp, optimizer, commpress.attach(ddp, "sign", optimizer=optimizer)


def resumed(order: str, fresh: bool) -> Outcome:
    """Whether a run goes on bit for bit after its parts are loaded in this order, and what is warned of."""
    ddp, optimizer, session = made()

    def go_on(first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(ddp, step).backward()
            optimizer.step()

    go_on(0, 9)
    with optimizer.synced():
        model = copy.deepcopy(ddp.module.state_dict())
    of_rank_0 = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(of_rank_0, 0)
    own = copy.deepcopy(dict(session.state_dict()))
    go_on(9, 12)
    unbroken = [p.detach().clone() for p in ddp.parameters()]
    if fresh:
        ddp, optimizer, session = made()
    load: dict[str, Callable[[], object]] = {
        "m": lambda: ddp.module.load_state_dict(model),
        "o": lambda: optimizer.load_state_dict(copy.deepcopy(of_rank_0[0])),
        "s": lambda: session.load_state_dict(own),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in order:
            load[part]()
        go_on(9, 12)
    same = all(torch.equal(p, q) for p, q in zip(ddp.parameters(), unbroken, strict=True))
    return same, [str(each.message) for each in caught if "in this order" in str(each.message)]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("order", ["mos", "oms"])
def test_the_session_last_goes_on_bit_for_bit(order: str, fresh: bool) -> None:
    assert run(2, resumed, order, fresh) == [(True, [])] * 2


@pytest.mark.parametrize(("order", "fresh"), [("osm", True), ("mo", True), ("mso", False), ("som", False)])
def test_another_order_or_no_session_is_told_once(order: str, fresh: bool) -> None:
    (same, told), (_, silent) = run(2, resumed, order, fresh)
    assert not same
    assert len(told) == 1
    assert "Load the model, then the optimizer, then the session" in told[0]
    assert silent == []


def loaded_twice() -> bool:
    """The optimizer's state of the same sync once more, behind the session's, as torch.distributed.checkpoint loads it."""
    ddp, optimizer, session = made()
    for step in range(9):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()
    of_rank_0 = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(of_rank_0, 0)
    own = [optimizer.state[p]["total"].clone() for p in ddp.parameters()]
    state = copy.deepcopy(dict(session.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(of_rank_0[0]))
    session.load_state_dict(state)
    optimizer.load_state_dict(copy.deepcopy(of_rank_0[0]))
    return all(torch.equal(optimizer.state[p]["total"], mine) for p, mine in zip(ddp.parameters(), own, strict=True))


def test_what_is_a_ranks_own_survives_the_optimizers_state_behind_it() -> None:
    assert run(2, loaded_twice) == [True, True]
