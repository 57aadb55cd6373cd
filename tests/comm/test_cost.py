"""The cost model: bytes against real runs, seconds against what can be said without running."""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run
from tiers import slow

from commpress.comm import cost
from commpress.comm.cost import Cluster, Speed
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

PAIRS: tuple[tuple[str, str | None], ...] = (
    ("none", None),
    ("bf16", None),
    ("int8", None),
    ("int4", None),
    ("sign", None),
    ("topk(0.01)", None),
    ("topk(0.01)|int4", None),
    ("none", "two_shot"),
    ("bf16", "one_shot"),
    ("int4", "two_shot"),
    ("int8", "one_shot"),
    ("topk(0.1)|int4", "two_shot"),
)
BUCKETS = ((100, torch.float32), (1000, torch.float32), (70_001, torch.float32), (5000, torch.bfloat16))
"""Among them one that is too small to be compressed, and one for which bf16 saves nothing."""

FREE = Speed(0.0, (0.0, 0.0), (0.0, 0.0))
CODEC = Speed(1e-9, (0.5e-9, 0.2e-9), (0.8e-9, 0.2e-9))
MB = 2**20
MODEL = cost.layout(20_000_000, 25 * MB)
SPECS = ("bf16", "int8", "int4", "sign", "topk(0.01)|int4")

bandwidths = st.floats(1e5, 1e12)
worlds = st.sampled_from((2, 3, 8, 64))


def exchanged() -> list[list[dict[str, Any]]]:
    """One step with every pair: the report's rows."""
    reports = []
    for spec, exchange in PAIRS:
        session = replicas_session(spec, dist.group.WORLD, torch.device("cpu"), exchange=exchange)
        for index, (n, dtype) in enumerate(BUCKETS):
            session.step_buffer.submit(
                torch.ones(n, dtype=dtype), (Segment(f"p{index}", n),), index, index == len(BUCKETS) - 1
            ).wait()
        memory = sum(
            m[k].nbytes
            for m in session.state_dict()["memories"][0]
            for k in ("residual", "owner_residual")
            if m[k] is not None
        )
        reports.append([*session.report().to_dict()["rows"], {"memory": memory}])
    return reports


@pytest.mark.parametrize("world_size", [slow(2), 3, slow(4)])
def test_bytes_and_memory_are_those_of_a_real_run(world_size: int) -> None:
    for rank, reports in enumerate(run(world_size, exchanged)):
        for (spec, exchange), rows in zip(PAIRS, reports, strict=True):
            plan = Plan.of(spec, exchange)
            for (n, dtype), row in zip(BUCKETS, rows, strict=False):
                choice = plan.choose(n, dtype.itemsize, world_size)
                sent = cost.transfers(choice, n, dtype.itemsize, world_size, rank)
                totals = sum(m.sent for m in sent), sum(m.received for m in sent)
                assert totals == (row["sent_bytes"], row["received_bytes"]), (
                    f"{spec}, {exchange}, {n} of {dtype}, rank {rank}"
                )
                assert cost.sent_bytes(plan, [n], world_size, rank, dtype.itemsize) == row["sent_bytes"]
            kept = sum(cost.feedback_bytes(plan, [n], world_size, dtype.itemsize) for n, dtype in BUCKETS)
            # chunks of two_shot are whole blocks: some rank keeps up to one block a bucket more or less
            assert kept == pytest.approx(rows[-1]["memory"], abs=4 * 1024 * len(BUCKETS))


def test_one_rank_sends_nothing_and_waits_for_nothing() -> None:
    for spec in SPECS:
        plan = Plan.of(spec)
        assert cost.transfers(plan.choose(5000, 4, 1), 5000, 4, 1) == ()
        assert cost.step(plan, MODEL, CODEC, Cluster(1, 1e6), 0.5) == cost.Step(0.5, 0.0, 0)


def test_layout_is_full_buckets_and_a_rest() -> None:
    assert cost.layout(10, 16) == [4, 4, 2]
    assert cost.layout(8, 16) == [4, 4]
    assert cost.layout(3, 16) == [3]
    assert cost.layout(10, 16, itemsize=2) == [8, 2]
    with pytest.raises(ValueError, match=r"0 values in buckets of 16"):
        cost.layout(0, 16)
    with pytest.raises(ValueError, match=r"10 values in buckets of 3 bytes"):
        cost.layout(10, 3)


