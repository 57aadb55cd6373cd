"""One HTML file from any number of JSON files: runs of the training program, reports of sessions, benchmarks of step time and
loss, predictions, timelines.

A file is recognised by what is in it. The page needs nothing from the network: plotly's script is in it, once.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

from commpress import extras
from commpress.launch import figures, records, units
from commpress.launch.records import (
    CHECKED,
    EXPLAINED,
    LOSSES,
    RUN,
    SESSION,
    STEP_TIMES,
    TIMELINE,
    Record,
    conditions,
    link_name,
    model_name,
    ran,
    read,
)

try:
    import plotly.offline
    import typer
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.report", error, "launch") from None

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>commpress report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1e293b; margin: 0 auto; padding: 1rem; max-width: 62rem; }}
h2 {{ margin: 2.5rem 0 .5rem; border-top: 1px solid #cbd5e1; padding-top: 1rem; }}
h3 {{ margin: 1.5rem 0 0; }}
p {{ margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: .5rem 0; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #cbd5e1; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.text th, .text td {{ text-align: left; }}
.text td {{ white-space: normal; min-width: 4rem; vertical-align: top; overflow-wrap: anywhere; }}
.text td:first-child {{ overflow-wrap: normal; }}
.text td:nth-child(2) {{ min-width: 8rem; }}
.text td:last-child {{ min-width: 12rem; }}
summary {{ cursor: pointer; padding: .3rem 0; }}
.figure {{ margin: .5rem 0 1rem; }}
</style>
<script>{script}</script>
</head>
<body>
<h1>commpress report</h1>
{body}
</body>
</html>
"""


def page(files: Sequence[Record]) -> str:
    """The report as HTML, with the sections for which there is something. Raises ValueError without records."""
    if not files:
        raise ValueError("a report needs at least one record.json, got none")
    of: dict[str, list[Record]] = {kind: [] for kind in records.NEEDED}
    for record in files:
        of[records.kind(record)].append(record)
    runs = list(zip(titles(of[RUN]), of[RUN], strict=True))
    named = [(name, "torch" if r["settings"]["compress"] == "none" else "commpress") for name, r in runs]
    named += [(row["name"], row["kind"]) for r in (*of[STEP_TIMES], *of[LOSSES]) for row in r["rows"] if ran(row)]
    sessions = [(name, as_run(r)) for name, r in zip(session_names(of[SESSION]), of[SESSION], strict=True)]
    named += [(name, "torch" if r["report"]["spec"] == "none" else "commpress") for name, r in sessions]
    look = figures.looks(named)
    parts = [
        *what_was_run(runs, of[STEP_TIMES] + of[LOSSES]),
        *what_was_sent(sessions),
        *step_time(of[STEP_TIMES], look),
        *loss_against_bytes(runs, of[LOSSES], look),
        *loss_against_time(runs, of[LOSSES], of[STEP_TIMES], look),
        *recipes(runs),
        *traffic([*runs, *sessions], look),
        *predictions(of[EXPLAINED], of[CHECKED]),
        *timelines(of[TIMELINE]),
    ]
    if runs:
        parts += ["<h2>Settings and machine</h2>", table(settings(runs), text=True)]
    return PAGE.format(body="\n".join(parts), script=plotly.offline.get_plotlyjs())


def what_was_run(runs: Sequence[tuple[str, Record]], measured: Sequence[Record]) -> list[str]:
    """The tables of runs and of benchmarks."""
    parts = []
    if runs:
        parts += [table(summary(runs)), "<p>Loss is in nats a byte; MB and seconds are those of one rank.</p>"]
    if measured:
        links: dict[tuple[str, ...], list[str]] = {}
        for r in measured:
            model = f"{r['model']}, {r['parameters'] / 1e6:.1f} M parameters"
            where = (str(r.get(key, "")) for key in ("world_size", "tokens_per_step", "machine", "torch"))
            link = link_name(r["link"], hosts=True) if r["what"] == STEP_TIMES else "any"
            links.setdefault((r["what"], model, *where), []).append(link)
        rows = [["benchmark", "model", "ranks", "tokens a step", "machine", "torch", "links"]]
        rows += [[*key, "; ".join(dict.fromkeys(names))] for key, names in links.items()]
        parts.append(table(rows, text=True))
    return parts


