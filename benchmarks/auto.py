"""What `attach(model)` costs and gains on a link: its steps against plain DDP, and DDP with each spec that it may choose.

    python -m commpress.launch.lab 2 1gbit -- python benchmarks/auto.py [--model wide|deep] [--steps 300] [--json FILE]

All ways train a copy of the same byte-level GPT on the same windows, in turns of a few steps, so that a noisy machine shifts
all; the first step of each is not counted. `auto` begins to search at once. The last line holds the bounds: the mean of auto's
steps, its search included, against that of the better of plain DDP and DDP with bf16, and auto's median once it has chosen
against that of the best fixed spec. `--switch` changes the lab's links in the middle, there and back: auto looks again, and
each third is compared with the others' same third. On a slow link `--others 20` spares time: the other ways take so many
steps of a third.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch import data
from commpress.launch.link import Link, joining
from commpress.launch.model import GPT, Shape
from commpress.launch.run_record import where

MODELS = {
    "wide": (Shape(layers=5, width=528, heads=8, context=64), 2),  # 17 M parameters, little to compute
    "deep": (Shape(layers=8, width=128, heads=4, context=128), 8),  # 1.7 M, a long backward
}
"""Shapes and batches: one whose step is mostly communication, one whose step is mostly backward."""
PLAIN, HOOKED, AUTO = "plain DDP", "torch's allreduce_hook", "auto"
"""Without a hook DDP divides a gradient while it copies it; with any hook that is a pass of its own, as `HOOKED` shows."""
FIXED = ("none", "bf16", "int8", "int4")
TURN = 10
"""Steps of one way before the next takes its turn."""
LAST = 20
"""Steps whose mean training loss is shown: the last ones that all ways took."""
SETTLED = 50
"""By which step auto has chosen."""


class Way:
    """A copy of the model under one way of averaging its gradients, and how long its steps took."""

    def __init__(self, name: str, shape: Shape, batch: int, text: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.name, self.shape, self.batch, self.text = name, shape, batch, text
        self.model = DistributedDataParallel(GPT(shape))
        self.session: commpress.Session | None = None
        if name == HOOKED:
            self.model.register_comm_hook(None, allreduce_hook)
        elif name != PLAIN:
            self.session = commpress.attach(self.model, None if name == AUTO else name)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self.windows = data.generator(0, dist.get_rank())
        self.seconds: list[list[float]] = [[]]
        """Of the steps of each phase: the link is the same in all of it."""
        self.losses: list[float] = []

    def step(self) -> None:
        """One training step, timed."""
        x, y = data.sample(self.text, self.batch, self.shape.context, self.windows)
        started = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds[-1].append(time.perf_counter() - started)
        self.losses.append(loss.item())


def reshape(rate: str) -> None:
    """Give what this rank's host sends another rate from now on. Collective."""
    link = Link(hosts=dist.get_world_size(), rate=rate)
    dist.barrier()
    if dist.get_rank() % joining(dist.get_world_size())["ranks_per_host"] == 0:
        shape = ["root", "handle", "1:", "tbf", "rate", link.rate, "burst", str(link.burst), "latency", "100ms"]
        subprocess.run(["tc", "qdisc", "change", "dev", "eth0", *shape], check=True)
    dist.barrier()


