"""Predictions of bytes and seconds by spec, a row each, and their table for a terminal."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from commpress.comm.cost import Cluster, break_even, feedback_bytes, layout, step
from commpress.comm.plan import Plan
from commpress.launch import units
from commpress.launch.speed import Measured

DAY = 86400.0
"""Seconds."""


def predicted(
    specs: Sequence[str],
    values: int,
    bucket_bytes: float,
    cluster: Cluster,
    compute: float | None,
    measured: Measured,
) -> list[dict[str, Any]]:
    """A row for dense and for each spec. Seconds, bytes a rank and step; `step_seconds` and savings need `compute`."""
    buckets = layout(values, bucket_bytes)
    rows: list[dict[str, Any]] = []
    for spec in dict.fromkeys(("none", *specs)):
        plan = Plan.of(spec)
        speed = measured.speeds[spec]
        alone = step(plan, buckets, speed, cluster)
        row: dict[str, Any] = {
            "spec": str(plan.codec),
            "exchange": plan.choose(buckets[0], 4, cluster.world_size).exchange.name,
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
    """The rows as a table; `known` says whether the seconds of a step are."""
    made = Table(title=title, box=box.SIMPLE_HEAD)
    names = ["spec", "exchange", "a step", "ratio", "communication"]
    names += ["step", "saved a day", "hours a day"] if known else []
    for i, name in enumerate((*names, "pays below", "feedback")):
        made.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        cells = [row["spec"] if row["spec"] != "none" else "plain DDP", row["exchange"]]
        cells += [size(row["sent_bytes"]), f"{row['ratio']:.1f}", f"{row['communication_seconds']:.3g} s"]
        if known:
            cells += [f"{row['step_seconds']:.3g} s", f"{row['saved_bytes_a_day'] / 1e12:,.1f} TB"]
            cells.append(f"{row['saved_hours_a_day']:.1f}")
        pays = bits(row["break_even"]) if "break_even" in row else ""
        made.add_row(*cells, pays, size(row["feedback_bytes"]) if row["feedback_bytes"] else "")
    return made


def size(nbytes: float) -> str:
    """Bytes as people write them: 7.11 GB."""
    name, unit = next((n, u) for n, u in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 0)) if nbytes >= u)
    return f"{nbytes / (unit or 1):.3g} {name}"


def bits(bandwidth: float | None) -> str:
    """A break-even bandwidth in words."""
    if bandwidth is None:
        return "never"
    if bandwidth == math.inf:
        return "any link"
    return units.bandwidth(bandwidth * 8)