def session_names(reports: Sequence[Record]) -> list[str]:
    """A name for each session's report: its spec and rank; where two share one, their files, too."""
    names = [f"{r['spec']}, rank {r['rank']} of {r['world_size']}" for r in reports]
    counts = Counter(names)
    files = (r.get("file") or f"report {i + 1}" for i, r in enumerate(reports))
    return [f"{name} ({file})" if counts[name] > 1 else name for name, file in zip(names, files, strict=True)]


def as_run(report: Record) -> Record:
    """A session's report as what of a run is about traffic."""
    sums = {key: report[key] for key in ("dense_bytes", "sent_bytes", "received_bytes")}
    return {"traffic": {**sums, **report["seconds"]}, "steps_done": report["steps"], "report": report}


def what_was_sent(sessions: Sequence[tuple[str, Record]]) -> list[str]:
    """The table of sessions' reports."""
    if not sessions:
        return []
    rows = [["session", "ranks", "steps", "dense MB/step", "sent MB/step", "ratio", "backend MB/step"]]
    for name, r in sessions:
        report, each = r["report"], max(r["steps_done"], 1)
        dense, sent = report["dense_bytes"], report["sent_bytes"]
        mb = [f"{count / 1e6 / each:.3f}" for count in (dense, sent)]
        beside = report.get("backend_bytes")
        beside = "" if beside is None else f"{beside / 1e6 / each:.3f}"
        rows.append(
            [name, str(report["world_size"]), str(report["steps"]), *mb, f"{dense / sent:.1f}" if sent else "", beside]
        )
    said = (
        "<p>MB are those of one rank. <em>Dense</em> is what must be sent without compression, <em>backend</em> what the "
        "backend or framework itself would have sent: more, where it all-reduces instead of a reduce-scatter.</p>"
    )
    return [table(rows), said]


def predictions(explained: Sequence[Record], checked: Sequence[Record]) -> list[str]:
    """The tables of `commpress explain --json`."""
    parts = ["<h2>Predictions</h2>"] if explained or checked else []
    for r in explained:
        rows = [["spec", "exchange", "sent MB a step", "ratio", "communication s", "a step s", "pays below"]]
        for row in r["rows"]:
            figures_of = (megabytes(row["sent_bytes"]), f"{row['ratio']:.1f}", f"{row['communication_seconds']:.3g}")
            step = "" if row.get("step_seconds") is None else f"{row['step_seconds']:.3g}"
            rows.append([str(row["spec"]), str(row["exchange"]), *figures_of, step, str(row.get("break_even", ""))])
        link = units.bandwidth(r["bandwidth"] * 8)
        parts += [f"<p>{r['params']:,} parameters, {r['world']} ranks, {escape(link)} links.</p>", table(rows)]
    for r in checked:
        rows = [["link", "row", "predicted s", "measured s", "error"]]
        for row in r["rows"]:
            seconds = (f"{row[key]:.3f}" for key in ("predicted", "measured"))
            rows.append([str(row["link"]), str(row["name"]), *seconds, f"{row['error']:+.0%}"])
        parts += [f"<p>{escape(str(r['answer']))}.</p>", table(rows)]
    return parts


def step_time(measured: Sequence[Record], look: Mapping[str, figures.Look]) -> list[str]:
    """Step time against bandwidth: a figure for each model and kind of link."""
    if not measured:
        return []
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in measured:
        model = f"{r['model']}, {r['parameters'] / 1e6:.1f} M parameters, {r['tokens_per_step']} tokens a step"
        groups.setdefault((model, conditions(r)), []).append(r)
    parts = [
        "<h2>Step time against bandwidth</h2>",
        "<p>Medians of one step against those of the same steps without communication, in the same run. "
        "A flat line near 1 is the aim.</p>",
    ]
    for (model, where), group in groups.items():
        ratios, hover = ratios_by_rate(group)
        parts += [f"<h3>{escape(where)}</h3>", f"<p>{escape(model)}.</p>"]
        if group[0]["link"]["shaped"]:
            parts.append(figure(figures.step_times(ratios, hover, look)))
        elif ratios:
            bars = {name: points[0.0] for name, points in ratios.items()}
            parts.append(figure(figures.step_bars(bars, {name: texts[0] for name, texts in hover.items()}, look)))
        parts.append(numbers(table(step_time_rows(group))))
    failed: dict[tuple[str, str, str], list[str]] = {}
    for r in measured:
        for row in r["rows"]:
            if not ran(row):
                key = (row["name"], row["kind"], row["error"])
                failed.setdefault(key, []).append(link_name(r["link"], hosts=True))
    if failed:
        rows = [
            [name, kind, "all" if len(links) == len(measured) else "; ".join(dict.fromkeys(links)), error]
            for (name, kind, error), links in failed.items()
        ]
        parts += ["<h3>What did not run</h3>", table([["name", "kind", "links", "reason"], *rows], text=True)]
    return parts


