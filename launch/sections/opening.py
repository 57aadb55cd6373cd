"""What a report opens with: one sentence that carries the result, then of what, when, where and by which version it is."""

import os
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import commpress
from commpress.launch import gain, gpu_record, records
from commpress.launch.records import Record, link_name, ran
from commpress.launch.sections import searches, timelines
from commpress.launch.sections.html import megabytes

Named = Sequence[tuple[str, Record]]


def opening(runs: Named, sessions: Named, of: Mapping[str, Sequence[Record]]) -> list[str]:
    """The parts of the page's top. `of` has all records by their kind."""
    files = [record for found in of.values() for record in found]
    parts = [f"<h1>{escape(headline(runs, sessions, of))}</h1>", f'<p class="about">{escape(about(files, runs))}</p>']
    return [*parts, f'<p class="about">{escape(gain.ABOUT_LOSS)}</p>'] if len(runs) > 1 else parts


def headline(runs: Named, sessions: Named, of: Mapping[str, Sequence[Record]]) -> str:
    """The sentence: of the first of these kinds of which there is a record."""
    if runs:
        return gain.headline(runs)
    if judged := of[records.JUDGED]:
        return str(judged[0]["sentences"][0]) if judged[0]["sentences"] else "A small model against its dense one"
    if sessions:
        return _session(*sessions[0])
    for kind in (records.PROBED, records.CHECKED, records.EXPLAINED):
        for record in of[kind]:
            return str(record["answer"]) if "answer" in record else _explained(record)
    for record in of[records.GPU_CHECK]:
        return gpu_record.answer(record)
    for record in of[records.EXPORTED]:
        return _exported(record)
    for record in of[records.SEARCHED]:
        return searches.sentence(record)
    for record in of[records.STEP_TIMES]:
        return _step_times(record)
    for record in of[records.LOSSES]:
        return _losses(record)
    spans = [event for record in of[records.TIMELINE] for event in records.spans(record)]
    steps: dict[tuple[int, int], list[Record]] = {}
    for event in spans:
        steps.setdefault((event["pid"], event["args"]["step"]), []).append(event)
    lengths = [timelines.lasted(found) for found in steps.values()]
    return f"The median of {len(lengths)} recorded steps took {statistics.median(lengths):.0f} ms"


def about(files: Sequence[Record], runs: Named) -> str:
    """Name of the run, date, version, machine and link, as far as the records tell them, and when the page was made."""
    first = runs[0][1] if runs else files[0]
    dates = sorted({str(r["date"]) for r in files if "date" in r})
    versions = sorted({str(r["version"]) for r in files if "version" in r})
    told = [name(files, runs)]
    if dates:
        told.append(minute(dates[-1]))
    if versions:
        told.append("commpress " + ", ".join(versions))
    machine = first.get("machine")
    if isinstance(machine, dict):
        machine = ", ".join(
            [str(machine.get("processor", "")), *([f"{machine['cores']} cores"] if "cores" in machine else [])]
        )
    told += [str(machine)] if machine else []
    if (link := first.get("link")) and link.get("shaped"):
        told.append(link_name(link, hosts=True))
    now = datetime.now(timezone.utc).isoformat()
    return " · ".join([*told, f"page made {minute(now)} by commpress {commpress.__version__}"])


def name(files: Sequence[Record], runs: Named) -> str:
    """The folder of a run, the folder that has those of several; of other records the files."""
    folders = [Path(str(r["settings"]["out"])) for _, r in runs if r["settings"].get("out")]
    if len(folders) > 1 and len({folder.is_absolute() for folder in folders}) == 1:
        shared = Path(os.path.commonpath(folders)).name
        return (f"{shared}: " if shared else "") + ", ".join(folder.name for folder in folders)
    if folders:
        return ", ".join(folder.name for folder in folders)
    names = [Path(str(r["file"])).name for r in files if "file" in r]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "a record without a name"


def minute(date: str) -> str:
    """2026-11-30T05:42:07+00:00 as 2026-11-30 05:42 UTC; what is no date as it is."""
    try:
        return datetime.fromisoformat(date).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return date


def _session(name: str, run: Record) -> str:
    report = run["report"]
    each, sent = max(run["steps_done"], 1), report["sent_bytes"]
    fewer = f", {report['dense_bytes'] / sent:.1f}x fewer bytes than a dense exchange" if sent else ""
    return f"{name}: sent {megabytes(sent / each)} MB a step{fewer}"


def _explained(record: Record) -> str:
    if not record["rows"]:
        return "Nothing is predicted"
    key = (
        "step_seconds"
        if all(row.get("step_seconds") is not None for row in record["rows"])
        else "communication_seconds"
    )
    best = min(record["rows"], key=lambda row: float(row[key]))
    what = "a step" if key == "step_seconds" else "the exchange of a step"
    return f"{best['spec']} is predicted to be fastest: {what} takes {best[key]:.3g} s, with {best['ratio']:.1f}x fewer bytes"


def _exported(record: Record) -> str:
    rows = record["rows"]
    if not rows:
        return "Nothing was exported"
    least = min(rows, key=lambda row: float(row["bytes"]))
    formats = ", ".join(str(row["format"]) for row in rows)
    return f"Exported as {formats}; the smallest is {least['format']}, {megabytes(least['bytes'])} MB"


def _step_times(record: Record) -> str:
    rows = [row for row in record["rows"] if ran(row) and row["kind"] != "floor"]
    plain = next((row for row in rows if row["name"] == "plain DDP"), None)
    ours = [row for row in rows if row["kind"] == "commpress"] or rows
    where = link_name(record["link"], hosts=True)
    if not ours:
        return f"No step was measured: {where}"
    best = min(ours, key=lambda row: float(row["seconds"]))
    told = f"{where}: {best['name']} is the fastest, {best['seconds']:.3g} s a step"
    if plain is None or plain is best:
        return told
    return f"{told}, {gain.times(plain['seconds'] / best['seconds'])} faster than plain DDP"


def _losses(record: Record) -> str:
    rows = [row for row in record["rows"] if ran(row) and row["loss"]]
    if not rows:
        return "Nothing has trained"
    best = min(rows, key=lambda row: float(row["loss"][-1]))
    return f"{best['name']} has the lowest held-out loss, {best['loss'][-1]:.3f}, with {megabytes(best['sent_bytes'][-1])} MB"
