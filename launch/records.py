"""The JSON files of a report, recognised by their content, and the names of their links.

Runs come from `commpress.launch.train`, step times and losses from `benchmarks/training.py`, timelines are traces
of `session.timeline`, reports come from `session.report().write_json(...)`, predictions from
`commpress explain` and `commpress probe` with `--json`, checks of a GPU those of `make gpu-check`, searches
the search.json of `commpress search`, judgements the judgement.json of `commpress judge`, and exports the export.json beside
exported files. A folder means the files in it and one level below.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commpress.launch import units

Record = dict[str, Any]
"""The content of a JSON file."""

RUN, STEP_TIMES, LOSSES, TIMELINE = "run", "step times", "losses", "timeline"
SESSION, EXPLAINED, CHECKED, PROBED, GPU_CHECK = "session", "explain", "predictions", "probe", "gpu check"
SEARCHED, JUDGED, EXPORTED = "search", "judgement", "export"
FILES = ("record.json", "search.json", "judgement.json", "export.json", "traffic.json", "timeline.json")
"""The files that a report looks for in a folder."""
NEEDED = {
    RUN: ("settings", "traffic", "curve", "steps_done", "median_step_seconds", "machine", "world_size", "backend"),
    STEP_TIMES: ("link", "machine", "torch", "world_size", "model", "parameters", "tokens_per_step", "steps", "rows"),
    LOSSES: ("world_size", "model", "parameters", "tokens_per_step", "target", "rows"),
    TIMELINE: ("traceEvents",),
    SESSION: ("spec", "rank", "world_size", "steps", "dense_bytes", "sent_bytes", "received_bytes", "seconds", "rows"),
    EXPLAINED: ("params", "world", "bandwidth", "device", "rows"),
    CHECKED: ("answer", "rows"),
    PROBED: ("params", "world", "bandwidth", "answer", "rows"),
    GPU_CHECK: ("machine", "torch", "triton", "rehearsal", "values", "copy_seconds", "seconds", "rows"),
    SEARCHED: ("problem", "strategy", "weights", "front", "best", "finals", "rows"),
    JUDGED: ("machine", "inputs", "batches", "rows", "dense", "small", "left_out", "targets", "sentences"),
    EXPORTED: ("of", "rows"),
}
NEEDED_IN_A_ROW = {
    STEP_TIMES: ("name", "kind", "seconds", "quartiles", "ratio", "tokens_per_second"),
    LOSSES: ("name", "kind", "steps", "loss", "sent_bytes", "steps_to_target"),
    SESSION: ("bucket", "values", "spec", "exchange", "reason", "steps", "dense_bytes", "sent_bytes"),
    EXPLAINED: ("spec", "exchange", "sent_bytes", "ratio", "communication_seconds"),
    CHECKED: ("link", "name", "predicted", "measured", "error"),
    PROBED: ("spec", "exchange", "sent_bytes", "ratio", "communication_seconds"),
    GPU_CHECK: ("part", "name", "error"),
    SEARCHED: ("number", "choice", "state", "quality", "size"),
    JUDGED: ("runtime", "dense", "small", "quality"),
    EXPORTED: ("format", "path", "bytes", "difference"),
}
NEEDED_IN_A_LINK = ("hosts", "ranks_per_host", "rate", "delay", "loss", "shaped")
CALLED = {
    RUN: "a run's record.json",
    STEP_TIMES: "a record of step times",
    LOSSES: "a record of losses",
    TIMELINE: "a timeline",
    SESSION: "a session's report",
    EXPLAINED: "predictions of `commpress explain`",
    CHECKED: "checked predictions of `commpress explain`",
    PROBED: "what `commpress probe` found",
    GPU_CHECK: "what `make gpu-check` found",
    SEARCHED: "what `commpress search` found",
    JUDGED: "what `commpress judge` found",
    EXPORTED: "an export.json",
}
SPANS = ("forward", "backward", "encode", "wire", "decode", "exposed")
"""Names of the spans of a timeline."""


def files_of(path: Path) -> list[Path]:
    """Return a file itself; for a folder the records in it and one level below. Raises ValueError for a folder without any."""
    if not os.path.isdir(path):
        return [path]
    try:
        folders = [path, *sorted(each for each in path.iterdir() if each.is_dir())]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    found = [folder / name for folder in folders for name in FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{path}: a folder without {', '.join(FILES)}, expected some of them in it or one level below")
    return found


def read(path: Path) -> Record:
    """Read a file that a report can show. Raises ValueError, which names the file, for any other."""
    try:
        if path.exists() and not path.is_file():  # a device or pipe may have no end
            raise ValueError("not a file")
        record = json.loads(path.read_text())
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path}: cannot be read as a run's record.json or another JSON file: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a run's record.json or another JSON file: {error}") from error
    try:
        found = kind(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        require(record, found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: {not_one(found, error)}") from None
    return {**record, "file": str(path)}  # most do not say what they are of: their name has to


def not_one(found: str, error: Exception) -> str:
    """Return the sentence for a record of that kind with a value of the wrong type."""
    return f"not {CALLED[found]}, a value in it does not belong there: {type(error).__name__}: {error}"


def kind(record: Any) -> str:
    """Return RUN, STEP_TIMES, ... Raises ValueError for any other record."""
    if isinstance(record, dict):
        if record.get("what") in (
            STEP_TIMES,
            LOSSES,
            EXPLAINED,
            CHECKED,
            PROBED,
            GPU_CHECK,
            SEARCHED,
            JUDGED,
            EXPORTED,
        ):
            return str(record["what"])
        if "traceEvents" in record:
            return TIMELINE
        if "settings" in record or "traffic" in record:
            return RUN
        if {"spec", "rank", "rows"} <= record.keys():
            return SESSION
    raise ValueError(f"expected one of {', '.join(CALLED.values())}, found none of them")


def require(record: Record, found: str) -> None:
    """Raise ValueError that says what a record of that kind lacks."""

    def has(part: Any, keys: Iterable[str], called: str) -> None:
        missing = [key for key in keys if not isinstance(part, dict) or key not in part]
        if missing:
            raise ValueError(f"not {called}, it has no {missing[0]!r}")

    called = CALLED[found]
    has(record, NEEDED[found], called)
    if found in NEEDED_IN_A_ROW:
        for i, row in enumerate(record["rows"]):
            failed = found in (STEP_TIMES, LOSSES) and isinstance(row, dict) and row.get("error")
            has(row, ("name", "kind") if failed else NEEDED_IN_A_ROW[found], f"{called}: row {i}")
    if found == STEP_TIMES:
        has(record["link"], NEEDED_IN_A_LINK, f"{called}: the link")
        if record["link"]["shaped"]:
            units.rate(record["link"]["rate"])
    if found == TIMELINE and not spans(record):
        raise ValueError(f"not {called} of a session: no span of {', '.join(SPANS)} that has a step")


def spans(record: Record) -> list[Record]:
    """Return the spans of a session in a trace."""
    return [
        event
        for event in record["traceEvents"]
        if event.get("ph") == "X" and event.get("name") in SPANS and "step" in event.get("args", {})
    ]


def ran(row: Record) -> bool:
    """Return whether a row of a benchmark has figures."""
    return not row.get("error")


def model_name(record: Record) -> str:
    """Return the model of a benchmark of losses, and its number of ranks."""
    return f"{record['model']}, {record['parameters'] / 1e6:.1f} M parameters, {record['world_size']} ranks"


def conditions(record: Record) -> str:
    """Return the conditions of a link except its bandwidth, and whether the ranks had to share cores."""
    link, ranks = record["link"], f"{record['world_size']} ranks"
    cores = re.search(r"(\d+) cores", str(record.get("machine", "")))
    if cores and record["world_size"] > int(cores[1]):
        ranks += f" on {cores[1]} cores"
    if not link["shaped"]:
        return f"{ranks}, {link['rate']}"
    return ", ".join([f"{link['hosts']} hosts, {ranks}", *impairments(link)])


def link_name(link: Record, hosts: bool = False) -> str:
    """Return a link's name: 1 Gbit/s, and its other conditions; its hosts if asked for."""
    if not link["shaped"]:
        return str(link["rate"])
    name = units.bandwidth(units.rate(link["rate"]))
    if hosts:
        each = "" if link["ranks_per_host"] == 1 else f" of {link['ranks_per_host']} ranks"
        name += f", {link['hosts']} hosts{each}"
    return ", ".join([name, *impairments(link)])


def impairments(link: Record) -> list[str]:
    """Return a link's delay and loss, if it has them."""
    made = {"delay": " by a relay on the same cores"} if link.get("relayed") else {}
    there = (key for key, read in (("delay", units.seconds), ("loss", units.share)) if read(link[key]))
    return [f"{link[key]} {key}{made.get(key, '')}" for key in there]
