"""Predictions of bytes and seconds, a row per spec, with their table for a terminal and their file."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from commpress.comm.cost import Cluster, break_even, feedback_bytes, layout, step
from commpress.comm.plan import Plan
from commpress.launch import units
from commpress.launch.speed import Measured

DAY = 86400.0
"""Seconds."""
BUCKET = 2**20
"""Bytes of a megabyte in DDP's `bucket_cap_mb`."""
MOST_BUCKETS = 100_000
"""The most buckets of a simulated pipeline."""
LEAST_STEP, MOST_STEP = 1e-9, 1e6
"""The longest step in seconds: with longer ones a float cannot resolve the pipeline's times."""


def predicted(
    specs: Sequence[str],
    values: int,
    bucket_bytes: float,
    cluster: Cluster,
    compute: float | None,
    measured: Measured,
    exchanges: Sequence[str | None] = (None,),
) -> list[dict[str, Any]]:
    """Return a row for dense, and for each spec by each of `exchanges` (None: its own).

    Rows have seconds, and bytes per rank and step; `step_seconds` and savings need `compute`.
    """
    buckets = layout(values, bucket_bytes)
    rows: list[dict[str, Any]] = []
    for spec, exchange in dict.fromkeys((("none", None), *itertools.product(specs, exchanges))):
        plan = Plan.of(spec, exchange)
        speed = measured.speeds[spec]
        alone = step(plan, buckets, speed, cluster)
        row: dict[str, Any] = {
            "spec": str(plan.codec),
            "exchange": str(plan.choose(buckets[0], 4, cluster.world_size).exchange),
            "sent_bytes": alone.sent_bytes,
            "communication_seconds": alone.seconds,
            "feedback_bytes": feedback_bytes(plan, buckets, cluster.world_size),
        }
        row["ratio"] = rows[0]["sent_bytes"] / row["sent_bytes"] if rows and row["sent_bytes"] else 1.0
        if compute is not None:
            whole = step(plan, buckets, speed, cluster, compute)
            row |= {"step_seconds": whole.seconds, "exposed_seconds": whole.exposed}
            plain = rows[0] if rows else row
            steps = DAY / plain["step_seconds"]
            row["saved_bytes_a_day"] = steps * cluster.world_size * (plain["sent_bytes"] - row["sent_bytes"])
            row["saved_hours_a_day"] = 24 * (1 - row["step_seconds"] / plain["step_seconds"])
        if plan.codec.lossy:
            row["break_even"] = break_even(plan, buckets, speed, measured.speeds["none"], cluster, compute or 0.0)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], title: str, known: bool) -> Table:
    """Return the rows as a table; `known` says whether the seconds of a step are known."""
    made = Table(title=title, box=box.SIMPLE_HEAD)
    names = ["spec", "exchange", "MB a step", "ratio", "communication"]
    names += ["step", "MB saved a day", "hours a day"] if known else []
    for i, name in enumerate((*names, "pays below", "feedback MB")):
        made.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        cells = [row["spec"] if row["spec"] != "none" else "plain DDP", row["exchange"]]
        cells += [megabytes(row["sent_bytes"]), f"{row['ratio']:.1f}", f"{row['communication_seconds']:.3g} s"]
        if known:
            cells += [f"{row['step_seconds']:.3g} s", megabytes(row["saved_bytes_a_day"])]
            cells.append(f"{row['saved_hours_a_day']:.1f}")
        pays = bits(row["break_even"]) if "break_even" in row else ""
        made.add_row(*cells, pays, megabytes(row["feedback_bytes"]) if row["feedback_bytes"] else "")
    return made


def megabytes(nbytes: float) -> str:
    """Return bytes in MB, with three digits: 0.00412, 63.9, 7,110."""
    mb = float(f"{nbytes / 1e6:.3g}")
    places = max(0, 2 - math.floor(math.log10(abs(mb)))) if mb else 0
    return f"{mb:,.{places}f}"


def bits(bandwidth: float | None) -> str:
    """Return a break-even bandwidth in words."""
    if bandwidth is None:
        return "never"
    if bandwidth == math.inf:
        return "any link"
    return units.bandwidth(bandwidth * 8)


def as_json(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows for a file: a break-even bandwidth in words, since it may be infinite."""
    return [{**row, "break_even": bits(row["break_even"])} if "break_even" in row else row for row in rows]


def require(good: bool, otherwise: str) -> None:
    """Raise ValueError with this sentence unless `good` is true."""
    if not good:
        raise ValueError(otherwise)


def require_step_seconds(seconds: float | None) -> None:
    """Raise ValueError for a step that cannot be simulated."""
    good = seconds is None or LEAST_STEP <= seconds <= MOST_STEP
    require(good, f"--step-seconds {seconds}: expected a number from {LEAST_STEP:g} to {MOST_STEP:g}")


def require_buckets(values: int, bucket_bytes: float, flags: str) -> None:
    """Raise ValueError that names the flags if they make more buckets than can be simulated."""
    buckets = 4 * values / bucket_bytes
    require(buckets <= MOST_BUCKETS, f"{flags}: makes {buckets:.3g} buckets, expected {MOST_BUCKETS} at most")


def require_writable(path: Path) -> None:
    """Raise ValueError for a file that cannot be written, before the work starts."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be written: {error.strerror or error}") from None


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file. Raises ValueError with the reason if it cannot."""
    try:
        path.write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be written: {error.strerror or error}") from None


def show(made: Table) -> None:
    """Print a table at its full width, also where the terminal is narrower."""
    needed = Console(width=10_000).measure(made).maximum
    Console(width=max(Console().width, needed)).print(made)


def say(text: str) -> None:
    """Print a sentence unchanged."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
