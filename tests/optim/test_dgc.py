"""Deep Gradient Compression: torch's SGD as long as nothing is left out, the paper's formula once something is."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from references import Dgc
from tiers import slow
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, finite, network, parameters_of, same, train

import commpress
from commpress.comm.meter import Report
from commpress.optim import DGC

LR = 0.1


def attached(
    spec: str, bucket_cap_mb: float = SMALL_BUCKETS, **settings: Any
) -> tuple[DistributedDataParallel, DGC, commpress.Session]:
    """A network, its optimizer and its session."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb)
    optimizer = DGC(ddp.parameters(), **{"lr": LR, "momentum": 0.9, **settings})
    return ddp, optimizer, commpress.attach(ddp, spec, optimizer=optimizer)


def beside_sgd(settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after fifteen steps, and those of torch's SGD."""
    mine, optimizer, _ = attached("none", **settings)
    theirs = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR, **{"momentum": 0.9, **settings})
    return train(mine, range(15), optimizer=optimizer).parameters, train(theirs, range(15), optimizer=sgd).parameters


def against_reference(ratio: float, settings: dict[str, Any], masked: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters in one bucket, and those of the reference; without its masking if that is wanted."""
    ddp, optimizer, session = attached(f"topk({ratio})", bucket_cap_mb=25, **settings)
    mine = train(ddp, range(15), optimizer=optimizer).parameters
    layout = [bucket["segments"] for bucket in session.state_dict()["memories"][0]]
    assert len(layout) == 1
    model = network()
    reference = Dgc(
        model, layout, dist.get_world_size(), ratio, masked=masked, **{"lr": LR, "momentum": 0.9, **settings}
    )
    for step in range(15):
        reference.step(step)
    return mine, parameters_of(model)


def replicas(spec: str, steps: int, settings: dict[str, Any]) -> tuple[list[list[Tensor]], Report]:
    """Parameters after each step, and what was sent."""
    ddp, optimizer, session = attached(spec, **settings)
    return [train(ddp, [step], optimizer=optimizer).parameters for step in range(steps)], session.report()


def away(one: list[Tensor], other: list[Tensor], by: float) -> float:
    """The share of values that differ by more than this."""
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (one, other))
    return float(((a - b).abs() > by).double().mean())


@pytest.mark.parametrize("settings", [
    {"momentum": 0.0}, slow({}), slow({"nesterov": True}), slow({"weight_decay": 0.05}),
    {"weight_decay": 0.05, "nesterov": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_exact_it_is_sgd(settings: dict[str, Any], world_size: int) -> None:
    for mine, theirs in run(world_size, beside_sgd, settings):
        assert away(mine, theirs, 1e-5) == 0
        assert away(theirs, parameters_of(network()), 1e-3) > 0.5


@pytest.mark.parametrize("settings", [
    slow({}), {"nesterov": True}, {"weight_decay": 0.05}, {"max_norm": 0.2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_it_is_deep_gradient_compression(settings: dict[str, Any], world_size: int) -> None:
    """A few values may have been chosen the other way."""
    for mine, theirs in run(world_size, against_reference, 0.1, settings, True):
        assert away(mine, theirs, 1e-5) <= 0.005
        assert away(theirs, parameters_of(network()), 1e-3) > 0.5


def test_momenta_of_what_was_sent_start_anew() -> None:
    for mine, unmasked in run(2, against_reference, 0.1, {}, False):
        assert away(mine, unmasked, 1e-3) > 0.3


def test_the_ratio_warms_up() -> None:
    kept = {"topk(0.25)": 2, "topk(0.0625)": 2, "topk(0.015625)": 2, "topk(0.00390625)": 2, "topk(0.001)": 5}
    results = run(2, replicas, "topk(0.001)", 13, {"warmup_steps": 10, "bucket_cap_mb": 25})
    for history, report in results:
        assert {row.spec: row.steps for row in report.rows} == kept
        assert [row.sent_bytes // row.steps for row in report.rows] == sorted(
            (row.sent_bytes // row.steps for row in report.rows), reverse=True
        )
        assert all(same(one, other) for one, other in zip(history, results[0][0], strict=True))


def test_other_codecs_warm_up_exactly() -> None:
    for _, report in run(2, replicas, "int4", 6, {"warmup_steps": 4, "bucket_cap_mb": 25}):
        assert [(row.spec, row.steps, row.reason) for row in report.rows] == [
            ("none", 4, "momentum warms up"), ("int4", 2, ""),
        ]  # fmt: skip


@pytest.mark.parametrize(("spec", "world_size"), [
    slow("topk(0.05)", 2), ("topk(0.05)", 3), ("topk(0.05)|int4", 2), slow("topk(0.05)|int4", 3), ("sign", 2), slow("sign", 3),
])  # fmt: skip
def test_replicas_hold_the_same_bits(spec: str, world_size: int) -> None:
    results = run(world_size, replicas, spec, 10, {"lr": 0.02})
    for history, report in results:
        assert all(same(one, other) for one, other in zip(history, results[0][0], strict=True))
        assert all(finite(parameters) for parameters in history)
        assert not same(history[-1], history[-2])
        assert {row.spec for row in report.rows} == {spec}
