"""What `training.py` prints of its records: a table each, what did not run, and the answer."""

from typing import Any

from peers import DENSE
from rich.console import Console
from rich.table import Table

from commpress.launch import records

PARTS = {
    "newton_schulz_seconds": "Newton-\nSchulz s",
    "coordinates_seconds": "coordi-\nnates s",
    "rest_seconds": "the\nrest s",
}
"""Columns of steps by Muon."""


def title(record: dict[str, Any]) -> str:
    """One line over the table."""
    link = f"{record['link']['rate']}, {records.conditions(record)}"
    return f"{record['parameters'] / 1e6:.1f} M parameters; {link}; {record['machine']}"


def print_steps(record: dict[str, Any]) -> None:
    """The table of a step-time record, what did not run, and the answer."""
    table = Table(title=title(record), caption="encode to exposed: ms a step")
    table.add_column("", no_wrap=True)
    for name in ("s a\nstep", "quartiles", "against\nnone", "tokens\na second", "MB\nclaimed", "MB by\nkernel"):
        table.add_column(name, justify="right")
    ran = [row for row in record["rows"] if not row["error"]]
    apart = PARTS if any(key in row for key in PARTS for row in ran) else {}
    for name in (*apart.values(), "encode", "wire", "decode", "exposed"):
        table.add_column(name, justify="right")
    for row in ran:
        low, _, high = row["quartiles"]
        phases = (
            [f"{row['phases'][k] * 1e3:.0f}" for k in ("encode", "wire", "decode", "exposed")] if row["phases"] else []
        )
        mb = [f"{row[k] / 1e6:.2f}" for k in ("sent_bytes", "kernel_bytes")]
        times = [
            f"{row['seconds']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['ratio']:.2f}x",
            f"{row['tokens_per_second']:.0f}",
        ]
        table.add_row(row["name"], *times, *mb, *(f"{row[key]:.3f}" for key in apart), *phases)
    Console(width=176 if apart else 144).print(table)
    print_failures(record)
    dense = next((r["seconds"] for r in ran if r["name"] == DENSE), None)
    if dense is not None:
        gains = (f"{r['name']} {dense / r['seconds']:.2f}" for r in ran if r["kind"] in ("commpress", "peer"))
        print(f"times as fast as plain DDP: {', '.join(gains)}")


def print_failures(record: dict[str, Any]) -> None:
    """Rows that have no figures, and why."""
    for row in record["rows"]:
        if row["error"]:
            print(f"  {row['name']}: {row['error']}")


def print_losses(record: dict[str, Any]) -> None:
    """The table of a loss record and the answer."""
    table = Table(
        title=f"{record['parameters'] / 1e6:.1f} M parameters, {record['world_size']} ranks, {record['machine']}"
    )
    for name in ("", "rate", "held-out loss", f"steps to {record['target']:.2f}", "MB a step"):
        table.add_column(name, justify="right" if name else "left")
    ran = [row for row in record["rows"] if row.get("steps")]
    for row in ran:
        reached = "never" if row["steps_to_target"] is None else f"{row['steps_to_target']:.0f}"
        mb = row["sent_bytes"][-1] / max(1, row["steps"][-1]) / 1e6
        table.add_row(row["name"], f"{row['lr']:g}", f"{row['loss'][-1]:.3f}", reached, f"{mb:.3f}")
    Console(width=144).print(table)
    print_failures(record)
    there = [r for r in ran if r["steps_to_target"] is not None]
    bytes_to = {r["name"]: r["steps_to_target"] * r["sent_bytes"][-1] / max(1, r["steps"][-1]) for r in there}
    if bytes_to:
        least = min(bytes_to, key=lambda name: bytes_to[name])
        print(f"fewest bytes to {record['target']:.2f}: {least}, {bytes_to[least] / 1e6:.1f} MB a rank")
