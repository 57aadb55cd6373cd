"""How fast are the codecs, in memory copies of the gradient? `python benchmarks/codecs.py [--mb 26] [--json FILE]`

One thread, float32. Every repetition runs each case once, in turn, between copies of the same gradient; a row is the median
of its own times over the median copy, so a noisy machine shifts both. "feedback" reads and writes a residual as well,
"momentum" makes besides, of the gradient, the momentum over the root of the variance that OneBitAdamW sends.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import commpress
from commpress.comm import coding
from commpress.comm.exchange import EXCHANGES
from commpress.comm.prologue import Prologue

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


def main() -> None:
    """Time all cases and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mb", type=float, default=26.2144, help="gradient size in MB")
    options.add_argument("--repeat", type=int, default=11)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(int(chosen.mb * 1e6 / 4))
    target, timed = torch.empty_like(x), cases(x)
    for call in timed.values():
        call()
    copies: list[float] = []
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for _ in range(chosen.repeat):
        for key, call in timed.items():
            copies.append(seconds(lambda: target.copy_(x)))
            times[key].append(seconds(call))
    copy = statistics.median(copies)
    actions = ("encode", "feedback", "momentum", "decode", "mean of 4", "recode 4")
    title = (
        f"{x.numel() * 4 / 1e6:.0f} MB float32, one thread of {cpu_name()}, torch {torch.__version__}: memory copies"
    )
    table = Table(title=f"{title} ({copy * 1e3:.2f} ms each)")
    for name in ("spec", "bits a value", *actions):
        table.add_column(name, justify="left" if name == "spec" else "right")
    rows = []
    for spec in SPECS:
        bits = 8 * commpress.parse(spec).nbytes(x.numel()) / x.numel()
        costs = {a: statistics.median(times[spec, a]) / copy for a in actions if (spec, a) in times}
        rows.append({"spec": spec, "bits": bits, **costs})
        table.add_row(spec, f"{bits:.3f}", *(f"{costs[a]:.2f}" if a in costs else "" for a in actions))
    Console(width=120).print(table)
    if chosen.json:
        record = {"machine": cpu_name(), "values": x.numel(), "copy_seconds": copy, "rows": rows}
        chosen.json.write_text(json.dumps(record, indent=2))
    worst = max(rows, key=lambda r: r["feedback"] + r["decode"] if "(" not in r["spec"] else 0)
    print(
        f"slowest dense codec, encode with feedback + decode: {worst['spec']} {worst['feedback'] + worst['decode']:.2f} copies"
    )


if __name__ == "__main__":
    main()
