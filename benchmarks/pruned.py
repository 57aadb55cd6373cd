"""Step time and bytes of a pruned model's gradients: packed and coded, against whole ones, the ways taking turns.

python -m commpress.launch.lab 2 1gbit -- python benchmarks/pruned.py [--rounds 7] [--json OUT]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch.lab import sent_by_kernel
from commpress.launch.model import GPT, Shape
from commpress.launch.train import machine
from commpress.model.importance import Magnitude
from commpress.model.masks import Masks
from commpress.model.pruning import by_amount

SHAPE, BATCH, WARM_UP = Shape(layers=5, width=528, heads=8, context=64), 2, 2
ALONE, PLAIN = "no communication", "plain DDP"
WAYS: dict[str, tuple[str, float]] = {
    ALONE: ("", 0.0),
    PLAIN: ("", 0.0),
    "none, 80 % pruned": ("none", 0.8),
    "none, 90 % pruned": ("none", 0.9),
    "int4": ("int4", 0.0),
    "int4, 80 % pruned": ("int4", 0.8),
    "int4, 90 % pruned": ("int4", 0.9),
    "sign, 80 % pruned": ("sign", 0.8),
}
"""Spec of the gradients, and the share of the Linear layers' weights that is pruned."""


class Trained:
    """A way's model, optimizer and session, and what its steps took."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        bare = GPT(SHAPE)
        spec, amount = WAYS[name]
        self.model: nn.Module = bare if name == ALONE else DistributedDataParallel(bare, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(bare.parameters(), lr=0.01)
        self.session = commpress.attach(self.model, spec) if spec else None
        if amount:
            parameters = {
                f"{name}.weight": module.weight
                for name, module in bare.named_modules()
                if isinstance(module, nn.Linear)
            }
            masks = Masks(dict(bare.named_parameters()))
            masks.replace(by_amount(Magnitude(bare, parameters).scores(), amount))
            self.session.keep(masks.of)
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
            report = way.session.report() if way.session else None
            rows.append(
                {
                    "name": name,
                    "seconds": statistics.median(way.seconds[WARM_UP:]),
                    "kernel_bytes": statistics.median(way.kernel[WARM_UP:]),
                    "sent_bytes": report.sent_bytes / report.steps if report else None,
                }
            )
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
        fewest = {row["name"]: row["kernel_bytes"] for row in rows}
        print(f"90 % pruned, without a codec: {fewest[PLAIN] / fewest['none, 90 % pruned']:.1f} times fewer bytes")
        if chosen.json:
            about = {"parameters": parameters, "machine": machine(torch.device("cpu")), "torch": torch.__version__}
            chosen.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
