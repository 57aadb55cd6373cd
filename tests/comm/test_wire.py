"""Messages that another rank does not expect, and ranks that leave: every rank says who did what."""

import gc
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Died, outcome, run
from tiers import slow, slowly
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, loss_of, network, train

import commpress
from commpress.comm.exchange import Label, Labels, Wire, held
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.store import own_store

CPU = torch.device("cpu")
PATIENT = 300.0
"""Timeout of the process group in seconds, far beyond that of the test: whoever waits for it fails the test."""


def message(length: int, text: str, collective: bool) -> str:
    """What a rank says that sends `length` bytes called `text`."""
    wire = Wire(dist.group.WORLD, CPU)
    x = torch.zeros(length, dtype=torch.uint8)
    rows = [torch.empty_like(x) for _ in range(wire.world_size)]
    label = Label(0, text)

    def send() -> None:
        (wire.all_reduce(x, label) if collective else wire.all_gather(rows, label, True)).wait()

    try:
        send()
    except RuntimeError as error:
        return str(wire.board.explain(error))
    return ""


def different(lengths: list[int], texts: list[str], collective: bool) -> str:
    """Each rank's own message."""
    return message(lengths[dist.get_rank()], texts[dist.get_rank()], collective)


def later(collective: bool) -> str:
    """After three rounds of the same two messages rank 1 sends the second one first."""
    wire, order = Wire(dist.group.WORLD, CPU), [0, 1, 0, 1, 0, 1]
    order += [1, 0] if dist.get_rank() else [0, 1]
    buffers = [torch.zeros(100, dtype=torch.uint8), torch.zeros(4000, dtype=torch.uint8)]
    try:
        for tag, which in enumerate(order):
            x, label = buffers[which], Label(2 * tag, f"bucket {which}")
            rows = [torch.empty_like(x) for _ in range(wire.world_size)]
            (wire.all_reduce(x, label) if collective else wire.all_gather(rows, label, True)).wait()
    except RuntimeError as error:
        said = f"{tag}: {wire.board.explain(error)}"
        wire.close()  # who has started a collective waits for that
        return said
    return ""


def flipped(proven: bool) -> str:
    """What rank 0 says of a payload that is damaged on its way."""
    wire = Wire(dist.group.WORLD, CPU)
    x = torch.arange(1000, dtype=torch.int32).view(torch.uint8)
    rows = [torch.empty_like(x) for _ in range(2)]
    rows[wire.rank].copy_(x)
    transfer = wire.all_gather(rows, Label(0, "a bucket", proven), True)
    transfer.headers[0].check()
    for _, work in transfer.works:
        work.wait()
    rows[1 - wire.rank][17] ^= 4
    transfer.works = []
    return outcome(transfer.headers[0].prove)


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize(("lengths", "texts"), [
    ([100, 104], ["a bucket"] * 2), ([100, 4000], ["a bucket"] * 2), ([100, 0], ["a bucket"] * 2),
    ([100, 100], ["a bucket by int4", "a bucket by sign"]), ([100, 100, 300], ["a bucket"] * 3),
])  # fmt: skip
def test_other_messages_are_errors_with_both_values(lengths: list[int], texts: list[str], collective: bool) -> None:
    said = run(len(lengths), different, lengths, texts, collective, group_timeout=PATIENT, fresh=True)
    odd = len(lengths) - 1
    for rank, message in enumerate(said):
        if len(lengths) == 2 or rank == odd:
            assert f"rank {odd} ({socket.gethostname()}) has {texts[odd]}: {lengths[odd]} bytes" in message
            assert f"has {texts[0]}: {lengths[0]} bytes" in message
        assert "rank 2" in message or len(lengths) == 2  # others may lose it before they see what it sends


@pytest.mark.parametrize("collective", [False, True])
def test_an_order_that_differs_is_an_error_on_both_ranks(collective: bool) -> None:
    for said in run(2, later, collective, group_timeout=PATIENT, fresh=True):
        assert said.startswith("6: ")
        assert "has bucket 0: 100 bytes" in said
        assert "has bucket 1: 4000 bytes" in said


def test_a_damaged_payload_is_noticed_where_payloads_are_checked() -> None:
    for said in run(2, flipped, True, fresh=True):
        assert "are not those that it sent" in said
    assert run(2, flipped, False, fresh=True) == ["", ""]