def test_what_crosses_a_hosts_link() -> None:
    """Of 8 ranks on hosts of 4: a ring leaves the host once, pairs do from every rank to every rank elsewhere."""
    n = 100_000
    (ring,) = cost.transfers(Plan.of("none").choose(n, 4, 8), n, 4, 8, 0, 4)
    assert ring.crossing == ring.sent == 2 * 7 * 4 * n // 8
    (gather,) = cost.transfers(Plan.of("topk(0.01)").choose(n, 4, 8), n, 4, 8, 0, 4)
    assert gather.crossing == pytest.approx(gather.sent / 7 * 4 * 4)
    for spec in ("none", "topk(0.01)", "int4"):
        inside = cost.transfers(Plan.of(spec).choose(n, 4, 8), n, 4, 8, 0, 8)
        assert [m.crossing for m in inside] == [0] * len(inside)


def test_communication_alone_is_bytes_over_bandwidth_and_rounds_times_latency() -> None:
    n, bandwidth, latency = 1_000_000, 1e7, 0.02
    for spec, exchange, W, rounds in (("none", None, 4, 6), ("int4", "one_shot", 4, 1), ("int4", "two_shot", 4, 2)):
        plan = Plan.of(spec, exchange)
        got = cost.step(plan, [n], FREE, Cluster(W, bandwidth, latency))
        crossing = sum(m.crossing for m in cost.transfers(plan.choose(n, 4, W), n, 4, W))
        assert got.seconds == pytest.approx(crossing * cost.FRAME / bandwidth + rounds * latency)
        assert got.exposed == got.seconds
        assert got.sent_bytes == cost.sent_bytes(plan, [n], W)


def test_two_buckets_by_hand() -> None:
    """Backward takes 2 s a bucket, encoding 1 s, the link 3 s, decoding 0.5 s. A bucket is on its way when it is encoded and
    the link is free:

    backward 0-2 2-4   encode 2-3 4-5   link 3-6 6-9   decode 6-6.5 9-9.5
    """
    n, plan = 1_000_000, Plan.of("int8", "one_shot")
    speed = Speed(1e-6, (0.3e-6, 0.2e-6), (0.0, 0.0))
    there = Cluster(2, plan.codec.nbytes(n) * cost.FRAME / 3)
    got = cost.step(plan, [n, n], speed, there, compute=6.0)
    assert (got.seconds, got.exposed) == (pytest.approx(2 + 9.5), pytest.approx(5.5))
    # on one stream nothing of the second bucket starts before the first is done: encoded from 6.5 on
    serial = cost.step(plan, [n, n], speed, replace(there, lines=False), compute=6.0)
    assert serial.seconds == pytest.approx(2 + 11)
    # on one core the first encoding takes turns with backward: it is done at 4, backward at 5, the second encoding at 6
    shared = cost.step(plan, [n, n], speed, replace(there, cores=1), compute=6.0)
    assert (shared.seconds, shared.exposed) == (pytest.approx(2 + 10.5), pytest.approx(5.5))


def test_buckets_whose_time_is_known_by_hand() -> None:
    """As above, but the second bucket is ready 3 s after the first one. When backward began does not matter:

    backward 0-3   encode 0-1 3-4   link 1-4 4-7   decode 4-4.5 7-7.5
    """
    n, plan = 1_000_000, Plan.of("int8", "one_shot")
    speed = Speed(1e-6, (0.3e-6, 0.2e-6), (0.0, 0.0))
    there = Cluster(2, plan.codec.nbytes(n) * cost.FRAME / 3)
    for began in (0.0, 2.0):
        got = cost.step(plan, [n, n], speed, there, 6.0, ready=[began, began + 3])
        assert (got.seconds, got.exposed) == (pytest.approx(6 - 3 + 7.5), pytest.approx(4.5))
    by_shares = cost.step(plan, [n, n], speed, there, 6.0)
    assert cost.step(plan, [n, n], speed, there, 6.0, ready=[2.0, 4.0]) == by_shares


