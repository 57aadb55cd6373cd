"""Ways to train one model that take turns: a step of each, timed and counted, and their table. For `sharded`, `pruned`."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from commpress.launch.lab import sent_by_kernel
from commpress.launch.run_record import machine

BATCH, WARM_UP = 2, 2
ALONE = "no communication"


class Way:
    """A model, its optimizer and its session, if it has one, and what its steps took."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, session: Any) -> None:
        self.model, self.optimizer, self.session = model, optimizer, session
        self.seconds: list[float] = []
        self.kernel: list[int] = []

    def step(self, tokens: torch.Tensor) -> None:
        """One training step, timed and counted."""
        dist.barrier()
        before, start = sent_by_kernel(), time.perf_counter()
        logits = self.model(tokens[:, :-1]).flatten(0, 1)
        nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.kernel.append(sent_by_kernel() - before)


def main(text: str, names: Mapping[str, Any], make: Callable[[str], Way], context: int, last_line: Any) -> None:
    """Run all ways, which `make` makes, print the table on rank 0, and what `last_line` says of its rows."""
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=7, help="steps of each way")
    options.add_argument("--json", type=Path, metavar="OUT")
    chosen = options.parse_args()
    if chosen.rounds < 1:
        options.error(f"--rounds {chosen.rounds}: expected at least 1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = {}
    for name in names:
        torch.manual_seed(0)
        ways[name] = make(name)
    tokens = torch.randint(256, (BATCH, context + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(WARM_UP + chosen.rounds):
        for way in ways.values():
            way.step(tokens)
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in ways[ALONE].model.parameters())
        rows = [row(name, way) for name, way in ways.items()]
        show(f"{parameters / 1e6:.1f} M parameters, {dist.get_world_size()} ranks, {chosen.rounds} steps", rows)
        print(last_line(rows))
        if chosen.json:
            about = {"parameters": parameters, "machine": machine(torch.device("cpu")), "torch": torch.__version__}
            chosen.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def row(name: str, way: Way) -> dict[str, Any]:
    """Medians of a way's steps."""
    report = way.session.report() if way.session else None
    return {
        "name": name,
        "seconds": statistics.median(way.seconds[WARM_UP:]),
        "kernel_bytes": statistics.median(way.kernel[WARM_UP:]),
        "sent_bytes": report.sent_bytes / report.steps if report else None,
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("", "seconds", "against none", "MB by kernel", "MB by report"):
        table.add_column(column, justify="right" if column else "left")
    for of in rows:
        reported = "" if of["sent_bytes"] is None else f"{of['sent_bytes'] / 1e6:.2f}"
        against = of["seconds"] / rows[0]["seconds"]
        table.add_row(
            of["name"], f"{of['seconds']:.3f}", f"{against:.2f}x", f"{of['kernel_bytes'] / 1e6:.2f}", reported
        )
    Console(width=120).print(table)
