"""What becomes of errors: they reach backward on every rank, with the rank and the reason, and nobody waits for long."""

import gc
import os
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Died, outcome, run
from tiers import slow
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, loss_of, network, train

import commpress
from commpress.comm.exchange import Wire
from commpress.kernels import table

PATIENT = 300.0
"""Timeout of the process group in seconds, far beyond that of the test: whoever waits for it fails the test."""


def failing_codec(op: str, bad_rank: int) -> list[str]:
    """A loop of int4 raises on one rank in step 2; what four further backwards say."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(ddp, "int4")
    train(ddp, range(2))
    if dist.get_rank() == bad_rank:
        table.KERNELS[op, "int4", "cpu"] = table.Kernel(raising)
    return [outcome(lambda step=step: loss_of(ddp, step).backward()) for step in range(2, 6)]


def again_after_failure() -> tuple[str, list[str], list[torch.Tensor]]:
    """What a failed exchange says, what attaching to new modules and a step say then, and where they end."""
    ddp = DistributedDataParallel(network())
    commpress.attach(ddp, "int4")
    sound = table.KERNELS["encode", "int4", "cpu"]
    if dist.get_rank() == 1:
        table.KERNELS["encode", "int4", "cpu"] = table.Kernel(raising)
    failed = outcome(lambda: loss_of(ddp, 0).backward())
    table.KERNELS["encode", "int4", "cpu"] = sound
    del ddp
    gc.collect()
    said, ends = [], []
    for _ in range(2):
        ddp = DistributedDataParallel(network())
        said.append(outcome(lambda ddp=ddp: commpress.attach(ddp, "int4")))  # type: ignore[misc]
        ends += [] if said[-1] else train(ddp, range(2)).parameters
    return failed, said, ends


def siblings() -> list[str]:
    """The names of groups of ours: all ranks close the first, one the second, and one the third while it makes a fourth."""
    group, names = dist.distributed_c10d._get_default_group(), []
    for closing in ((0, 1), (1,), ()):
        ours = Wire(group, torch.device("cpu"))
        names.append(ours.open_group().group_name)
        if dist.get_rank() in closing:
            ours.close()
    make = dist.new_group

    def closes(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            ours.close()
        return make(*args, **kwargs)

    with mock.patch.object(dist, "new_group", closes):
        last = Wire(group, torch.device("cpu"))
    return [*names, last.open_group().group_name]


def raising(*_: Any) -> None:
    """A loop that does not work."""
    raise ArithmeticError("the kernel is broken")


def dying(bad_rank: int, spec: str) -> list[str]:
    """One rank's process ends in the middle of its third backward. No garbage collection closes what the others hold."""
    gc.disable()
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(ddp, spec)
    train(ddp, range(2))
    if dist.get_rank() == bad_rank:
        ddp.module[0].weight.register_hook(lambda gradient: os._exit(7))
    return [outcome(lambda step=step: loss_of(ddp, step).backward()) for step in range(2, 5)]


def silent(bad_rank: int, folder: str) -> list[str]:
    """One rank stops taking part, but lives on until the others have seen their error."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(ddp, "int4")
    train(ddp, range(2))
    if dist.get_rank() == bad_rank:
        while len(list(Path(folder).iterdir())) < dist.get_world_size() - 1:
            time.sleep(0.05)
        return []
    said = [outcome(lambda step=step: loss_of(ddp, step).backward()) for step in range(2, 4)]
    (Path(folder) / str(dist.get_rank())).touch()
    return said


def bad_restore() -> list[str]:
    """Rank 1's first step after a restore cannot be exchanged, because its model has other parameters."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(ddp, "int4")
    train(ddp, range(3))
    saved = session.state_dict()
    if dist.get_rank() == 1:
        saved["memories"][0][0]["segments"][0][0] = "another"
    again = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(again, "int4")
    said = outcome(lambda: session.load_state_dict(saved))
    if said:
        return [said]
    return [outcome(lambda: loss_of(again, 0).backward())]


@pytest.mark.parametrize(("op", "world_size", "bad_rank"), [
    ("encode", 2, 0), ("encode", 3, 1), ("recode", 3, 1), ("mean", 2, 0),
])  # fmt: skip
def test_an_exception_in_a_codec_reaches_every_rank_with_its_reason(op: str, world_size: int, bad_rank: int) -> None:
    ranks = run(world_size, failing_codec, op, bad_rank, group_timeout=PATIENT, fresh=True)
    for rank, said in enumerate(ranks):
        # a rank that had all payloads when another failed to decode them learns of it in its next backward
        unaware = op == "mean" and rank != bad_rank and not said[0]
        for message in said[unaware:]:  # the first failed backward and all later ones
            assert "RuntimeError" in message or "ExchangeError" in message
            assert f"rank {bad_rank}: ArithmeticError: the kernel is broken" in message


def test_another_model_can_be_attached_after_a_failure() -> None:
    (failed, said, ends), (other_failed, other_said, other_ends) = run(2, again_after_failure, fresh=True)
    assert "the kernel is broken" in failed
    assert "the kernel is broken" in other_failed
    assert said == other_said == ["", ""]
    assert len(ends) == 12
    assert all(torch.equal(a, b) for a, b in zip(ends, other_ends, strict=True))


def test_no_group_has_the_name_of_a_closed_one() -> None:
    """Under that name the store still has the addresses of the closed one. And all ranks need the same name."""
    one, other = run(2, siblings)
    assert one == other
    assert len(set(one)) == 4


@pytest.mark.parametrize(("world_size", "bad_rank", "tcp", "spec"), [
    (2, 1, False, "int4"), (3, 1, True, "topk(0.1)|int4"), slow(2, 0, True, "int4"), slow(2, 1, False, "bf16"),
    (3, 0, True, "none"),
])  # fmt: skip
def test_a_rank_that_dies_is_noticed_at_once(world_size: int, bad_rank: int, tcp: bool, spec: str) -> None:
    ranks = run(world_size, dying, bad_rank, spec, group_timeout=PATIENT, fresh=True, tcp=tcp)
    assert ranks[bad_rank] == Died(7)
    for said in ranks[:bad_rank] + ranks[bad_rank + 1 :]:
        for message in said:
            assert "RuntimeError" in message or "ExchangeError" in message
            # in the first backward; later ones may also be told by DDP itself that the connections are closed
            assert f"commpress: rank {bad_rank} ({socket.gethostname()}) is gone" in message


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_stops_sending_is_an_error_after_the_timeout(world_size: int, tmp_path: Path) -> None:
    ranks = run(world_size, silent, 1, str(tmp_path), group_timeout=5, fresh=True)
    for rank, said in enumerate(ranks):
        assert len(said) == (0 if rank == 1 else 2)
        for message in said:
            assert f"commpress: rank 1 ({socket.gethostname()}) did not answer within the group's timeout" in message


def test_an_error_is_a_runtime_error_that_users_can_catch() -> None:
    from commpress.comm.failure import ExchangeError

    assert issubclass(ExchangeError, RuntimeError)


def test_a_restore_that_fails_on_one_rank_leaves_no_rank_waiting() -> None:
    one, other = run(2, bad_restore, group_timeout=8, fresh=True)
    assert "'another'" in other[0] or "cannot restore" in other[0]
    assert one[0]


def test_the_loops_are_whole_again_in_new_processes() -> None:
    """The faults above were those of their processes."""
    assert run(2, healthy) == [True, True]


def healthy() -> bool:
    """A short training works."""
    ddp = DistributedDataParallel(network())
    commpress.attach(ddp, "int4")
    return all(bool(torch.isfinite(p).all()) for p in train(ddp, range(2)).parameters)