def replanned(spec: str, parameters: str) -> list[str]:
    """Rank 1's session gets another plan behind the user's back."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(ddp, spec)
    train(ddp, range(5))
    if dist.get_rank() == 1:
        session.collectives[0].gradients = Plan.of(parameters)
    return [outcome(lambda step=step: loss_of(ddp, step).backward()) for step in range(5, 7)]


@pytest.mark.parametrize(
    ("spec", "other"), [("int4", "int8"), slow("none", "bf16"), ("bf16", "int4"), ("sign", "topk(0.1)")]
)
def test_another_spec_on_one_rank_is_an_error_on_both(spec: str, other: str) -> None:
    for said in run(2, replanned, spec, other, group_timeout=PATIENT, fresh=True):
        for message in said:
            assert f"by {spec}, " in message
            assert f"by {other}, " in message
            assert f"rank 1 ({socket.gethostname()})" in message


def keeps(action: str, spec: str) -> str:
    """Rank 0 calls something collective, rank 1 goes on training."""
    ddp = DistributedDataParallel(network())
    session = commpress.attach(ddp, spec)
    train(ddp, range(5))  # so that no step is compared, and all of it comes as it came before
    if dist.get_rank() == 1:
        return outcome(lambda: loss_of(ddp, 5).backward())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in ddp.module.named_parameters()}
    actions = {"keep": lambda: session.set_masks(masks), "agree": lambda: session.agree({"step": 5})}
    return outcome(actions[action])


@pytest.mark.parametrize(
    ("action", "spec"), [("keep", "int4"), ("agree", "int4"), slow("keep", "none"), slow("agree", "bf16")]
)
def test_a_collective_call_on_one_rank_alone_is_an_error_on_both(action: str, spec: str) -> None:
    for said in run(2, keeps, action, spec, group_timeout=PATIENT, fresh=True):
        assert "gradients of" in said
        assert "rank 0" in said
        assert "rank 1" in said


def held_up(spec: str, after: str) -> tuple[list[bool], bool, str]:
    """Each rank in turn is late for a step, longer than the other one waits in silence; then the traffic changes.

    Whether gradients are those of plain DDP, whether the store has what they said, and an error.
    """
    plain = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(ddp, spec)
    train(ddp, range(5))
    train(plain, range(5))
    wire, said, equal = session.collectives[0].traffic.wire, [], []
    say = wire.board.say
    with (
        mock.patch.object(held, "HELD_SECONDS", 0.1),
        mock.patch.object(wire.board, "say", lambda text: (said.append(text), say(text))),
    ):
        for step in range(5, 11):
            if dist.get_rank() == step % 2:
                time.sleep(0.4)
            for model in (ddp, plain):
                model.zero_grad()
                loss_of(model, step).backward()
            pairs = zip(ddp.parameters(), plain.parameters(), strict=True)
            equal.append(all(torch.equal(p.grad, q.grad) for p, q in pairs))
            dist.barrier()
    keys = [f"{wire.board._key}/{rank}" for rank in range(2)]
    left = any(own_store().check([key]) for key in keys)
    session.collectives[0].gradients = Plan.of(after)
    error = outcome(lambda: [loss_of(ddp, step).backward() for step in range(11, 14)])
    return equal if said else [], left, error


@pytest.mark.parametrize("after", [slow("int8"), "bf16"])
def test_a_rank_that_is_late_is_told_and_all_goes_on(after: str) -> None:
    """Nobody takes the headers that were sent meanwhile: they do not get between later ones."""
    for equal, left, error in run(2, held_up, "none", after, group_timeout=20.0, fresh=True):
        assert equal == [True] * 6
        assert not left
        assert error == ""


def needless_headers() -> int:
    """How many headers this rank sends while FSDP2 trains by collectives of the group, and nobody is late."""
    sent: list[object] = []
    with mock.patch.object(Wire, "_send_header", lambda *of: sent.append(of)):
        model = network()
        fully_shard(model)
        commpress.attach(model, gradients="none", parameters="none")
        for step in range(5):
            loss_of(model, step).backward()
    return len(sent)


def test_a_sum_that_ends_in_time_sends_no_header() -> None:
    """Works of some collectives never say that they are completed."""
    assert run(2, needless_headers) == [0, 0]


def slow_sums() -> int:
    """Each rank in turn is late for a sum, 20 times in all; how many headers this one sends."""
    wire, labels, sent = Wire(dist.group.WORLD, torch.device("cpu")), Labels(), []
    send = wire._send_header
    wire._send_header = lambda *of: (sent.append(of), send(*of))  # type: ignore[method-assign,assignment,func-returns-value]
    with mock.patch.object(held, "HELD_SECONDS", 0.02):
        for i in range(42):
            if i > 1 and dist.get_rank() == i % 2:
                time.sleep(0.1)
            wire.all_reduce(torch.ones(100), labels.next("a sum")).wait()
    return len(sent)


def test_headers_that_nobody_needs_become_rare() -> None:
    """The backend keeps what nobody receives."""
    assert all(1 <= sent <= 8 for sent in run(2, slow_sums))


# --- ranks that leave --------------------------------------------------------------------------------------------


def leaves_while_joining(bad_rank: int) -> str:
    """One rank dies between the agreement and the making of the group."""
    import commpress.comm.joining as joining

    if dist.get_rank() == bad_rank:
        joining.FailureBoard = lambda *_: os._exit(5)  # type: ignore[assignment,misc]
    start = time.monotonic()
    said = outcome(lambda: replicas_session("int4", dist.group.WORLD, CPU))
    return said if time.monotonic() - start < 10 else f"after {time.monotonic() - start:.0f} s: {said}"


@pytest.mark.parametrize(("world_size", "bad_rank", "tcp"), [(2, 1, False), (3, 1, False), (3, 2, True), (2, 0, True)])
def test_a_rank_that_dies_while_a_group_is_made_is_named(world_size: int, bad_rank: int, tcp: bool) -> None:
    ranks = run(world_size, leaves_while_joining, bad_rank, group_timeout=PATIENT, fresh=True, tcp=tcp)
    for rank, said in enumerate(ranks):
        if rank == bad_rank:
            assert said == Died(5)
        else:
            assert f"rank {bad_rank} ({socket.gethostname()}) is gone" in said


def stops(who: int, folder: str, after: int, spec: str) -> tuple[str, float]:
    """A rank is stopped (SIGSTOP) behind a step; what the others say, and seconds."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    commpress.attach(ddp, spec)
    train(ddp, range(after))
    dist.barrier()
    if dist.get_rank() == who:
        os.kill(os.getpid(), signal.SIGSTOP)
        return "", 0.0
    time.sleep(0.5)
    start = time.monotonic()
    said = outcome(lambda: loss_of(ddp, after).backward())
    took = time.monotonic() - start
    (Path(folder) / str(dist.get_rank())).touch()
    return said, took