def ratios_by_rate(group: Sequence[Record]) -> tuple[dict[str, dict[float, float]], dict[str, list[str]]]:
    """{name: {bits a second: ratio}}, and a text for each; rate 0 where links have none. Of repeated runs, medians."""
    found: dict[str, dict[float, list[Record]]] = {}
    for r in group:
        rate = units.rate(r["link"]["rate"]) if r["link"]["shaped"] else 0.0
        for row in filter(ran, r["rows"]):
            found.setdefault(row["name"], {}).setdefault(rate, []).append(row)
    ratios, hover = {}, {}
    for name, by_rate in found.items():
        points = sorted(by_rate.items())
        ratios[name] = {rate: statistics.median(row["ratio"] for row in rows) for rate, rows in points}
        hover[name] = [
            f"{ratios[name][rate]:.2f}x, {statistics.median(row['seconds'] for row in rows):.3g} s a step"
            + (f", {rows[0]['sent_bytes'] / 1e6:.3g} MB" if rows[0].get("sent_bytes") is not None else "")
            for rate, rows in points
        ]
    return ratios, hover


def step_time_rows(group: Sequence[Record]) -> list[list[str]]:
    """The numbers behind a figure of step times."""
    phases = ("encode", "wire", "decode", "exposed", "hidden")
    head = ["name", "link", "s a step", "middle half", "to none", "tokens/s", "MB claimed", "MB by kernel"]
    rows = [[*head, *(f"{phase} ms" for phase in phases)]]
    for r in group:
        for row in filter(ran, r["rows"]):
            low, high = row["quartiles"][0], row["quartiles"][-1]
            parts = row.get("phases") or {}
            rows.append(
                [
                    row["name"],
                    link_name(r["link"]),
                    f"{row['seconds']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{row['ratio']:.2f}x",
                    f"{row['tokens_per_second']:,.0f}",
                    *(megabytes(row.get(key)) for key in ("sent_bytes", "kernel_bytes")),
                    *(f"{parts[phase] * 1e3:.1f}" if phase in parts else "" for phase in phases),
                ]
            )
    return rows


def loss_against_bytes(
    runs: Sequence[tuple[str, Record]], measured: Sequence[Record], look: Mapping[str, figures.Look]
) -> list[str]:
    """A figure for all runs together, and one for each benchmark of losses."""
    if not runs and not measured:
        return []
    axis = "sent by one rank (MB)"
    parts = ["<h2>Loss against bytes</h2>"]
    if runs:
        parts += [
            "<p>Training loss is the thin line, held-out loss the marked one.</p>",
            figure(figures.curves(runs, axis, lambda row: row["sent_bytes"] / 1e6, True, look)),
            numbers(table(curve_rows(runs))),
        ]
    for r in measured:
        rows = [row for row in r["rows"] if ran(row)]
        lines = {row["name"]: ([sent / 1e6 for sent in row["sent_bytes"]], row["loss"]) for row in rows}
        steps = sorted({step for row in rows for step in row["steps"]})
        by_step = [dict(zip(row["steps"], row["loss"], strict=True)) for row in rows]
        parts += [
            f"<h3>{escape(model_name(r))}</h3>",
            "<p>Held-out loss, the same windows and initial weights for all.</p>",
            figure(figures.losses(lines, axis, True, look)),
            numbers(
                table(
                    [
                        ["loss at step", *(row["name"] for row in rows)],
                        *([str(s), *(f"{b[s]:.4f}" if s in b else "" for b in by_step)] for s in steps),
                        ["MB in all", *(megabytes(row["sent_bytes"][-1]) for row in rows)],
                    ]
                )
            ),
        ]
        if failed := [[row["name"], row["kind"], row["error"]] for row in r["rows"] if not ran(row)]:
            parts += ["<h3>What did not train</h3>", table([["name", "kind", "reason"], *failed], text=True)]
    return parts


