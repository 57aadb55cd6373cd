"""A model that comes out small in one run: pruned, with int8 weights, distilled, its traffic compressed; against dense.

python -m commpress.launch.lab 2 10gbit -- python benchmarks/small.py FOLDER [--seeds 0 1 2]

Stopped, it goes on where it was. Each run's folder has its record, and the bytes that the kernel counted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from commpress.launch import checkpoint, train
from commpress.launch.lab import sent_by_kernel

MODEL = {"layers": 4, "width": 256, "heads": 4, "context": 64, "batch": 4, "threads": 1}
TRAINING = {
    "steps": 2000,
    "warmup_steps": 100,
    "lr": 2e-3,
    "eval_every": 500,
    "eval_batches": 64,
    "checkpoint_every": 500,
}
DENSE = {"compress": "none"}
BY_RECIPE = {"optimizer": "OneBitAdamW", "optimizer_warmup": 100, "warmup_compress": "int4"}
RECIPE = """
[[prune]]                 # the weights of all Linear layers
start = 200
end = 1200
every = 50
amount = 0.8

[[quantize]]              # those, and the embeddings
start = 1500
bits = 8

[traffic]
spec = "sign"
"""
TAUGHT = """
[distil]                  # from the dense run of the same seed
teacher = "{teacher}"
weight = 0.5
"""
ALONE = "the same, no teacher"


def run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, or go on, or read what was done. Collective."""
    counted = folder / "kernel.json"
    if not counted.exists():
        before, started = sent_by_kernel(), checkpoint.exists(folder)
        train.train(train.Settings(**MODEL, **TRAINING, **settings, out=folder, resume=started))
        if dist.get_rank() == 0:
            # of a run that was stopped, the kernel counted the last part alone
            counted.write_text(json.dumps(None if started else sent_by_kernel() - before) + "\n")
        dist.barrier()
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return {**record, "kernel_bytes": json.loads(counted.read_text())}


def main() -> None:
    """Run both for each seed and print the tables on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = options.parse_args()
    dist.init_process_group("gloo")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {"dense": [], "by recipe": [], ALONE: []}
    for seed in chosen.seeds:
        teacher = chosen.folder / f"dense-{seed}"
        runs["dense"].append(run(teacher, {**DENSE, "seed": seed}))
        for name, recipe in (("by recipe", RECIPE + TAUGHT.format(teacher=teacher)), (ALONE, RECIPE)):
            if name == ALONE and seed != chosen.seeds[0]:
                continue
            folder = chosen.folder / f"{'small' if name == 'by recipe' else 'alone'}-{seed}"
            file = folder.with_suffix(".toml")
            if dist.get_rank() == 0:
                file.write_text(recipe)
            dist.barrier()
            runs[name].append(run(folder, {**BY_RECIPE, "seed": seed, "recipe": file, "compress": "sign"}))
    if dist.get_rank() == 0:
        show(runs)
    dist.barrier()
    dist.destroy_process_group()


def show(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The tables, and how much was lost and won."""
    one = runs["dense"][0]
    console = Console(width=128)
    table = Table(
        title=f"{one['parameters'] / 1e6:.1f} M parameters, {one['world_size']} ranks, {one['steps_done']} steps"
    )
    for name in ("", "held-out loss", "of the file", "MB sent", "by kernel", "fewer", "MB model", "smaller"):
        table.add_column(name, justify="right" if name else "left")
    dense = mean([of["final_validation_loss"] for of in runs["dense"]])
    for name, of_seeds in runs.items():
        losses = [of["final_validation_loss"] for of in of_seeds]
        small = [of["small_model"] for of in of_seeds if of["small_model"]]
        kernel = [of["kernel_bytes"] for of in of_seeds if of["kernel_bytes"]]
        table.add_row(
            name,
            f"{mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            f"{mean([each['validation_loss'] for each in small]):.3f}" if small else "",
            f"{mean([of['traffic']['sent_bytes'] for of in of_seeds]) / 1e6:.1f}",
            f"{mean(kernel) / 1e6:.1f}" if kernel else "",
            f"{mean([of['traffic']['ratio'] for of in of_seeds]):.1f}x",
            f"{mean([each['bytes'] for each in small]) / 1e6 if small else 4 * one['parameters'] / 1e6:.2f}",
            f"{mean([each['times_smaller'] for each in small]):.1f}x" if small else "1.0x",
        )
    console.print(table)
    phases = Table(title="by phase, the first seed")
    for name in ("phase", "steps", "MB a step", "fewer"):
        phases.add_column(name, justify="left" if name == "phase" else "right")
    for name, of in runs["by recipe"][0]["report"]["phases"].items():
        sent = of["sent_bytes"]
        phases.add_row(name, str(of["steps"]), f"{sent / of['steps'] / 1e6:.3f}", f"{of['dense_bytes'] / sent:.1f}x")
    console.print(phases)
    last = runs["by recipe"]
    lost = mean([of["small_model"]["validation_loss"] for of in last]) / dense - 1
    print(
        f"{lost:+.1%} loss, {mean([of['traffic']['ratio'] for of in last]):.0f} times fewer bytes, "
        f"a file {mean([of['small_model']['times_smaller'] for of in last]):.1f} times smaller"
    )


def mean(values: list[float]) -> float:
    """Return the mean of some numbers."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
