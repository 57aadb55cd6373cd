"""The timeline: what a step's spans must look like, and that torch's profiler shows the same phases."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm.timeline import Span, Timeline


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 64))


def steps(spec: str, exchange: str | None, recorded: int) -> tuple[list[Span], dict[str, float]]:
    ddp = DistributedDataParallel(model(), bucket_cap_mb=0.2)
    session = commpress.attach(ddp, spec, exchange=exchange)

    def step() -> None:
        ddp(torch.ones(4, 64)).square().sum().backward()
        ddp.zero_grad()

    for _ in range(3):
        step()
    before = session.report().seconds
    with session.timeline() as timeline:
        for _ in range(recorded):
            step()
    after = session.report().seconds
    step()  # not in it any more
    return timeline.spans, {phase: after[phase] - before[phase] for phase in after}


@pytest.mark.parametrize(("world_size", "spec", "exchange"), [(2, "int8", None), (3, "int4", "two_shot")])
def test_a_step_has_its_phases_in_order(world_size: int, spec: str, exchange: str | None) -> None:
    for spans, seconds in run(world_size, steps, spec, exchange, 2):
        assert sorted({span.step for span in spans}) == [3, 4]
        buckets = {span.bucket for span in spans} - {None}
        assert len(buckets) > 1
        for step in (3, 4):
            mine = [span for span in spans if span.step == step]
            forward, backward, exposed = (
                next(s for s in mine if s.phase == p) for p in ("forward", "backward", "exposed")
            )
            assert forward.end <= backward.start < backward.end <= exposed.end
            for bucket in buckets:
                first, *_, last = sorted((s for s in mine if s.bucket == bucket), key=lambda s: s.start)
                assert (first.phase, last.phase) == ("encode", "decode")
                assert backward.start < first.start
                assert last.end <= exposed.end
        # the same seconds as in the report
        for phase in ("encode", "wire", "decode"):
            total = sum(span.end - span.start for span in spans if span.phase == phase)
            assert total == pytest.approx(seconds[phase])


def profiled() -> set[str]:
    ddp = DistributedDataParallel(model())
    session = commpress.attach(ddp, "int4")
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=everywhere) as p:
        ddp(torch.ones(4, 64)).sum().backward()
    assert session.report().steps == 1
    return {event.name for event in p.events()}


def test_torch_profiler_shows_the_phases() -> None:
    for names in run(2, profiled):
        assert {"commpress::encode", "commpress::wire", "commpress::decode"} <= names


def test_a_trace_is_one_that_perfetto_opens(tmp_path: Path) -> None:
    spans = [
        Span("forward", 7, None, 10.0, 10.5),
        Span("wire", 7, 0, 10.6, 10.8),
        Span("wire", 7, 1, 10.7, 10.9),  # overlaps the one before: a line of its own
        Span("wire", 7, 2, 10.85, 11.0),
    ]
    Timeline(rank=3, spans=spans).write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lines = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    drawn = [e for e in events if e["ph"] == "X"]
    assert [(lines[e["tid"]], e["args"].get("bucket")) for e in drawn] == [
        ("training", None),
        ("wire", 0),
        ("wire", 1),
        ("wire", 2),
    ]
    assert drawn[0]["ts"] == 0.0
    assert drawn[0]["dur"] == pytest.approx(5e5)
    for tid in lines:
        on_line = [e for e in drawn if e["tid"] == tid]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(on_line))
    assert len(lines) == 3
    assert {e["pid"] for e in events} == {3}


def test_an_empty_timeline_is_an_empty_trace() -> None:
    assert [e["ph"] for e in Timeline(0).to_dict()["traceEvents"]] == ["M"]
