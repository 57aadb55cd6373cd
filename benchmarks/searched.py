"""Does the search find what a hand-set recipe does not? `python benchmarks/searched.py [--seeds 3] [--trials 80] [--json FILE]`

The digits of examples/search.py in three parts: 997 to train on, 300 by which the search chooses, and 500 that judge in the
end, which neither the search nor a recipe has seen. The hand-set recipe takes the largest network, prunes 80 % of each layer
and rounds it to 8 bits. The search chooses the architecture, and bits and sparsity by kinds of layers, by TPE, for the loss and
the bytes of model.safetensors. All train from scratch, equally long, one after the other on one thread. A point of the front
beats the recipe if it takes fewer bytes and has no higher loss on the 500 digits.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

from commpress.launch.run_record import where
from commpress.model import Recipe, Scheduler, search, stored

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.search import HELD_OUT, X, Y, network

STEPS, BATCH, RATE = 300, 64, 3e-3
CHOOSING = 300
"""Digits by which the search chooses; they lie behind the HELD_OUT that judge."""
PRUNED, ROUNDED = {"start": 50, "end": 200, "every": 10}, {"start": 220}
HAND_SET = Recipe.of({"prune": [{**PRUNED, "amount": 0.8}], "quantize": [{**ROUNDED, "bits": 8}]})
SETTINGS: dict[str, dict[str, Any]] = {
    "conv*": {"bits": (8, 4), "sparsity": (0.0, 0.5)},
    "width*": {"bits": (8, 4), "sparsity": (0.0, 0.5, 0.8)},
    "depth*": {"bits": (8, 4), "sparsity": (0.0, 0.5, 0.8, 0.9)},
    "head": {"bits": (8, 4), "sparsity": (0.0, 0.5, 0.8)},
}


def trained(model: nn.Module, recipe: Recipe | None, seed: int) -> int:
    """Train a network from scratch, under a recipe if there is one; return the bytes of its file, whose weights it then has."""
    optimizer, source = torch.optim.Adam(model.parameters(), lr=RATE), torch.Generator().manual_seed(seed)
    scheduler = None if recipe is None else Scheduler(recipe, model, optimizer)
    first = HELD_OUT + CHOOSING
    for _ in range(STEPS):
        rows = first + torch.randint(len(X) - first, (BATCH,), generator=source)
        cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        stored.save(path, model, masks=None if scheduler is None else scheduler.masks.of)
        return path.stat().st_size


@torch.no_grad()
def judged(model: nn.Module, begin: int, end: int) -> tuple[float, float]:
    """The loss of these digits, and the share of them that a network reads."""
    output = model.eval()(X[begin:end])
    return cross_entropy(output, Y[begin:end]).item(), (output.argmax(1) == Y[begin:end]).float().mean().item()


def measured(choice: Mapping[str, Any] | None, recipe: Recipe | None, seed: int) -> dict[str, Any]:
    """A row: the network of a choice, the largest without one, trained under a recipe; bytes, and the loss on both parts."""
    torch.manual_seed(seed)
    model = search.fixed(network()) if choice is None else search.fixed(network(), choice)
    size = trained(model, recipe, seed)
    chosen_by, _ = judged(model, HELD_OUT, HELD_OUT + CHOOSING)
    loss, accuracy = judged(model, 0, HELD_OUT)
    return {"bytes": size, "chosen_by": chosen_by, "loss": loss, "accuracy": accuracy, "choice": choice}


def compression(depth: bool) -> search.Compression:
    """The settings that the search chooses; a network without hidden layers has none of theirs."""
    settings = {glob: kinds for glob, kinds in SETTINGS.items() if depth or glob != "depth*"}
    return search.Compression(settings, prune=PRUNED, quantize=ROUNDED)


def problem(seed: int, rows: dict[str, dict[str, Any]]) -> search.Problem:
    """The search; what it measures is kept in `rows`, by choice."""
    architecture = search.space(network())

    def row(choice: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(dict(choice), sort_keys=True)
        if key not in rows:
            built = {name: option for name, option in choice.items() if name in architecture}
            rows[key] = measured(built, compression(bool(choice["depth"])).recipe(choice), seed) | {
                "choice": dict(choice)
            }
        return rows[key]

    return search.Problem(
        architecture | compression(True).space,
        quality=lambda trial: -float(row(trial.choice)["chosen_by"]),
        size=lambda choice: float(row(choice)["bytes"]),
    )


def compared(seed: int, trials: int) -> dict[str, Any]:
    """The rows of one seed: dense, by hand, and the front of a search, judged by digits that it has not seen."""
    dense, by_hand = measured(None, None, seed), measured(None, HAND_SET, seed)
    rows: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    found = search.search(problem(seed, rows), strategy="tpe", trials=trials, seed=seed)
    seconds = time.perf_counter() - started
    front = [rows[json.dumps(dict(tried.choice), sort_keys=True)] for tried in found.front]
    return {"seed": seed, "seconds": seconds, "trials": trials, "dense": dense, "by hand": by_hand, "front": front}


def beats(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row takes fewer bytes than another, and has no higher loss."""
    return bool(row["bytes"] < other["bytes"] and row["loss"] <= other["loss"])


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table of one seed, and a sentence."""
    hand = record["by hand"]
    table = Table(title=f"seed {record['seed']}: {record['trials']} trials in {record['seconds']:.0f} s")
    figures = ("bytes", "loss on the 300", "loss on the 500", "accuracy on them")
    for name in ("", *figures, "beats the recipe", "choice"):
        table.add_column(name, justify="right" if name in figures else "left")
    for name, row in [("dense", record["dense"]), ("by hand", hand), *(("found", row) for row in record["front"])]:
        said = "" if row["choice"] is None else ", ".join(f"{key} {value}" for key, value in row["choice"].items())
        won = "yes" if name == "found" and beats(row, hand) else ""
        losses = (f"{row[key]:.4f}" for key in ("chosen_by", "loss"))
        table.add_row(name, f"{row['bytes']:,}", *losses, f"{row['accuracy']:.1%}", won, said)
    console.print(table)
    better = [row for row in record["front"] if beats(row, hand)]
    if better:
        least = min(better, key=lambda row: int(row["bytes"]))
        said = f"the smallest is {hand['bytes'] / least['bytes']:.1f}x smaller, loss {least['loss']:.4f}"
        console.print(f"{len(better)} of {len(record['front'])} found points beat the recipe; {said}", highlight=False)
    else:
        console.print("no found point beats the recipe")


def main() -> None:
    """Search and compare, a seed after the other."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--trials", type=int, default=80)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    console = Console(width=170)
    records = []
    for seed in range(chosen.seeds):
        records.append(compared(seed, chosen.trials))
        show(records[-1], console)
    here = where(torch.device("cpu"))
    print(f"one thread of {here['machine']}, torch {torch.__version__}")
    if chosen.json:
        chosen.json.write_text(json.dumps({**here, "seeds": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