def run(ways: list[Way], steps: int, switch: str | None, others: int) -> None:
    """All ways in turn. With `switch` the middle third runs on links of that rate. Collective.

    All ways but auto rest in some turns where each is to take but `others` steps of a phase.
    """
    rates = [None] if switch is None else [None, switch, joining(dist.get_world_size())["rate"]]
    turns = steps // len(rates) // TURN
    for way in ways:
        way.step()
        way.seconds[-1].clear()
    for rate in rates:
        if rate is not None:
            reshape(rate)
            for way in ways:
                way.seconds.append([])
        rest = max(1, turns * TURN // others)
        for turn in range(turns):
            for way in ways:
                if way.name == AUTO or turn % rest == rest - 1:
                    dist.barrier()
                    for _ in range(TURN):
                        way.step()


def rows(ways: list[Way]) -> list[dict[str, Any]]:
    """Of each way the medians of each phase, over all steps and over those once auto has settled, and the means."""
    auto = next(way for way in ways if way.name == AUTO)
    common = min(len(way.losses) for way in ways)  # all see the same windows: losses of equal steps compare
    found = []
    for way in ways:
        row: dict[str, Any] = {"name": way.name, "medians": [statistics.median(phase) for phase in way.seconds]}
        row["means"] = [statistics.fmean(phase) for phase in way.seconds]
        row["steps"] = [len(phase) for phase in way.seconds]
        row["settled"] = [
            statistics.median(phase[SETTLED * len(phase) // len(autos) :])
            for phase, autos in zip(way.seconds, auto.seconds, strict=True)
        ]
        row["loss"], row["loss_at"] = statistics.fmean(way.losses[max(0, common - LAST) : common]), common
        report = None if way.session is None else way.session.report()
        row["sent_bytes"] = None if report is None else report.sent_bytes / report.steps
        found.append(row)
    return found


def bounds(found: list[dict[str, Any]]) -> dict[str, float]:
    """What auto's whole run is of the better of plain DDP and bf16, and its steps, once settled, of the best fixed spec's."""
    by_name = {row["name"]: row for row in found}
    auto = by_name[AUTO]

    def whole(name: str) -> float:
        return sum(n * m for n, m in zip(auto["steps"], by_name[name]["means"], strict=True))

    best = [min(by_name[name]["settled"][phase] for name in (PLAIN, *FIXED)) for phase in range(len(auto["steps"]))]
    return {"whole": whole(AUTO) / min(whole(PLAIN), whole("bf16")), "settled": sum(auto["settled"]) / sum(best)}


def named(link: dict[str, Any]) -> str:
    """The link, as a title says it."""
    said = str(link["rate"])
    if link["delay"] != "0ms":
        said += f" with {link['delay']}"
    return said if link["switch"] is None else f"{said}, {link['switch']} in the middle third"


def show(record: dict[str, Any], explained: str, receipt: str) -> None:
    """Print the table, what auto has chosen, and the bounds."""
    link = record["link"]
    table = Table(
        title=f"{record['parameters'] / 1e6:.1f} M parameters, {record['world_size']} ranks, {named(link)}, "
        f"{record['steps']} steps, {record['machine']}"
    )
    at = record["rows"][0]["loss_at"]
    for name in ("", "steps", "mean, ms", "median, ms", "once settled", "MB a step", f"loss at {at}"):
        table.add_column(name, justify="right" if name else "left")
    for row in record["rows"]:
        mb = "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.2f}"
        times = (" | ".join(f"{seconds * 1e3:.1f}" for seconds in row[key]) for key in ("means", "medians", "settled"))
        table.add_row(row["name"], str(sum(row["steps"])), *times, mb, f"{row['loss']:.3f}")
    Console(width=132).print(table)
    print(f"{explained}\n{receipt}")
    of = record["bounds"]
    print(
        f"auto, all steps: {of['whole']:.3f} of the better of plain DDP and bf16; settled: {of['settled']:.3f} of the best"
    )


def main() -> None:
    """Measure, print the table on rank 0 and write the record."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=list(MODELS), default="wide")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--switch", metavar="RATE", help="the links' rate in the middle third, as 100mbit")
    options.add_argument(
        "--others", type=int, metavar="STEPS", help="of each other way in a third, or without --switch in all"
    )
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    least = 2 * SETTLED * (1 if chosen.switch is None else 3)
    if chosen.steps < least:
        options.error(f"--steps {chosen.steps}: expected at least {least}: auto takes up to {SETTLED} to choose")
    if chosen.others is not None and chosen.others < TURN:
        options.error(f"--others {chosen.others}: expected at least {TURN}, a turn")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shape, batch = MODELS[chosen.model]
    text = data.load(None).train
    ways = [Way(name, shape, batch, text) for name in (PLAIN, HOOKED, *FIXED, AUTO)]
    run(ways, chosen.steps, chosen.switch, chosen.others or chosen.steps)
    session = ways[-1].session
    assert session is not None
    found = rows(ways)
    if dist.get_rank() == 0:
        record = {
            "what": "auto",
            "link": {**joining(dist.get_world_size()), "switch": chosen.switch},
            **where(torch.device("cpu")),
            "world_size": dist.get_world_size(),
            "model": chosen.model,
            "parameters": sum(p.numel() for p in ways[0].model.parameters()),
            "steps": chosen.steps,
            "rows": found,
            "bounds": bounds(found),
            "receipt": session.receipt().to_dict(),
        }
        show(record, session.explain(), str(session.receipt()))
        if chosen.json:
            chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
