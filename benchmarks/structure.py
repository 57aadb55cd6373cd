"""Structure by one share of all widths, or by width? `python benchmarks/structure.py [--seeds 3]`

The digits' network of examples/shrink.py is narrowed until its model.safetensors fits, without any training after it. Every
second held-out batch chooses what goes of which width, the others judge: 250 digits each.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from commpress.launch.run_record import where
from commpress.model import Recipe
from commpress.model.judgement.forms import batches_of
from commpress.model.narrowing import described, narrow
from commpress.model.sensitivity import loss_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.shrink import batches, trained

LIMITS = (0.06, 0.04, 0.03, 0.02)
"""Megabytes."""


def main() -> None:
    """Narrow each network both ways and print the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    held_out = batches()[1]
    choosing, judging = held_out[::2], batches_of(held_out[1::2], "digits")
    table = Table("seed", "dense loss", "max_mb", "one share", "loss", "by width", "loss")
    better = cases = 0
    for seed in range(seeds):
        model = trained(seed)
        dense = loss_of(model, judging, None)
        for limit in LIMITS:
            budget = {"format": "safetensors", "max_mb": limit, "structure": 0.75}
            found = []
            for known in (None, choosing):
                small = copy.deepcopy(model)
                _, narrowed = narrow(small, Recipe.of({"budget": budget}), (held_out[0][0],), known)
                found.append((described(narrowed.removed), loss_of(small, judging, None)))
            cells = [text for words, loss in found for text in (words, f"{loss:.3f}")]
            table.add_row(str(seed), f"{dense:.3f}", f"{limit:g}", *cells)
            cases, better = cases + 1, better + (found[1][1] < found[0][1])
    machine = where(torch.device("cpu"))
    console = Console(width=128)
    console.print(f"{machine['machine']}, torch {torch.__version__}", highlight=False)
    console.print(table)
    console.print(f"by width the loss is lower in {better} of {cases} cases", highlight=False)


if __name__ == "__main__":
    main()
