"""Whether norms and biases should be sent exactly: the same training with all gradients coded, and with those left out.

    torchrun --nproc-per-node 2 benchmarks/exact_small.py runs/exact-small [SPEC ...] [--steps N] [--seeds N]

The byte-level GPT of `convergence.py` by AdamW, and its net on digits by SGD with momentum. "exact" sends all parameters with
fewer than two dimensions by `none`, through patterns, and the others by the spec; "coded" sends all by the spec. Each finished
run is a file of JSON in the folder, and is not run again.
"""

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from convergence import Way, once, rows_in, train
from convergence_tasks import Digits, Text
from rich.console import Console
from rich.table import Table
from torch import nn

SPECS = ("int4", "int2", "sign", "topk(0.01)|int4")
RATES = {"GPT": 1.5e-3, "digits": 0.03}
OPTIMIZERS = {"GPT": "AdamW", "digits": "SGD"}
EXACT, CODED = "exact", "coded"


def small(model: nn.Module) -> dict[str, int]:
    """Return the parameters with fewer than two dimensions, and their numbers of values."""
    return {name: p.numel() for name, p in model.named_parameters() if p.dim() < 2}


def ways(task: str, specs: list[str], vectors: list[str]) -> list[Way]:
    """Return the rows of a task: dense, and two a spec."""
    rows = [Way(f"{task} none", task, OPTIMIZERS[task])]
    for spec in specs:
        patterns: dict[str, str] = {**dict.fromkeys(vectors, "none"), "*": spec}
        rows.append(Way(f"{task} {spec} {CODED}", task, OPTIMIZERS[task], spec))
        rows.append(Way(f"{task} {spec} {EXACT}", task, OPTIMIZERS[task], patterns))
    return rows


def show(folder: Path, steps: int, shares: dict[str, str]) -> None:
    """Print a table a task."""
    runs = [run for run in rows_in(folder) if run["of_steps"] == steps]
    for task, about in shares.items():
        names = list(dict.fromkeys(run["name"] for run in runs if run["task"] == task))
        table = Table(title=f"{task}: {steps} steps, 2 ranks, {OPTIMIZERS[task]} at {RATES[task]:g}", caption=about)
        for name in ("", "held-out loss", "seeds", "kB a step"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for name in names:
            mine = [run for run in runs if run["name"] == name]
            losses = [run["loss"][-1] for run in mine]
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            table.add_row(
                name, f"{statistics.mean(losses):.4f}", each, f"{mine[0]['sent_bytes'][-1] / steps / 1e3:.2f}"
            )
        Console(width=120).print(table)


def main() -> None:
    """Run what is missing and print the tables on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where each finished run is a file")
    options.add_argument("specs", nargs="*", metavar="SPEC", default=list(SPECS))
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--task", choices=sorted(RATES), help="only this one")
    chosen = options.parse_args()
    warnings.filterwarnings("ignore", message="commpress: ")  # that a row is there to be worse is known
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    shares = {}
    for task in RATES if chosen.task is None else [chosen.task]:
        made: Any = Text() if task == "GPT" else Digits()
        model = made.model()
        vectors, values = small(model), sum(p.numel() for p in model.parameters())
        n = sum(vectors.values())
        shares[task] = f"{len(vectors)} norms and biases hold {n:,} of {values:,} values, {n / values:.2%}"
        for way in ways(task, chosen.specs, list(vectors)):
            for seed in range(chosen.seeds):
                once(chosen.folder, way, made, RATES[task], seed, chosen.steps, train)
    dist.barrier()
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        show(chosen.folder, chosen.steps, shares)


if __name__ == "__main__":
    main()
