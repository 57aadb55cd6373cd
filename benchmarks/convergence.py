"""The cost of compression in loss: the same training by each way of compressing it, against the bytes that it sent.

    torchrun --nproc-per-node 2 benchmarks/convergence.py runs/convergence [--only NAME ...] [--picture OUT.svg]
    python -m commpress.launch.lab 2 10gbit -- python benchmarks/convergence.py runs/convergence        # bytes by kernel, too

A byte-level GPT of 0.9 M parameters on the standard library's source, by AdamW or Muon, and a convolutional net on
scikit-learn's digits (8 x 8 pixels: small), by SGD with momentum. Each way gets the learning rate that is best of four after
500 steps of seed 0 (those of Muon that of exact Muon); then 1,500 steps, three seeds for those that matter most and one for the
rest. Each finished run is a file of JSON in the folder, and is not run again: stop it when you like. An hour and a half on 2
cores; `--show` prints what is there.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from convergence_tasks import Digits, Text
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.comm.meter import Report
from commpress.launch import data
from commpress.launch.lab import sent_by_kernel
from commpress.launch.run_record import where
from commpress.optim import DGC, CompressedOptimizer, EF21Muon, OneBitAdamW, ZeroOneAdamW
from commpress.optim.muon_groups import groups as muon_groups

BETAS, DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
SEARCH, STEPS = 500, 1500
SEEDS = (0, 1, 2)
RISE, FINAL = 0.05, 0.1
"""The rate rises for this share of the steps, and falls by a cosine to this share of the highest."""
WARM_UP = 2 / 15
"""The share of the steps in which the compressed optimizers warm up."""
WARM_UP_SPEC = "int4"
EVERY = 100
"""Steps between two validations."""
RATES = {"GPT": (3.5e-4, 7e-4, 1.5e-3, 3e-3), "digits": (0.01, 0.03, 0.1, 0.3)}
MUON_RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
WORST = 1.04
"""Losses above that many times AdamW's are told at the picture's edge: they would flatten all others."""
DENSE = {"GPT": "AdamW", "digits": "SGD"}


@dataclass(frozen=True)
class Way:
    """A row of the table: how a task is trained. `options` are those of its optimizer."""

    name: str
    task: str
    optimizer: str
    spec: str | dict[str, str] | None = None
    seeds: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def zero_one(spec: str, every: int, seeds: int = 1, **options: Any) -> Way:
    """ZeroOneAdamW with a spec."""
    name = f"ZeroOneAdamW {spec} every {every}"
    return Way(name, "GPT", "ZeroOneAdamW", spec, seeds, {"sync_every": every, **options})


def muon(spec: str, seeds: int = 1, others: str = "int4") -> Way:
    """EF21Muon with a spec; the gradients of its other parameters, which are AdamW's, are sent by `others`."""
    return Way(f"EF21Muon {spec}", "GPT", "EF21Muon", spec, seeds, {"others_spec": others})


MUON_DENSE = muon("none", 3, others="none")
"""All rows of Muon have the rate that is best for this one."""
WAYS = (
    Way("AdamW", "GPT", "AdamW", seeds=3),
    Way("OneBitAdamW sign", "GPT", "OneBitAdamW", "sign", 3),
    zero_one("sign", 4, 3),
    Way("OneBitAdamW topk(0.1)|sign", "GPT", "OneBitAdamW", "topk(0.1)|sign", 3),
    zero_one("topk(0.1)|sign", 4, 3),
    Way("AdamW, int4 gradients", "GPT", "AdamW", "int4", 3),
    Way("AdamW, int8 gradients", "GPT", "AdamW", "int8"),
    Way("AdamW, topk(0.01)|int4 gradients", "GPT", "AdamW", "topk(0.01)|int4"),
    Way("AdamW, powersgd(4) gradients", "GPT", "AdamW", "powersgd(4)"),
    zero_one("sign", 8, 3),
    zero_one("topk(0.1)|sign", 8, 3),
    zero_one("topk(0.03)|sign", 8),
    MUON_DENSE,
    muon("int8"),
    muon("int4", 3),
    muon("int2", 3),
    muon("sign", 3),
    muon("rotate|int2", 3),
    muon("rotate|sign", 3, others="rotate|int2"),
    muon("topk(0.1)|sign"),
    Way("SGD", "digits", "SGD", seeds=3),
    Way("SGD, topk(0.01) gradients", "digits", "SGD", "topk(0.01)", 3),
    Way("DGC topk(0.01)", "digits", "DGC", "topk(0.01)", 3),
    Way("SGD, topk(0.001) gradients", "digits", "SGD", "topk(0.001)", 3),
    Way("SGD, topk(0.25->0.001, 200) gradients", "digits", "SGD", "topk(0.25->0.001, 200)", 3),
    Way("DGC topk(0.001)", "digits", "DGC", "topk(0.001)", 3),
)


