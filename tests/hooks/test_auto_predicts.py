"""What `auto` predicts from, on real ranks: the bytes that plain steps send, and when."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from clocked import by_clock
from ranks import run
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, network, train

import commpress
from commpress.comm import auto, cost
from commpress.comm.auto import Auto
from commpress.comm.choice import IN_PIECES
from commpress.comm.links import Links
from commpress.comm.search import FIRST_TURN, WARM_UP

PLAIN_STEPS = WARM_UP + FIRST_TURN
CLOCK = {"none": 1.0, "bf16": 0.9, "int8": 0.6, "int4": 0.5}
"""Seconds of a step, as far as the ranks of a test say."""
RULES = {"0.*": "int8", "*": "auto"}


def auto_of(session: commpress.Session) -> Auto:
    assert session.step_buffer is not None
    assert session.step_buffer.auto is not None
    return session.step_buffer.auto


def searched(spec: Any, masked: bool, steps: int) -> dict[str, Any]:
    """What a search on two hosts predicts from, in which int4 is the fastest, as far as the ranks say."""
    told: list[Sequence[Mapping[str, Any]]] = []
    predicted = Auto._predicted

    def noting(self: Auto, everyone: Sequence[Mapping[str, Any]], plain: float) -> Mapping[str, float]:
        told.append(everyone)
        return predicted(self, everyone, plain)

    with (
        mock.patch.dict(os.environ, {"COMMPRESS_HOST": f"host {dist.get_rank()}"}),
        mock.patch.object(Auto, "_predicted", noting),
        by_clock(CLOCK.__getitem__),
    ):
        model = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
        session = commpress.attach(model, spec)
        auto_of(session)._links = Links()  # no latency: a transfer takes its bytes' time
        sent = {name: p.numel() for name, p in model.module.named_parameters()}
        if masked:
            masks = {name: p > 0 for name, p in model.module.named_parameters() if p.dim() > 1}
            session.set_masks(masks)
            sent |= {name: int(mask.sum()) for name, mask in masks.items()}
        train(model, range(PLAIN_STEPS))
        report = session.report()
        train(model, range(PLAIN_STEPS, steps))
    found = auto_of(session)._model
    assert found is not None
    busy = sum(said["busy"] for said in told[0]) / 2
    return {
        "bandwidth": found.cluster.bandwidth,
        "measured": report.sent_bytes / report.steps * cost.FRAME / busy,
        "values": sum(found.buckets),
        "sent": sum(n for name, n in sent.items() if spec is None or not name.startswith("0.")),
        "receipt": session.receipt(),
    }


@pytest.mark.parametrize(("spec", "masked"), [(RULES, False), (None, True), (RULES, True)])
def test_the_bandwidth_is_that_of_the_bytes_that_are_sent(spec: Any, masked: bool) -> None:
    first, second = run(2, searched, spec, masked, PLAIN_STEPS + 2)
    assert first["bandwidth"] == pytest.approx(first["measured"], rel=0.03)  # the chunks of two ranks differ a little
    assert first["values"] == first["sent"]
    assert (first["bandwidth"], first["values"]) == (second["bandwidth"], second["values"])


def test_a_break_even_is_only_told_where_auto_decides_for_all() -> None:
    whole, by_rules = (run(2, searched, spec, False, 40)[0]["receipt"] for spec in (None, RULES))
    assert (whole.spec, by_rules.spec) == ("int4", "0.*: int8, *: auto (int4)")
    assert whole.break_even is not None
    assert by_rules.break_even is None


def in_pieces() -> tuple[tuple[str, float] | None, Any]:
    with mock.patch.object(auto, "PIECE", 4000):
        model = DistributedDataParallel(network())  # one bucket
        session = commpress.attach(model)
        train(model, range(PLAIN_STEPS + 2))
        searching = auto_of(session)
        found = searching._model
        assert found is not None
        # a link between hosts, and a codec that takes time: on the fastest link dense is faster
        there = replace(found.cluster, ranks_per_host=1, latency=0.0, stack=0.0, bandwidth=1e3)
        free, slow = (cost.Speed(of, (of, of), (of, of)) for of in (0.0, 1e-7))
        searching._model = found = replace(found, cluster=there, speeds={"none": free, "int4": slow})
        searching.search.choices = [auto.Choice("int4" + IN_PIECES, 9, [])]
        return searching.break_even(), found


def test_pieces_break_even_with_dense_buckets_that_are_whole() -> None:
    found, model = run(2, in_pieces)[0]
    assert found is not None
    name, even = found
    assert name == "int4" + IN_PIECES
    assert even < float("inf")
    assert len(model.exchanges("int4" + IN_PIECES)[0]) > len(model.buckets)
    there = replace(model.cluster, bandwidth=even)
    seconds = []
    for spec, name in (("none", "none"), ("int4", "int4" + IN_PIECES)):
        values, ready = model.exchanges(name)
        of = cost.step(auto.Plan.of(spec), values, model.speeds[spec], there, model.compute, ready=ready)
        seconds.append(of.seconds)
    assert seconds[1] == pytest.approx(seconds[0], rel=0.05)


PAUSE = 0.05
"""Seconds that the backward of one layer waits on one rank."""


def held_up() -> tuple[list[float], str]:
    """When buckets are ready, and what is told of it, if rank 1 is slow before the last bucket, which holds the first layer."""
    model = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    session = commpress.attach(model)
    if dist.get_rank() == 1:
        pauses = iter([PAUSE] * PLAIN_STEPS)
        # before the first layer's
        model.module[1].register_full_backward_hook(lambda module, into, out: time.sleep(next(pauses, 0.0)))
    for step in range(80):
        train(model, [step])
        if auto_of(session).search.choices:
            break
    found = auto_of(session)._model
    assert found is not None
    return found.ready, session.explain()


def test_a_bucket_is_ready_when_the_slowest_rank_has_it() -> None:
    (ready, told), other = run(2, held_up)
    assert other[0] == ready  # the same on all ranks
    first, *between, last = ready
    assert first == 0
    assert between == sorted(between)
    assert last > between[-1] + 0.8 * PAUSE
    times = ", ".join(f"{at * 1e3:.3g}" for at in ready)
    assert f"buckets: {len(ready)}, ready {times} ms after the first one in the plain steps" in told