def test_very_many_buckets_are_simulated_as_a_few_that_are_ready_with_their_last() -> None:
    n, there = 2 * cost.MOST_BUCKETS, Cluster(2, 1e9, latency=1e-3)
    values, cluster, ready = cost.joined([5] * n, there, [0.1 * i for i in range(n)])
    assert (len(values), sum(values), cluster.latency) == (cost.MOST_BUCKETS, 5 * n, 2e-3)
    assert ready == pytest.approx([0.1 * i for i in range(1, n, 2)])
    assert cost.joined([5, 5], there) == ([5, 5], there, [])


def test_cores_are_shared_so_that_no_work_is_lost() -> None:
    """On one core a step cannot be shorter than all of its work, and with cores to spare nothing is taken from backward."""
    plan, total = Plan.of("int4"), sum(MODEL)
    one, many = (cost.step(plan, MODEL, CODEC, Cluster(2, 1e15, cores=c), 0.3) for c in (1, math.inf))
    work = total * (CODEC.encode + sum(CODEC.mean))
    assert one.seconds == pytest.approx(0.3 + work)
    assert 0.3 < many.seconds < one.seconds


def test_sockets_limit_a_fast_link() -> None:
    got = cost.step(Plan.of("none"), MODEL, FREE, Cluster(2, math.inf, stack=1e-9))
    assert got.seconds == pytest.approx(2 * got.sent_bytes * 1e-9)


@settings(deadline=None)
@given(
    bandwidths,
    st.floats(1.01, 100),
    worlds,
    st.sampled_from(SPECS),
    st.sampled_from((1.0, 4.0, math.inf)),
    st.booleans(),
)
def test_a_faster_link_is_never_slower(
    bandwidth: float, factor: float, W: int, spec: str, cores: float, lines: bool
) -> None:
    slow = Cluster(W, bandwidth, 1e-4, cores=cores, lines=lines)
    fast = replace(slow, bandwidth=bandwidth * factor)
    first, second = (cost.step(Plan.of(spec), MODEL, CODEC, c, 0.3) for c in (slow, fast))
    # processes that share cores may meet in another order: a few thousandths
    assert second.seconds <= first.seconds * 1.005
    assert first.seconds >= 0.3
    assert second.sent_bytes == first.sent_bytes


@settings(deadline=None)
@given(worlds, st.sampled_from(SPECS), st.floats(0.01, 3))
def test_break_even_is_where_both_take_as_long(W: int, spec: str, compute: float) -> None:
    plan, slow = Plan.of(spec), CODEC.scaled(20)
    found = cost.break_even(plan, MODEL, slow, FREE, Cluster(W, 1.0), compute)
    if found is None:
        assert cost.sent_bytes(plan, MODEL, W) >= cost.sent_bytes(cost.DENSE, MODEL, W)
        return
    assert found < math.inf  # a codec that takes time loses to a dense exchange that takes none
    there, below, above = (Cluster(W, found * f) for f in (1.0, 0.5, 2.0))
    gains = [
        cost.step(cost.DENSE, MODEL, FREE, c, compute).seconds - cost.step(plan, MODEL, slow, c, compute).seconds
        for c in (there, below, above)
    ]
    dense = cost.step(cost.DENSE, MODEL, FREE, there, compute).seconds
    assert abs(gains[0]) <= 0.02 * dense
    assert gains[1] > 0 >= gains[2]


def test_break_even_without_end() -> None:
    """A codec for which time does not count pays on any link; one that sends more pays on none."""
    assert cost.break_even(Plan.of("int4"), MODEL, FREE, FREE, Cluster(8, 1.0)) == math.inf
    assert cost.break_even(Plan.of("int8", "one_shot"), MODEL, CODEC, FREE, Cluster(64, 1.0)) is None


def test_break_even_of_very_many_buckets_is_that_of_a_few() -> None:
    many, few = (cost.layout(2_000_000_000, size) for size in (5 * MB, 80 * MB))
    slow = CODEC.scaled(20)
    one, other = (cost.break_even(Plan.of("int4"), b, slow, FREE, Cluster(8, 1.0)) for b in (many, few))
    assert one == pytest.approx(other, rel=0.05)


def test_the_slowest_of_several() -> None:
    quartile = NormalDist(10, 1).inv_cdf(0.75)
    assert cost.slowest(10, quartile, 1) == pytest.approx(10)
    assert cost.slowest(10, quartile, 2) == pytest.approx(NormalDist(10, 1).inv_cdf(0.5**0.5))
    assert cost.slowest(10, 9, 2) == 10  # quartiles of few steps may lie anywhere