def optimizer_of(way: Way, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    """The optimizer of a way, at any rate."""
    warm_up = round(WARM_UP * steps)
    if way.task == "digits":
        parameters = list(model.parameters())
        if way.optimizer == "DGC":
            return DGC(parameters, lr=1.0, momentum=0.9, weight_decay=1e-4, warmup_steps=warm_up, **way.options)
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=1e-4)
    if way.optimizer == "EF21Muon":
        groups = muon_groups(model)
        vectors = [p for p in groups[1]["params"] if p.dim() <= 1]
        groups[1]["params"] = [p for p in groups[1]["params"] if p.dim() > 1]
        groups.append({"params": vectors, "muon": False, "weight_decay": 0.0})
        return EF21Muon(groups, lr=1.0, betas=BETAS, weight_decay=DECAY, **way.options)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    if way.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=1.0, betas=BETAS, fused=True)
    kind: Callable[..., torch.optim.Optimizer] = {"OneBitAdamW": OneBitAdamW, "ZeroOneAdamW": ZeroOneAdamW}[
        way.optimizer
    ]
    options = {"warmup_steps": warm_up, "warmup_spec": WARM_UP_SPEC, **way.options}
    return kind(groups, lr=1.0, betas=BETAS, **options)


def train(way: Way, task: Text | Digits, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: its row. Collective."""
    torch.manual_seed(seed)
    ddp = DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    windows = data.generator(seed, dist.get_rank())
    optimizer = optimizer_of(way, ddp, steps)
    behind = optimizer if isinstance(optimizer, CompressedOptimizer) else None
    session = commpress.attach(ddp, way.spec or "none", optimizer=behind)
    row: dict[str, list[Any]] = {"steps": [], "loss": [], "sent_bytes": [], "kernel_bytes": []}
    start, kernel, before = time.perf_counter(), 0, sent_by_kernel()
    for done in range(steps + 1):
        if done % EVERY == 0 or done == steps or done == round(WARM_UP * steps):
            kernel += sent_by_kernel() - before
            loss = validate(task, ddp.module, optimizer)
            sent = between_nodes(session.report())
            for key, value in (("steps", done), ("loss", loss), ("sent_bytes", sent), ("kernel_bytes", kernel)):
                row[key].append(value)
            before = sent_by_kernel()
            if not math.isfinite(loss):
                break
        if done == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * share(done, steps)
        task.loss(ddp, windows).backward()
        if behind is None or behind.takes_means:
            nn.utils.clip_grad_norm_(ddp.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    values = sum(p.numel() for p in ddp.parameters())
    dense = 2 * (dist.get_world_size() - 1) * 4 * values // dist.get_world_size()
    return {
        **{"name": way.name, "task": way.task, "rate": rate, "seed": seed, "of_steps": steps, "parameters": values},
        **{"dense_bytes_a_step": dense, "seconds": time.perf_counter() - start, **row},
        **{**where(torch.device("cpu")), "torch": torch.__version__},
    }


def between_nodes(report: Report) -> int:
    """Bytes sent, without the updates that ranks of one node make for each other: the table is of hosts of one rank."""
    return report.sent_bytes - report.inside_bytes


@torch.no_grad()
def validate(task: Text | Digits, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The held-out loss, the mean over the ranks. Collective."""
    model.eval()
    if isinstance(optimizer, ZeroOneAdamW):
        with optimizer.synced():
            loss = task.held_out(model)
    else:
        loss = task.held_out(model)
    model.train()
    return mean_over_ranks(loss)


def mean_over_ranks(loss: float) -> float:
    """The mean of the ranks' losses. Collective."""
    together = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(together)
    return together.item() / dist.get_world_size()


def share(step: int, steps: int) -> float:
    """Return the share of the highest rate, for the update after `step` updates."""
    rise = RISE * steps
    part = max(0.0, step - rise) / (steps - rise)
    return min(1.0, (step + 1) / rise) * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * part)))


