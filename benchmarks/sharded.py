"""Step time of FSDP2 with and without compression, against no communication, the ways taking turns.

python -m commpress.launch.lab 2 1gbit -- python benchmarks/sharded.py [--rounds 7] [--json OUT]
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import fully_shard

import commpress
from commpress.launch.lab import sent_by_kernel
from commpress.launch.model import GPT, Shape
from commpress.launch.train import machine

SHAPE, BATCH, WARM_UP = Shape(layers=5, width=512, heads=8, context=64), 2, 2
ALONE, PLAIN = "no communication", "FSDP2"
WAYS: dict[str, tuple[str, str] | None] = {
    ALONE: None,
    PLAIN: None,
    "gradients int8, parameters int8": ("int8", "int8"),
    "gradients int4, parameters int8": ("int4", "int8"),
    "gradients int4, parameters int4": ("int4", "int4"),
    "the same, forward prefetch": ("int4", "int4"),
}


class Trained:
    """A way's model, optimizer and session, and what its steps took."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = GPT(SHAPE)
        if name != ALONE:
            blocks = [fully_shard(block) for block in self.model.blocks]
            root = fully_shard(self.model)
            if "prefetch" in name:
                for module, following in itertools.pairwise([root, *blocks]):
                    module.set_modules_to_forward_prefetch([following])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        spec = WAYS[name]
        self.session = commpress.attach(self.model, gradients=spec[0], parameters=spec[1]) if spec else None
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


def main() -> None:
    """Run all ways and print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=7, help="steps of each way")
    options.add_argument("--json", type=Path, metavar="OUT")
    chosen = options.parse_args()
    if chosen.rounds < 1:
        options.error(f"--rounds {chosen.rounds}: expected at least 1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = {name: Trained(name) for name in WAYS}
    tokens = torch.randint(256, (BATCH, SHAPE.context + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(WARM_UP + chosen.rounds):
        for way in ways.values():
            way.step(tokens)
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in ways[ALONE].model.parameters())
        floor = statistics.median(ways[ALONE].seconds[WARM_UP:])
        rows = []
        for name, way in ways.items():
            seconds = statistics.median(way.seconds[WARM_UP:])
            report = way.session.report() if way.session else None
            sent = report.sent_bytes / report.steps if report else None
            kernel = statistics.median(way.kernel[WARM_UP:])
            rows.append({"name": name, "seconds": seconds, "kernel_bytes": kernel, "sent_bytes": sent})
        table = Table(
            title=f"{parameters / 1e6:.1f} M parameters, {dist.get_world_size()} ranks, {chosen.rounds} steps"
        )
        for column in ("", "seconds", "against none", "MB by kernel", "MB by report"):
            table.add_column(column, justify="right" if column else "left")
        for row in rows:
            reported = "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.2f}"
            figures = (f"{row['seconds']:.3f}", f"{row['seconds'] / floor:.2f}x", f"{row['kernel_bytes'] / 1e6:.2f}")
            table.add_row(row["name"], *figures, reported)
        Console(width=120).print(table)
        best = min(rows[2:], key=lambda row: row["seconds"])
        print(f"{best['name']}: {rows[1]['seconds'] / best['seconds']:.1f} times as fast as FSDP2")
        if chosen.json:
            about = {"parameters": parameters, "machine": machine(torch.device("cpu")), "torch": torch.__version__}
            chosen.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
