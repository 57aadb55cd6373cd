"""Sections about runs of the training program and reports of sessions: results, curves, bytes by bucket, recipes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from commpress.comm.meter import how_sent
from commpress.launch import figures, palette
from commpress.launch.records import Record, link_name
from commpress.launch.sections.html import figure, folded, megabytes, numbers, table

MOST_BUCKETS = 12
"""More would be a figure of many screens; the table has all."""


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
    """The table of results, its head first, what matters first: it is cut on the right where it does not fit.

    "against none" is the loss less that of the first run whose spec is none.
    """
    head = ["run", "fewer bytes", "ms/step", "loss", "against none", "MB/step", "steps"]
    base = next((r["final_validation_loss"] for _, r in runs if r["settings"]["compress"] == "none"), None)
    rows = []
    for name, r in runs:
        traffic, final = r["traffic"], r["final_validation_loss"]
        rows.append(
            [
                name,
                f"{traffic['ratio']:.1f}x",
                f"{r['median_step_seconds'] * 1e3:.0f}",
                "not finished" if final is None else f"{final:.4f}",
                "" if final is None or base is None else f"{final - base:+.4f}",
                megabytes(traffic["sent_bytes"] / max(r["steps_done"], 1)),
                str(r["steps_done"]),
            ]
        )
    return [head, *rows]


def settings(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """Settings, ranks and machine of each run, a column a run, its head first."""
    columns = [
        {
            **r["settings"],
            "parameters of the model": r.get("parameters"),
            "text": (r.get("text") or {}).get("source"),
            "ranks": r["world_size"],
            "link": link_name(r["link"], hosts=True) if r.get("link") else None,
            "backend": r["backend"],
            "commpress": r.get("version"),
            "torch": r.get("torch"),
            **{**r["machine"], **({"lscpu": lscpu(r["machine"]["lscpu"])} if "lscpu" in r["machine"] else {})},
        }
        for _, r in runs
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [["", *(name for name, _ in runs)], *([k, *(str(c.get(k, "")) for c in columns)] for k in keys)]


def lscpu(said: Mapping[str, Any]) -> str:
    """Return the processor of a record in one line: family 25, model 17, ..., simd avx2 avx512f, l2_kib 1024."""
    told = {key: " ".join(value) if isinstance(value, list) else value for key, value in said.items() if key != "name"}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value)


def differences(runs: Sequence[tuple[str, Record]], look: Mapping[str, figures.Look]) -> list[str]:
    """The settings in which runs differ, but for the folder, which is in their names."""
    head, *rows = settings(runs)
    differing = [row for row in rows if len({*row[1:]}) > 1 and row[0] != "out"]
    return ["<h2>What differs</h2>", table([head, *differing], text=True, look=look)] if differing else []


def alike(runs: Sequence[tuple[str, Record]]) -> list[str]:
    """The settings that all runs share, and the machine, folded away."""
    if not runs:
        return []
    _, *rows = settings(runs)
    shared = [[row[0], row[1]] for row in rows if len({*row[1:]}) == 1]
    title = f"{len(shared)} settings, the same for all {len(runs)} runs" if len(runs) > 1 else f"{len(shared)} settings"
    return ["<h2>Settings and machine</h2>", folded(title, table([["setting", "value"], *shared], text=True))]


def results(runs: Sequence[tuple[str, Record]], look: Mapping[str, figures.Look]) -> list[str]:
    """The table of results, and the receipts, folded away."""
    if not runs:
        return []
    said = (
        "<p>Fewer bytes: a dense exchange's over what the run sent, the means of all its steps. Milliseconds are the median "
        "step's. Loss is held-out, in nats a byte. All are of one rank.</p>"
    )
    receipts = [f"<p>{escape(name)}: {escape(line)}</p>" for name, r in runs for line in r.get("receipt", ())]
    parts = ["<h2>Results</h2>", table(summary(runs), look=look), said]
    return [*parts, folded("Receipts", "".join(receipts))] if receipts else parts


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


def recipes(runs: Sequence[tuple[str, Record]]) -> list[str]:
    """Tables of what recipes left, and the bytes of each of their phases."""
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
        mb = [megabytes(count / each) for count in (dense, sent)]
        beside = report.get("backend_bytes")
        beside = "" if beside is None else megabytes(beside / each)
        rows.append(
            [name, str(report["world_size"]), str(report["steps"]), *mb, f"{dense / sent:.1f}" if sent else "", beside]
        )
    said = (
        "<p>MB are those of one rank. <em>Dense</em> is what must be sent without compression, <em>backend</em> what the "
        "backend or framework itself would have sent: more, where it all-reduces instead of a reduce-scatter.</p>"
    )
    return [table(rows), said]


def traffic(runs: Sequence[tuple[str, Record]], look: Mapping[str, figures.Look]) -> list[str]:
    """Bytes and seconds a step, of runs in all and of their buckets."""
    if not runs:
        return []
    sent, dense, seconds = {}, {}, {}
    for name, r in runs:
        each = {key: value / max(r["steps_done"], 1) for key, value in r["traffic"].items()}
        less = 0 < each["sent_bytes"] < 0.99 * each["dense_bytes"]
        ratio = f", {each['dense_bytes'] / each['sent_bytes']:.1f}x fewer" if less else ""
        label = f"{megabytes(each['sent_bytes'])} MB{ratio}"
        sent[name] = [figures.Bar(name, each["sent_bytes"] / 1e6, look[name].colour, label)]
        dense[name] = each["dense_bytes"] / 1e6
        seconds[name] = [
            figures.Bar(phase, each[phase] * 1e3, colour, f"{phase} {each[phase] * 1e3:.1f} ms")
            for phase, colour in palette.PHASES.items()
        ]
    return [
        "<h2>Bytes and seconds a step</h2>",
        "<p>Lower is better. The grey outline is what DDP sends without compression.</p>",
        figure(figures.bars(sent, "MB a step and rank", dense)),
        "<p><em>Exposed</em> is what training waited for after its last gradient was ready; the other phases overlap with "
        "each other and with backward.</p>",
        figure(figures.bars(seconds, "ms a step")),
        numbers(table(traffic_rows(runs), look=look)),
        *bytes_by_bucket(runs, look),
    ]


def traffic_rows(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """The numbers behind the bars: of one step, the mean of all."""
    rows = [["run", "dense MB", "sent MB", *(f"{phase} ms" for phase in palette.PHASES)]]
    for name, r in runs:
        each = {key: value / max(r["steps_done"], 1) for key, value in r["traffic"].items()}
        ms = (f"{each[phase] * 1e3:.2f}" for phase in palette.PHASES)
        rows.append([name, megabytes(each["dense_bytes"]), megabytes(each["sent_bytes"]), *ms])
    return rows


def bytes_by_bucket(runs: Sequence[tuple[str, Record]], look: Mapping[str, figures.Look]) -> list[str]:
    """Dense against sent bytes of each bucket, for the runs whose report has buckets that were sent."""
    rows = [(name, row) for name, r in runs for row in all_phases(r.get("report", {}).get("rows", ()))]
    if not rows:
        return []
    # of two layouts, the one that DDP had for its first step only is left to the table
    longest = {name: max(row["steps"] for other, row in rows if other == name) for name, _ in rows}
    shown = [(name, row) for name, row in rows if row["steps"] * 2 > longest[name]]
    keys = sorted({(row["bucket"], row["values"]) for _, row in shown})
    label = {(bucket, n): f"bucket {bucket}: {n:,} values" for bucket, n in keys}
    dense: dict[str, float] = {}
    sent: dict[str, list[figures.Bar]] = {heading: [] for heading in label.values()}
    for name, row in shown:
        heading = label[row["bucket"], row["values"]]
        dense[heading] = row["dense_bytes"] / row["steps"] / 1e6
        mb = row["sent_bytes"] / row["steps"]
        hover = f"{megabytes(mb)} MB, {how(row)}"
        sent[heading].append(figures.Bar(name, mb / 1e6, look[name].colour, f"{name} {megabytes(mb)} MB", hover))
    most = sorted(dense, key=lambda heading: -dense[heading])[:MOST_BUCKETS]
    left = f" The {len(most)} largest of {len(dense)}." if len(dense) > len(most) else ""
    head = ["bucket", "run", "values", "steps", "dense MB a step", "sent MB a step", "ratio", "how"]
    body = [
        [
            *(str(row["bucket"]), name, f"{row['values']:,}", str(row["steps"])),
            *(megabytes(row[key] / row["steps"]) for key in ("dense_bytes", "sent_bytes")),
            f"{row['dense_bytes'] / row['sent_bytes']:.1f}" if row["sent_bytes"] else "",
            how(row),
        ]
        for name, row in rows
    ]
    return [
        "<h3>By bucket</h3>",
        f"<p>What was sent in most steps; lower is better, dense is outlined.{left}</p>",
        figure(figures.bars({h: sent[h] for h in dense if h in most}, "MB a step and rank", dense)),
        numbers(table([head, *body])),
    ]


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
    """Return how a bucket was sent, or why it was not."""
    return how_sent(row["spec"], row["exchange"], row["reason"])
