"""The section about timelines: a figure for each rank, of its median, fastest and slowest step."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from commpress.launch import figures, records
from commpress.launch.records import Record
from commpress.launch.sections.html import figure, numbers, table


def timelines(measured: Sequence[Record]) -> list[str]:
    """A figure for each rank of each trace: its median step, and the fastest and the slowest to choose."""
    if not measured:
        return []
    parts = [
        "<h2>Timeline of a step</h2>",
        "<p>What each line was busy with. Encode, wire and decode go on while backward runs; <em>exposed</em> is what "
        "training waited for. Transfers that overlap lie beside each other.</p>",
    ]
    for record in measured:
        for rank in sorted({event["pid"] for event in records.spans(record)}):
            mine = [event for event in records.spans(record) if event["pid"] == rank]
            names = thread_names(record, rank)
            rows = {event["tid"]: names.get(event["tid"], f"thread {event['tid']}") for event in mine}
            by_step: dict[int, list[Record]] = {}
            for event in mine:
                by_step.setdefault(event["args"]["step"], []).append(event)
            steps = {}
            for label, step in three_steps({step: lasted(events) for step, events in by_step.items()}).items():
                start = min(event["ts"] for event in by_step[step])
                steps[label] = [block(event, start) for event in by_step[step]]
            parts += [
                f"<h3>{escape(record.get('file', 'trace'))}, rank {rank}</h3>",
                figure(figures.timeline(steps, rows)),
                numbers(table(phase_rows(by_step))),
            ]
    return parts


def thread_names(record: Record, rank: int) -> dict[int, str]:
    """Return the names of a rank's lines."""
    return {
        event["tid"]: str(event["args"]["name"])
        for event in record["traceEvents"]
        if event.get("ph") == "M" and event.get("name") == "thread_name" and event["pid"] == rank
    }


def block(event: Record, start: float) -> figures.Block:
    """A span in ms after `start`, which is in microseconds as all in a trace."""
    bucket, length = event["args"].get("bucket"), event["dur"] / 1e3
    hover = f"{'' if bucket is None else f'bucket {bucket}, '}step {event['args']['step']}, {length:.2f} ms"
    return figures.Block(event["name"], event["tid"], (event["ts"] - start) / 1e3, length, hover)


def lasted(events: Sequence[Record]) -> float:
    """Milliseconds from the first start of spans to their last end."""
    first: float = min(e["ts"] for e in events)
    last: float = max(e["ts"] + e["dur"] for e in events)
    return (last - first) / 1e3


def three_steps(lengths: Mapping[int, float]) -> dict[str, int]:
    """The median, fastest and slowest of steps of so many ms, by what a menu says of them."""
    order = sorted(lengths, key=lambda step: lengths[step])
    chosen = {"median": order[(len(order) - 1) // 2], "fastest": order[0], "slowest": order[-1]}
    once = {step: word for word, step in reversed(chosen.items())}
    return {
        f"{once[step]}: step {step}, {lengths[step]:.0f} ms": step
        for word, step in chosen.items()
        if once[step] == word
    }


def phase_rows(by_step: Mapping[int, Sequence[Record]]) -> list[list[str]]:
    """The numbers behind a timeline: sums of a step, over all steps of it."""
    rows = [["phase", "spans", "median ms a step", "least", "most"]]
    for phase in records.SPANS:
        sums = [sum(e["dur"] for e in events if e["name"] == phase) / 1e3 for events in by_step.values()]
        count = sum(e["name"] == phase for events in by_step.values() for e in events)
        if count:
            rows.append([phase, str(count), *(f"{f(sums):.2f}" for f in (statistics.median, min, max))])
    lengths = [lasted(events) for events in by_step.values()]
    return [*rows, ["step", str(len(lengths)), *(f"{f(lengths):.2f}" for f in (statistics.median, min, max))]]