@pytest.mark.parametrize(("world_size", "who", "spec"), [
    slow(3, 0, "int4"), (2, 1, "int4"), slow(3, 0, "none"), slow(3, 1, "none"), slow(3, 2, "bf16"),
])  # fmt: skip
def test_a_stopped_rank_is_named_within_the_timeout(world_size: int, who: int, spec: str, tmp_path: Path) -> None:
    """Rank 0 keeps the store: nobody may wait for what it has to say."""
    timeout = 4.0

    def wake() -> None:
        deadline = time.monotonic() + 40
        while len(list(tmp_path.iterdir())) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in _stopped():
            os.kill(process, signal.SIGCONT)

    waker = threading.Thread(target=wake, daemon=True)
    waker.start()
    ranks = run(world_size, stops, who, str(tmp_path), 5, spec, group_timeout=timeout, fresh=True, tcp=True)
    waker.join(5)
    for rank, (said, took) in enumerate(ranks):
        if rank != who:
            assert f"rank {who} ({socket.gethostname()}) did not answer within the group's timeout" in said
            assert took < timeout + 2


def _stopped() -> list[int]:
    """Stopped processes that descend from this one's session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] == "T" and int(fields[3]) == os.getsid(0):
            found.append(int(stat.parent.name))
    return found


# --- nothing is left behind --------------------------------------------------------------------------------------


def counts() -> tuple[int, int]:
    """File descriptors and native threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def attached_again(kind: str) -> list[tuple[int, int]]:
    """Descriptors and threads after four and eight sessions of a kind that were used and dropped."""
    seen = []
    for round_ in range(8):
        USES[kind]()
        if round_ in (3, 7):
            gc.collect()  # what is in cycles; the rest has gone at once
            dist.barrier()
            time.sleep(0.3)  # native threads end by themselves
            seen.append(counts())
    return seen


def use_ddp() -> None:
    """A DDP session."""
    ddp = DistributedDataParallel(network())
    commpress.attach(ddp, "int4")
    loss_of(ddp, 0).backward()


def use_buffers() -> None:
    """A DDP session with buffers."""
    ddp = DistributedDataParallel(torch.nn.Sequential(network(), torch.nn.BatchNorm1d(10)))
    commpress.attach(ddp, "int4", buffers="bf16")
    ddp(torch.randn(4, 32)).sum().backward()


def use_fsdp() -> None:
    """A sharded session."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model)
    commpress.attach(model, gradients="int4", parameters="int8")
    model(torch.randn(4, 32)).sum().backward()


def use_outer() -> None:
    """Outer syncs."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = commpress.diloco(model, optimizer, every=1)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    outer.sync()


def use_broadcast() -> None:
    """Broadcast parameters."""
    commpress.broadcast_parameters(network(), "int8")


USES: dict[str, Any] = {
    "ddp": use_ddp, "buffers": use_buffers, "fsdp": use_fsdp, "outer": use_outer, "broadcast": use_broadcast,
}  # fmt: skip


@pytest.mark.parametrize("kind", slowly(USES, quick=("ddp", "fsdp", "outer")))
def test_sessions_one_after_another_leave_no_descriptors_and_no_threads(kind: str) -> None:
    for early, late in run(2, attached_again, kind, fresh=True, timeout=100):
        assert all(now <= then for now, then in zip(late, early, strict=True)), (early, late)


def same_hash(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have one fingerprint."""
    from commpress.kernels.cpu.fingerprint import fingerprint

    return fingerprint(x) == fingerprint(y)


@pytest.mark.parametrize("n", [1, 3, 63, 64, 65, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_a_fingerprint_tells_any_flipped_bit(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, dtype=torch.float32).to(dtype)
    assert same_hash(x, x.clone())
    for byte in {0, x.nbytes // 2, x.nbytes - 1}:
        y = x.clone()
        y.view(torch.uint8)[byte] ^= 1 << (byte % 8)
        assert not same_hash(x, y)
    assert not same_hash(x, torch.cat([x, torch.zeros(1, dtype=dtype)]))
