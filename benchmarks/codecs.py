"""How fast are the codecs, in memory copies of the gradient? `python benchmarks/codecs.py [--threads 1 2] [--json FILE]`

float32, on one thread, or a table for each number of threads that `--threads` names; the copies are one thread's. Every
repetition runs each case once on each, in turn, between copies of the same gradient; a row is the median of its own times over
the median copy, so a noisy machine shifts both. "feedback" reads and writes a residual as well, "momentum" makes besides, of
the gradient, the momentum over the root of the variance that OneBitAdamW sends.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import commpress
from commpress.comm import coding
from commpress.comm.exchange import EXCHANGES
from commpress.comm.prologue import Prologue
from commpress.kernels.cpu import slices

SPECS = (
    "bf16",
    "fp16",
    "fp8",
    "int8",
    "int4",
    "int2",
    "sign",
    "topk(0.1)|int4",
    "topk(0.01)",
    "topk(0.01)|int4",
    "topk(0.001)|int4",
    "randomk(0.1)",
    "randomk(0.01)",
    "randomk(0.1)|int4",
    "rotate|int4",
    "rotate|sign",
)


ACTIONS = ("encode", "feedback", "momentum", "decode", "mean of 4", "recode 4")


def cpu_name() -> str:
    """The processor's name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def cases(x: torch.Tensor) -> dict[tuple[str, str], Callable[[], object]]:
    """Return what is timed: (spec, action) -> call. Memory is allocated beforehand, as in training."""
    n, table = x.numel(), {}
    for spec in SPECS:
        codec = commpress.parse(spec)
        payload, residual, out = codec.encode(x), torch.zeros(n), torch.empty(n)
        four, chunk = payload.repeat(4), torch.empty_like(payload)
        table[spec, "encode"] = lambda c=codec, p=payload: c.encode(x, out=p)
        table[spec, "feedback"] = lambda c=codec, p=payload, r=residual: coding.encode(c, x, r, out=p)
        update = Prologue(torch.ones(n), x.clone(), limit=2.8, fresh=0.1, kept=0.9)
        gradient = x.clone()  # some codecs leave the update in it
        table[spec, "momentum"] = lambda c=codec, p=payload, r=residual, b=update, g=gradient: coding.encode(
            c, g, r, b, p
        )
        table[spec, "decode"] = lambda c=codec, p=payload, o=out: c.decode(p, n, o)
        table[spec, "mean of 4"] = lambda c=codec, p=four, o=out: c.mean(p, n, 4, o)
        if EXCHANGES[codec.exchange].chunk(n, codec, 0, 2) is not None:
            table[spec, "recode 4"] = lambda c=codec, p=four, q=chunk: coding.recode(c, p, n, 4, None, q)
    return table


Times = dict[tuple[str, str], list[float]]


def measured(x: torch.Tensor, threads: list[int], repeat: int) -> tuple[float, dict[int, Times]]:
    """The median seconds of a copy of x, and by number of threads the seconds of each case."""
    target, timed = torch.empty_like(x), cases(x)
    for call in timed.values():
        call()
    copies: list[float] = []
    times: dict[int, Times] = {count: {key: [] for key in timed} for count in threads}

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for _ in range(repeat):
        for key, call in timed.items():
            for count in threads:
                slices.idle_cores = lambda c=count: c  # type: ignore[misc]
                copies.append(seconds(lambda: target.copy_(x)))
                times[count][key].append(seconds(call))
    return statistics.median(copies), times


def in_copies(times: Times, copy: float, n: int) -> list[dict[str, Any]]:
    """Rows of the table: by spec the bits a value, and what each action takes."""
    rows: list[dict[str, Any]] = []
    for spec in SPECS:
        costs = {a: statistics.median(times[spec, a]) / copy for a in ACTIONS if (spec, a) in times}
        rows.append({"spec": spec, "bits": 8 * commpress.parse(spec).nbytes(n) / n, **costs})
    return rows


def shown(rows: list[dict[str, Any]], title: str) -> Table:
    """The table of these rows."""
    table = Table(title=title)
    for name in ("spec", "bits a value", *ACTIONS):
        table.add_column(name, justify="left" if name == "spec" else "right")
    for row in rows:
        table.add_row(row["spec"], f"{row['bits']:.3f}", *(f"{row[a]:.2f}" if a in row else "" for a in ACTIONS))
    return table


def main() -> None:
    """Time all cases and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mb", type=float, default=26.2144, help="gradient size in MB")
    options.add_argument("--repeat", type=int, default=11)
    options.add_argument("--threads", type=int, nargs="+", default=[1], help="a table for each number of threads")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(int(chosen.mb * 1e6 / 4))
    n, machine = x.numel(), cpu_name()
    copy, times = measured(x, chosen.threads, chosen.repeat)
    by_threads = {count: in_copies(times[count], copy, n) for count in chosen.threads}
    for count, rows in by_threads.items():
        on = f"{count} thread{'s' if count > 1 else ''} of {machine}, torch {torch.__version__}"
        title = f"{n * 4 / 1e6:.0f} MB float32, {on}: memory copies ({copy * 1e3:.2f} ms each)"
        Console(width=120).print(shown(rows, title))
    if chosen.json:
        record = {"machine": machine, "values": n, "copy_seconds": copy, "rows": by_threads[chosen.threads[0]]}
        chosen.json.write_text(json.dumps(record | {"by_threads": by_threads}, indent=2))
    dense = {count: [row for row in rows if "(" not in row["spec"]] for count, rows in by_threads.items()}
    first = dense.pop(chosen.threads[0])
    worst = max(first, key=lambda r: r["feedback"] + r["decode"])
    cost = worst["feedback"] + worst["decode"]
    print(f"slowest dense codec, encode with feedback + decode: {worst['spec']} {cost:.2f} copies")
    for count, rows in dense.items():
        gains = [a["feedback"] / b["feedback"] for a, b in zip(first, rows, strict=True)]
        low, high = min(gains), max(gains)
        said = f"encode with feedback {low:.2f} to {high:.2f} times as fast as on {chosen.threads[0]}"
        print(f"{count} threads, dense codecs: {said}")


if __name__ == "__main__":
    main()
