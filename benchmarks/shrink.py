"""Models that come out small, against those that were trained densely: loss, file, latency and traffic, a row a seed.

    python benchmarks/shrink.py runs/shrink [--seeds 3] [--steps 1500]

Two runs of `commpress train` on two ranks, 3.3 M parameters, the source of Python's standard library: AdamW with exact traffic,
and ZeroOneAdamW by `sign` every 4 steps under a recipe that prunes 70 % of all matrices' weights and rounds weights and inputs
to int8. Both train as long; there is no teacher. `commpress judge` measures both in eager torch and in onnxruntime. A run that
is there is not trained again. A quarter of an hour a seed on 2 cores.

And the digits of examples/shrink.py by `commpress shrink` on two ranks, a minute: 0.14 MB of model.onnx, int8, amounts by
what each layer bears, gradients as `topk(0.01)|int4`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from examples import shrink  # noqa: E402  of this folder

SHAPE = ("--layers", "4", "--width", "256", "--heads", "4", "--context", "64", "--batch", "4")
RATE = ("--lr", "1.5e-3", "--eval-every", "250", "--eval-batches", "64")
WARM_UP = 0.05, 0.087
"""Shares of the steps: until the rate is at its highest; until ZeroOneAdamW compresses fully."""
PRUNED, INT8 = (0.13, 0.53), 0.6
"""From when to when weights are pruned, and from when on all are of 8 bits; shares of the steps."""
RECIPE = """
[[prune]]
start = {start}
end = {end}
every = {every}
amount = 0.7

[[quantize]]
start = {int8}
activations = "static"
layers = ["blocks.*", "head"]

[[quantize]]
start = {int8}
layers = ["tokens", "positions"]
"""


def train(out: Path, steps: int, seed: int, *more: str) -> dict[str, Any]:
    """Return the record of a run on two ranks; one that is there is not trained again. Raises CalledProcessError."""
    if not (out / "record.json").exists():
        rise = ("--steps", str(steps), "--warmup-steps", str(round(WARM_UP[0] * steps)), "--seed", str(seed))
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        command = (*torchrun, "-m", "commpress.launch.train", *SHAPE, *RATE, *rise, "--out", str(out), *more)
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    return record


def both(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train dense and small, judge them, and return a row."""
    recipe = folder / "recipe.toml"
    start, end = (round(share * steps) for share in PRUNED)
    recipe.write_text(RECIPE.format(start=start, end=end, every=max(1, (end - start) // 12), int8=round(INT8 * steps)))
    dense, small, out = (folder / f"{name}-{seed}" for name in ("dense", "small", "judged"))
    train(dense, steps, seed, "--optimizer", "AdamW", "--compress", "none")
    warm = ("--optimizer-warmup", str(round(WARM_UP[1] * steps)), "--warmup-compress", "int4", "--sync-every", "4")
    by = ("--optimizer", "ZeroOneAdamW", "--compress", "sign", *warm, "--recipe", str(recipe))
    report = train(small, steps, seed, *by)["report"]
    if not (out / "judgement.json").exists():
        judge = (sys.executable, "-m", "commpress.launch.cli", "judge", str(dense), str(small), "--out", str(out))
        subprocess.run((*judge, "--runtimes", "torch", "onnxruntime"), check=True)
    judged = json.loads((out / "judgement.json").read_text())
    return {"seed": seed, "traffic": report["dense_bytes"] / report["sent_bytes"], **figures(judged)}


def digits() -> nn.Module:
    """The dense network of digits, by the seed in the environment."""
    return shrink.trained(int(os.environ["DIGITS_SEED"]))


def digits_row(folder: Path, seed: int) -> dict[str, Any]:
    """Shrink the network of digits on two ranks, and return a row."""
    out = folder / f"digits-{seed}"
    if not (out / "judgement.json").exists():
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        task = ("--model", "benchmarks.shrink:digits", "--data", "examples.shrink:batches")
        # by --max-ms integers with kernels come first, so that 4 bits do not make it slow; any machine has a ms
        limits = ("--max-mb", "0.14", "--max-ms", "1", "--max-loss", "30%", "--steps", "200", "--lr", "3e-4")
        command = (*torchrun, "-m", "commpress.launch.shrink", *task, *limits, "--compress", "topk(0.01)|int4")
        given = {"OMP_NUM_THREADS": "1", **os.environ, "DIGITS_SEED": str(seed)}
        subprocess.run((*command, "--out", str(out)), check=True, cwd=ROOT, env=given)
    (row,) = json.loads((out / "judgement.json").read_text())["rows"]
    report, found = json.loads((out / "traffic.json").read_text()), row["quality"]
    sizes = [row[name]["bytes"] / 1e6 for name in ("dense", "small")]
    times = [1e3 * row[name]["speeds"][0]["median"] for name in ("dense", "small")]
    traffic = report["dense_bytes"] / report["sent_bytes"]
    return {"seed": seed, "traffic": traffic, "MB": sizes, "ms": times, **found}


def show_digits(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="digits, 0.3 M parameters, 2 ranks")
    for name in ("seed", "dense loss", "small", "dense accuracy", "small", "traffic", "model.onnx", "ms, onnxruntime"):
        table.add_column(name, justify="right")
    for row in rows:
        losses = (f"{row['dense_loss']:.4f}", f"{row['small_loss']:.4f}")
        right = (f"{row['dense_accuracy']:.1%}", f"{row['small_accuracy']:.1%}")
        gains = (f"{a:.3g} to {b:.3g}: {a / b:.1f}x" for a, b in (row["MB"], row["ms"]))
        table.add_row(str(row["seed"]), *losses, *right, f"{row['traffic']:.0f}x less", *gains)
    Console(width=150).print(table)


def figures(judged: dict[str, Any]) -> dict[str, Any]:
    """Return losses, bytes and milliseconds of a judgement, by runtime."""
    rows = {row["runtime"]: row for row in judged["rows"]}
    found: dict[str, Any] = {"processor": judged["machine"]["processor"]}
    for name, row in rows.items():
        quality, sides = row["quality"], (row["dense"], row["small"])
        found[f"{name} losses"] = [quality["dense_loss"], quality["small_loss"]]
        found[f"{name} MB"] = [side["bytes"] / 1e6 for side in sides]
        found[f"{name} ms"] = [1e3 * side["speeds"][0]["median"] for side in sides]
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"GPT of 3.3 M parameters, 2 ranks; {rows[0]['processor']}, one thread")
    for name in ("seed", "dense loss", "small", "", "traffic", "model.safetensors", "model.onnx", "ms, onnxruntime"):
        table.add_column(name, justify="right")
    for row in rows:
        one, other = row["onnxruntime losses"]
        sizes = [row["torch MB"], row["onnxruntime MB"], row["onnxruntime ms"]]
        cells = [f"{a:.2f} to {b:.2f}: {a / b:.2f}x" for a, b in sizes]
        told = (
            str(row["seed"]),
            f"{one:.4f}",
            f"{other:.4f}",
            f"{other / one - 1:+.2%}",
            f"{row['traffic']:.1f}x less",
        )
        table.add_row(*told, *cells)
    Console(width=150).print(table)


def main() -> None:
    """Train and judge what is missing, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where runs, judgements and reports are")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--steps", type=int, default=1500)
    chosen = options.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [both(folder, chosen.steps, seed) for seed in range(chosen.seeds)]
    show(rows)
    show_digits([digits_row(folder, seed) for seed in range(chosen.seeds)])
    print(f"the report of the last seed: {chosen.folder}/judged-{rows[-1]['seed']}/judgement.html")


if __name__ == "__main__":
    main()
