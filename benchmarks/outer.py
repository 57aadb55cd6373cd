"""The cost in loss of local steps under a compressed outer optimizer, against data parallel training on as many tokens.

    torchrun --nproc-per-node 2 benchmarks/outer.py runs/outer [--only NAME ...]
    python -m commpress.launch.lab 2 10gbit -- python benchmarks/outer.py runs/outer        # bytes by kernel, too

The GPT and the text of `convergence.py`, AdamW inside, 6,000 steps. Each way gets the learning rate that is better of two
after 1,500 steps of seed 0; then three seeds for those that matter most and one for the rest. Each finished run is a file of
JSON in the folder, and is not run again. About an hour on 2 cores; `--show` prints what is there.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import convergence
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch import data
from commpress.launch.lab import sent_by_kernel

RATES, SEARCH, STEPS, SEEDS = (2e-3, 4e-3), 1500, 6000, (0, 1, 2)
OUTER = {"lr": 0.7, "momentum": 0.6}
DENSE = "DDP"


@dataclass(frozen=True)
class Way:
    """A row: a spec and the settings of `commpress.diloco`; without them, DDP."""

    name: str
    spec: str = "none"
    seeds: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


def diloco(spec: str, every: int, seeds: int = 1, **settings: Any) -> Way:
    """DiLoCo with a spec."""
    more = "".join(f", {key} {value}" for key, value in settings.items())
    return Way(f"DiLoCo {spec} every {every}{more}", spec, seeds, {"every": every, **OUTER, **settings})


WAYS = (
    Way(DENSE, seeds=3),
    diloco("topk(0.1)|sign", 100, 3),
    diloco("topk(0.1)|sign", 30, 3),
    diloco("sign", 30),
    diloco("topk(0.03)|int2", 30),
    diloco("sign", 100),
    diloco("topk(0.1)|sign", 100, fragments=4, delay=5),
    diloco("none", 30),
)


def train(way: Way, task: convergence.Text, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: its row. Collective."""
    torch.manual_seed(seed)
    model: nn.Module = task.model()
    windows = data.generator(seed, dist.get_rank())
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": convergence.DECAY}]
    groups += [{"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=convergence.BETAS, fused=True)
    outer, trained = None, model
    if way.settings:
        outer = session = commpress.diloco(model, optimizer, way.spec, **way.settings)
    else:
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
        session = commpress.attach(trained, way.spec)
    start, kernel = time.perf_counter(), sent_by_kernel()
    for done in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * convergence.share(done, steps)
        task.loss(trained, windows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), convergence.CLIP)
        optimizer.step()
        optimizer.zero_grad()
    if outer is not None:
        outer.sync()
    kernel = sent_by_kernel() - kernel
    report = session.report()
    return {
        **{"name": way.name, "rate": rate, "seed": seed, "of_steps": steps, "seconds": time.perf_counter() - start},
        **{"loss": [convergence.validate(task, model, optimizer)], "sent_bytes": report.sent_bytes},
        **{"dense_bytes": report.dense_bytes, "kernel_bytes": kernel, "torch": torch.__version__},
    }


def run_all(folder: Path, ways: list[Way]) -> None:
    """All runs that are not there yet. Collective."""
    task = convergence.Text()
    for way in ways:
        searched = [convergence.once(folder, way, task, rate, SEEDS[0], SEARCH, train) for rate in RATES]
        best = min(searched, key=lambda row: row["loss"][-1])["rate"]
        for seed in SEEDS[: way.seeds]:
            convergence.once(folder, way, task, best, seed, STEPS, train)


def show(folder: Path) -> None:
    """Print the table."""
    runs = convergence.rows_in(folder)
    table = Table(
        title=f"{STEPS} steps, 2 ranks", caption="fewer: bytes of fp32 DDP on as many tokens, over those sent"
    )
    for name in ("", "rate", "seeds", "held-out loss", "spread", "against DDP", "MB sent", "fewer", "kernel"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    dense = None
    for way in WAYS:
        final = [run for run in runs if run["name"] == way.name and run["of_steps"] == STEPS]
        if not final:
            continue
        losses, one = [run["loss"][-1] for run in final], final[0]
        loss = statistics.mean(losses)
        dense = loss if way.name == DENSE else dense
        table.add_row(
            *(way.name, f"{one['rate']:g}", str(len(final)), f"{loss:.4f}"),
            f"{min(losses):.3f}-{max(losses):.3f}" if len(final) > 1 else "",
            "" if dense is None else f"{loss / dense - 1:+.2%}",
            *(f"{one['sent_bytes'] / 1e6:.3f}", f"{one['dense_bytes'] / one['sent_bytes']:.1f}"),
            f"{one['kernel_bytes'] / one['sent_bytes']:.3f}" if one["kernel_bytes"] else "",
        )
    Console(width=150).print(table)


def main() -> None:
    """Run what is missing and print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where each finished run is a file")
    options.add_argument("--only", nargs="+", metavar="NAME", help="rows to run, by the names in the table")
    options.add_argument("--show", action="store_true", help="run nothing")
    chosen = options.parse_args()
    if chosen.only and (unknown := set(chosen.only) - {way.name for way in WAYS}):
        options.error(f"no row {sorted(unknown)[0]!r}; there are {', '.join(way.name for way in WAYS)}")
    rank = 0
    if not chosen.show:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        chosen.folder.mkdir(parents=True, exist_ok=True)
        run_all(chosen.folder, [way for way in WAYS if not chosen.only or way.name in chosen.only])
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        show(chosen.folder)


if __name__ == "__main__":
    main()