def loss_against_time(
    runs: Sequence[tuple[str, Record]],
    measured: Sequence[Record],
    timed: Sequence[Record],
    look: Mapping[str, figures.Look],
) -> list[str]:
    """Runs by the seconds they took; benchmarks of losses by their steps times the median step on each link."""
    parts = []
    if runs:
        axis = "training time (s)"
        parts.append(figure(figures.curves(runs, axis, lambda row: row["seconds"], False, look)))
    for r in measured:
        same = [t for t in timed if all(t[key] == r[key] for key in ("world_size", "model", "tokens_per_step"))]
        links: dict[str, dict[str, float]] = {}
        for t in sorted(same, key=lambda t: units.rate(t["link"]["rate"]) if t["link"]["shaped"] else float("inf")):
            seconds = {row["name"]: row["seconds"] for row in t["rows"] if ran(row)}
            links.setdefault(link_name(t["link"], hosts=True), {}).update(seconds)
        rows = [row for row in r["rows"] if ran(row) and any(row["name"] in seconds for seconds in links.values())]
        if not rows:
            continue
        lines = {
            link: {
                row["name"]: ([step * seconds[row["name"]] for step in row["steps"]], row["loss"])
                for row in rows
                if row["name"] in seconds
            }
            for link, seconds in links.items()
        }
        reached = [[f"seconds to {r['target']:g}", "steps", *links]]
        for row in rows:
            steps = row["steps_to_target"]
            times = (seconds.get(row["name"]) for seconds in links.values())
            cells = ("" if s is None else "not reached" if steps is None else f"{steps * s:,.1f}" for s in times)
            reached.append([row["name"], "" if steps is None else f"{steps:.0f}", *cells])
        parts += [
            f"<h3>{escape(model_name(r))}</h3>",
            "<p>Steps times the median step on each link.</p>",
            figure(figures.losses_by_link(lines, "training time (s)", look)),
            table(reached),
        ]
    return ["<h2>Loss against time</h2>", *parts] if parts else []


def recipes(runs: Sequence[tuple[str, Record]]) -> list[str]:
    """What recipes left, and the bytes of each of their phases."""
    left = [["run", "pruned", "MB", "times smaller than float32", "held-out loss, read back"]]
    phases = [["run", "phase", "steps", "dense MB a step", "sent MB a step", "ratio"]]
    for name, r in runs:
        if small := r.get("small_model"):
            size = (megabytes(small["bytes"]), f"{small['times_smaller']:.1f}", f"{small['validation_loss']:.4f}")
            left.append([name, f"{small['sparsity']:.0%}", *size])
        for phase, of in r.get("report", {}).get("phases", {}).items():
            dense, sent = (of[key] / max(of["steps"], 1) for key in ("dense_bytes", "sent_bytes"))
            ratio = f"{dense / sent:.1f}" if sent else ""
            phases.append([name, phase, str(of["steps"]), megabytes(dense), megabytes(sent), ratio])
    parts = ["<h3>Files</h3>", table(left)] * (len(left) > 1) + ["<h3>Phases</h3>", table(phases)] * (len(phases) > 1)
    return ["<h2>By recipe</h2>", *parts] if parts else []


def traffic(runs: Sequence[tuple[str, Record]], look: Mapping[str, figures.Look]) -> list[str]:
    """Bytes and seconds a step, of runs in all and of their buckets."""
    if not runs:
        return []
    megabyte = {"dense": ("dense_bytes", 1e6), "sent": ("sent_bytes", 1e6)}
    colours = {"dense": "#94a3b8", "sent": "#1d4ed8"}
    return [
        "<h2>Bytes and seconds a step</h2>",
        "<p><em>Dense</em> is what DDP sends without compression. <em>Exposed</em> is what training waited for after "
        "its last gradient was ready; the other phases overlap with each other and with backward.</p>",
        figure(figures.bars(runs, "MB a step and rank", megabyte, colours)),
        figure(figures.bars(runs, "ms a step", {phase: (phase, 1e-3) for phase in figures.PHASES}, figures.PHASES)),
        numbers(table(traffic_rows(runs))),
        *bytes_by_bucket(runs, look),
    ]