def run_all(folder: Path, ways: Sequence[Way]) -> None:
    """All runs that are not there yet. Collective."""
    tasks: dict[str, Text | Digits] = {}
    for way in ways:
        task = tasks.get(way.task) or tasks.setdefault(way.task, Text() if way.task == "GPT" else Digits())
        muon_way = way.optimizer == "EF21Muon"
        rates, like = (MUON_RATES, MUON_DENSE) if muon_way else (RATES[way.task], way)
        searched = [once(folder, like, task, rate, SEEDS[0], SEARCH) for rate in rates]
        best = min(searched, key=lambda row: (not math.isfinite(row["loss"][-1]), row["loss"][-1]))["rate"]
        for seed in SEEDS[: way.seeds]:
            once(folder, way, task, best, seed, STEPS)


def once(
    folder: Path,
    way: Any,
    task: Text | Digits,
    rate: float,
    seed: int,
    steps: int,
    train: Callable[..., dict[str, Any]] = train,
) -> dict[str, Any]:
    """A run's row: from its file, or trained now and written to it. Rank 0 says whether it is there."""
    path = folder / f"{stem(way.name, rate, seed, steps)}.json"
    found: list[Any] = [json.loads(path.read_text()) if dist.get_rank() == 0 and path.exists() else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        return dict(found[0])
    row = train(way, task, rate, seed, steps)
    if dist.get_rank() == 0:
        path.with_suffix(".tmp").write_text(json.dumps(row) + "\n")
        path.with_suffix(".tmp").rename(path)
        print(
            f"{way.name}: {steps} steps at {rate:g}, seed {seed}: {row['loss'][-1]:.4f}, {row['seconds']:.0f} s",
            flush=True,
        )
    return row


def stem(name: str, rate: float, seed: int, steps: int) -> str:
    """Return the name of a run's file, without its suffix."""
    letters = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    return f"{letters}_{rate:g}_{seed}_{steps}"


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """All finished runs."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def summary(folder: Path) -> list[dict[str, Any]]:
    """A row a way that has final runs: mean loss, spread, bytes, and the ratio of dense bytes to them."""
    runs = rows_in(folder)
    rows = []
    for way in WAYS:
        final = [run for run in runs if run["name"] == way.name and run["of_steps"] == STEPS]
        if not final:
            continue
        losses = [run["loss"][-1] for run in final]
        one = final[0]
        dense, sent = one["dense_bytes_a_step"] * STEPS, one["sent_bytes"][-1]
        warm = one["steps"].index(round(WARM_UP * STEPS))
        after = (sent - one["sent_bytes"][warm]) / (STEPS - one["steps"][warm])
        rows.append(
            {
                **{"name": way.name, "task": way.task, "rate": one["rate"], "seeds": len(final)},
                **{"loss": statistics.mean(losses), "least": min(losses), "most": max(losses)},
                **{"sent_bytes": sent, "ratio": dense / sent, "ratio_after": one["dense_bytes_a_step"] / after},
                "kernel": one["kernel_bytes"][-1] / sent if one["kernel_bytes"][-1] else None,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    for task in DENSE:
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        dense = next((row["loss"] for row in mine if row["name"] == DENSE[task]), None)
        table = Table(
            title=f"{task}: {STEPS} steps, 2 ranks",
            caption="fewer: dense bytes over those sent, in all and after the warm-up",
        )
        for name in (
            "",
            "rate",
            "seeds",
            "held-out loss",
            "spread",
            "against dense",
            "MB sent",
            "fewer",
            "after",
            "kernel",
        ):
            table.add_column(name, justify="right" if name else "left", no_wrap=not name)
        for row in mine:
            against = "" if dense is None else f"{row['loss'] / dense - 1:+.2%}"
            kernel = "" if row["kernel"] is None else f"{row['kernel']:.3f}"
            spread = f"{row['least']:.3f}-{row['most']:.3f}" if row["seeds"] > 1 else ""
            figures = (f"{row['loss']:.4f}", spread, against, f"{row['sent_bytes'] / 1e6:.2f}")
            ratios = (f"{row['ratio']:.1f}", f"{row['ratio_after']:.1f}")
            table.add_row(row["name"], f"{row['rate']:g}", str(row["seeds"]), *figures, *ratios, kernel)
        Console(width=150).print(table)


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The GPT's losses, a line a way, beside how many times fewer bytes were sent, as an SVG."""
    import labels
    from matplotlib import pyplot

    mine = sorted((row for row in rows if row["task"] == "GPT"), key=lambda row: row["ratio_after"])
    dense = next(row for row in mine if row["name"] == DENSE["GPT"])
    edge = WORST * dense["loss"]
    figure, axes = pyplot.subplots(figsize=(6.4, 1.6 + 0.26 * len(mine)))
    figure.subplots_adjust(left=0.42, right=0.87, top=0.84)
    axes.axvspan(dense["least"], dense["most"], color="0.9")
    least = min(row["least"] for row in mine)
    axes.set(
        xlabel="held-out loss, lower is better", xlim=(least - 0.1 * (edge - least), edge), ylim=(len(mine) - 0.4, -0.6)
    )
    for at, row in enumerate(mine):
        color = labels.BLUE if "One" in row["name"] else labels.GREY
        if row["loss"] > edge:
            axes.plot(edge, at, ">", color=color, clip_on=False)
            axes.annotate(
                f"{row['loss']:.2f}", (edge, at), (-8, 0), textcoords="offset points", ha="right", va="center"
            )
        else:
            bars = [[row["loss"] - row["least"]], [row["most"] - row["loss"]]]
            axes.errorbar(row["loss"], at, xerr=bars, fmt="o", color=color, capsize=3, markersize=6)
        axes.text(1.24, at, f"{row['ratio_after']:.0f}x", transform=axes.get_yaxis_transform(), ha="right", va="center")
    axes.text(1.24, 1.0, "fewer bytes", transform=axes.transAxes, ha="right", va="bottom", fontsize=9)
    axes.set_yticks(range(len(mine)), [row["name"] for row in mine])
    axes.tick_params(axis="y", length=0)
    best = max((row for row in mine if row["loss"] <= 1.01 * dense["loss"]), key=lambda row: row["ratio_after"])
    title = f"{best['name']}: {best['ratio_after']:.0f}x fewer bytes, loss {best['loss'] / dense['loss'] - 1:+.1%}"
    figure.suptitle(title, x=-0.08, y=0.99, ha="left", fontsize=12, fontweight="bold")
    about = "GPT; bytes after the warm-up, against AdamW's; bars and the grey band: least and most of the seeds"
    figure.text(-0.08, 0.915, about, fontsize=9)
    labels.save(figure, out)


def main() -> None:
    """Run what is missing and print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where each finished run is a file")
    options.add_argument("--only", nargs="+", metavar="NAME", help="rows to run, by the names in the table")
    options.add_argument("--show", action="store_true", help="run nothing")
    options.add_argument("--picture", type=Path, metavar="OUT.svg")
    chosen = options.parse_args()
    if chosen.only and (unknown := set(chosen.only) - {way.name for way in WAYS}):
        options.error(f"no row {sorted(unknown)[0]!r}; there are {', '.join(way.name for way in WAYS)}")
    rank = 0
    if not chosen.show:
        warnings.filterwarnings("ignore", message="commpress: ")  # that a row is there to be worse is known
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        chosen.folder.mkdir(parents=True, exist_ok=True)
        run_all(chosen.folder, [way for way in WAYS if not chosen.only or way.name in chosen.only])
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        rows = summary(chosen.folder)
        show(rows)
        if chosen.picture:
            draw(rows, chosen.picture)


if __name__ == "__main__":
    main()
