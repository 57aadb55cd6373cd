"""How fast are the codecs, in memory copies of the gradient? `python benchmarks/codecs.py [--threads 1 2] [--json FILE]`

float32, on one thread, or a table for each number of threads that `--threads` names; the copies are one thread's. Every
repetition runs each case once on each, in turn, between copies of the same gradient; a row is the median of its own times over
the median copy, so a noisy machine shifts both. "feedback" reads and writes a residual as well, "momentum" makes besides, of
the gradient, the momentum over the root of the variance that OneBitAdamW sends.

With several numbers of threads another table has how many times as fast each action is on more of them, and a copy that is cut
into slices as the loops are: one memory serves all cores, which bounds both.

A second table has the GB/s of what an action must move: each value, residual and payload that it reads or writes, once. A copy
moves x twice. The last table has what else there is (`codec_peers.py`), in turns with copies, too.

With `--device cuda` the same on a GPU, one codec after another, against copies from device to device.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from codec_cases import ACTIONS, MB, SPECS, gains_of, measured, name_of, rows_of
from codec_peers import ABSENT, peers
from copies import in_turns
from rich.console import Console
from rich.table import Table

from commpress.launch.run_record import where


def shown(rows: list[dict[str, Any]], title: str, gigabytes: bool = False) -> Table:
    """The table of these rows: copies, or GB/s."""
    table = Table(title=title)
    for name in ("spec", "bits a value", *ACTIONS):
        table.add_column(name, justify="left" if name == "spec" else "right")
    for row in rows:
        cells = [
            ("" if a not in row else f"{row['bytes_per_second'][a] / 1e9:.1f}" if gigabytes else f"{row[a]:.2f}")
            for a in ACTIONS
        ]
        table.add_row(row["spec"], f"{row['bits']:.3f}", *cells)
    return table


def shown_gains(rows: list[dict[str, Any]], title: str) -> Table:
    """The table of how many times as fast more threads are; the copy has one figure."""
    table = Table(title=title)
    for name in ("spec", *ACTIONS):
        table.add_column(name, justify="left" if name == "spec" else "right")
    for row in rows:
        gains = [row["copy"]] if "copy" in row else [row.get(action) for action in ACTIONS]
        table.add_row(row["spec"], *("" if gain is None else f"{gain:.2f}" for gain in gains))
    return table


def main() -> None:
    """Time all cases and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the codecs run")
    options.add_argument(
        "--mb", type=float, help=f"gradient size in MB; default {MB['cpu']:.0f}, {MB['cuda']:.0f} on cuda"
    )
    options.add_argument("--repeat", type=int, default=11)
    options.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="on cpu, a table for each number of threads"
    )
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: this machine has no GPU that torch can use, expected cpu")
    torch.set_num_threads(1)
    device = torch.device(chosen.device, *([torch.cuda.current_device()] if chosen.device == "cuda" else []))
    n = int((chosen.mb or MB[chosen.device]) * 1e6 / 4)
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    copies, times = measured(x, SPECS, chosen.threads, chosen.repeat)
    copy = statistics.median(copies)
    console = Console(width=120)
    by_threads = {count: rows_of(times, count, SPECS, copy, n) for count in chosen.threads}
    for count, rows in by_threads.items():
        on_threads = f"{count} thread{'s' if count > 1 else ''} of " if device.type == "cpu" else ""
        title = f"{n * 4 / 1e6:.0f} MB float32, {on_threads}{name_of(device)}, torch {torch.__version__}"
        console.print(shown(rows, f"{title}: memory copies ({copy * 1e3:.3g} ms each)"))
        console.print(shown(rows, f"GB/s of what must move (a copy: {2 * x.nbytes / copy / 1e9:.1f})", gigabytes=True))
    least, *more = chosen.threads
    gains = {count: gains_of(times, least, count, SPECS) for count in more}
    for count, rows in gains.items():
        console.print(shown_gains(rows, f"times as fast on {count} threads as on {least}, {name_of(device)}"))
    if chosen.json:
        record = {**where(device), "device": device.type, "values": n, "copy_seconds": copy}
        record["rows"] = by_threads[chosen.threads[0]]
        chosen.json.write_text(json.dumps(record | {"by_threads": by_threads, "gains": gains}, indent=2))
    show_peers(x, chosen.repeat)
    say_dense(by_threads)


def show_peers(x: torch.Tensor, repeat: int) -> None:
    """Print what others take, in copies of the same run."""
    copies, times = in_turns(peers(x), x, repeat)
    who = "others, one thread" if x.device.type == "cpu" else "others"
    table = Table(title=f"{who}: memory copies ({statistics.median(copies) * 1e3:.3g} ms each)")
    for column in ("", "encode", "decode"):
        table.add_column(column, justify="right" if column else "left")
    for name in dict.fromkeys(name for name, _ in times):
        seconds = (times.get((name, action)) for action in ("encode", "decode"))
        cells = ["" if s is None else f"{statistics.median(s) / statistics.median(copies):.2f}" for s in seconds]
        table.add_row(name, *cells)
    Console(width=120).print(table)
    if x.device.type == "cpu" and not any(name.startswith("pi-quant") for name, _ in times):
        print(ABSENT)


def say_dense(by_threads: dict[int, list[dict[str, Any]]]) -> None:
    """Print the slowest dense codec, and what more threads bring to them."""
    dense = {count: [row for row in rows if "(" not in row["spec"]] for count, rows in by_threads.items()}
    least, *_ = by_threads
    first = dense.pop(least)
    worst = max(first, key=lambda r: r["feedback"] + r["decode"])
    cost = worst["feedback"] + worst["decode"]
    print(f"slowest dense codec, encode with feedback + decode: {worst['spec']} {cost:.2f} copies")
    for count, rows in dense.items():
        gains = [a["feedback"] / b["feedback"] for a, b in zip(first, rows, strict=True)]
        low, high = min(gains), max(gains)
        said = f"encode with feedback {low:.2f} to {high:.2f} times as fast as on {least}"
        print(f"{count} threads, dense codecs: {said}")


if __name__ == "__main__":
    main()