def traffic_rows(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """The numbers behind the bars: of one step, the mean of all."""
    rows = [["run", "dense MB", "sent MB", *(f"{phase} ms" for phase in figures.PHASES)]]
    for name, r in runs:
        each = {key: value / max(r["steps_done"], 1) for key, value in r["traffic"].items()}
        ms = (f"{each[phase] * 1e3:.2f}" for phase in figures.PHASES)
        rows.append([name, megabytes(each["dense_bytes"]), megabytes(each["sent_bytes"]), *ms])
    return rows


def bytes_by_bucket(runs: Sequence[tuple[str, Record]], look: Mapping[str, figures.Look]) -> list[str]:
    """Dense against sent bytes of each bucket, for the runs whose report has buckets that travelled."""
    rows = [(name, row) for name, r in runs for row in all_phases(r.get("report", {}).get("rows", ()))]
    if not rows:
        return []
    # of two layouts, the one that DDP had for its first step only is left to the table
    longest = {name: max(row["steps"] for other, row in rows if other == name) for name, _ in rows}
    shown = [(name, row) for name, row in rows if row["steps"] * 2 > longest[name]]
    keys = sorted({(row["bucket"], row["values"]) for _, row in shown})
    shared = Counter(bucket for bucket, _ in keys)
    label = {(b, n): str(b) if shared[b] == 1 else f"{b}: {n:,}" for b, n in keys}
    dense: dict[str, float] = dict.fromkeys(label.values(), 0.0)
    sent: dict[str, list[figures.Bar]] = {name: [] for name, _ in shown}
    for name, row in shown:
        bucket = label[row["bucket"], row["values"]]
        dense[bucket] = row["dense_bytes"] / row["steps"]
        sent[name].append(figures.Bar(bucket, row["sent_bytes"] / row["steps"], how(row)))
    head = ["bucket", "run", "values", "steps", "dense B a step", "sent B a step", "ratio", "how"]
    body = [
        [
            *(str(row["bucket"]), name, f"{row['values']:,}", str(row["steps"])),
            *(f"{row[key] / row['steps']:,.0f}" for key in ("dense_bytes", "sent_bytes")),
            f"{row['dense_bytes'] / row['sent_bytes']:.1f}" if row["sent_bytes"] else "",
            how(row),
        ]
        for name, row in rows
    ]
    return ["<h3>By bucket</h3>", figure(figures.buckets(dense, sent, look)), numbers(table([head, *body]))]


def all_phases(rows: Sequence[Record]) -> list[Record]:
    """The rows that stand for bytes, those of a bucket that was treated alike in several phases added up."""
    found: dict[tuple[object, ...], Record] = {}
    for row in rows:
        key = (row.get("role"), row["bucket"], row["values"], how(row))
        before = found.get(key)
        sums = ("steps", "dense_bytes", "sent_bytes")
        found[key] = row if before is None else {**row, **{name: before[name] + row[name] for name in sums}}
    return [row for row in found.values() if row["dense_bytes"]]


def how(row: Record) -> str:
    """How a bucket travelled."""
    if row["exchange"] == "none":
        return f"not sent: {row['reason']}"
    return f"not compressed: {row['reason']}" if row["reason"] else f"{row['spec']} by {row['exchange']}"


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
    """What the lines of a rank are called."""
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


def titles(records: Sequence[Record]) -> list[str]:
    """A name for each run: its spec, after its optimizer unless that is AdamW; where two share one, their folder too."""
    optimizers = [r["settings"].get("optimizer", "AdamW") for r in records]
    specs = [
        str(r["settings"]["compress"]) if optimizer == "AdamW" else f"{optimizer} {r['settings']['compress']}"
        for r, optimizer in zip(records, optimizers, strict=True)
    ]
    counts = Counter(specs)
    seen: Counter[str] = Counter()
    names = []
    for spec, record in zip(specs, records, strict=True):
        if counts[spec] > 1:
            seen[spec] += 1
            spec = f"{spec} ({record['settings'].get('out') or f'run {seen[spec]}'})"
        names.append(spec)
    return names


def summary(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """The table of results, its head first. "to none" is the loss less that of the first run whose spec is none."""
    head = ["spec", "steps", "dense MB/step", "sent MB/step", "ratio", "median ms/step", "val. loss", "to none"]
    base = next((r["final_validation_loss"] for _, r in runs if r["settings"]["compress"] == "none"), None)
    rows = []
    for name, r in runs:
        steps, traffic, final = max(r["steps_done"], 1), r["traffic"], r["final_validation_loss"]
        rows.append(
            [
                name,
                str(r["steps_done"]),
                *(f"{traffic[key] / 1e6 / steps:.3f}" for key in ("dense_bytes", "sent_bytes")),
                f"{traffic['ratio']:.1f}",
                f"{r['median_step_seconds'] * 1e3:.0f}",
                "not finished" if final is None else f"{final:.4f}",
                "" if final is None or base is None else f"{final - base:+.4f}",
            ]
        )
    return [head, *rows]


def settings(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """Settings, ranks and machine of each run, a column a run."""
    columns = [
        {
            **r["settings"],
            "parameters": r.get("parameters"),
            "text": (r.get("text") or {}).get("source"),
            "ranks": r["world_size"],
            "backend": r["backend"],
            "torch": r.get("torch"),
            **r["machine"],
        }
        for _, r in runs
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [["", *(name for name, _ in runs)], *([k, *(str(c.get(k, "")) for c in columns)] for k in keys)]


def curve_rows(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """The numbers behind the curves of runs, where the held-out loss was measured."""
    rows = [["run", "step", "MB sent", "seconds", "training loss", "held-out loss"]]
    for name, record in runs:
        for row in record["curve"]:
            if row["validation_loss"] is not None:
                train = "" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
                where = (str(row["step"]), megabytes(row["sent_bytes"]), f"{row['seconds']:.1f}")
                rows.append([name, *where, train, f"{row['validation_loss']:.4f}"])
    return rows


def megabytes(count: float | None) -> str:
    """Bytes as MB; nothing for what was not measured."""
    return "" if count is None else f"{count / 1e6:,.3f}"


def figure(drawn: Any) -> str:
    """A figure in the page."""
    return f'<div class="figure">{figures.as_html(drawn)}</div>'


def numbers(table: str) -> str:
    """The table behind a figure, folded away."""
    return f"<details><summary>Numbers</summary>{table}</details>"


def table(rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """An HTML table, its first row the head, which scrolls by itself; `text` for words. Cells are escaped."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide{" text" if text else ""}"><table>\n' + "\n".join(lines) + "\n</table></div>"


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The report to write.")],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Runs' record.json, sessions' reports, benchmarks' records, timelines."),
    ],
) -> None:
    """Write one HTML report from any mix of runs' record.json, sessions' reports, benchmarks' records and timelines."""
    try:
        if out.suffix == ".json":
            raise ValueError(
                f"{out}: expected the page to write first, such as report.html, got the name of a JSON file"
            )
        html = page_of([read(path) for path in files])
        write(out, html)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"report in {out}")


def page_of(files: Sequence[Record]) -> str:
    """As `page`. Raises ValueError that names the file, if a value in one of them is not what it should be."""
    try:
        return page(files)
    except NOT_AS_EXPECTED as error:
        for record in files:
            try:
                page([record])
            except NOT_AS_EXPECTED as own:
                raise ValueError(f"{record['file']}: {records.not_one(records.kind(record), own)}") from None
        raise ValueError(f"these files do not go together: {type(error).__name__}: {error}") from None


NOT_AS_EXPECTED = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)


def write(out: Path, html: str) -> None:
    """Write the page, and its folder if there is none. Raises ValueError that says why it cannot be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{out}: cannot be written: {error.strerror or error}") from None


def main() -> None:
    """`python -m commpress.launch.report`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


if __name__ == "__main__":
    main()
