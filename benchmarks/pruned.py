"""Step time and bytes of a pruned model's gradients: packed and coded, against whole ones, the ways taking turns.

python -m commpress.launch.lab 2 1gbit -- python benchmarks/pruned.py [--rounds 7] [--json OUT]
"""

from typing import Any

import torch
import turns
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch.model import GPT, Shape
from commpress.model.importance import Magnitude
from commpress.model.masks import Masks
from commpress.model.pruning import by_amount

SHAPE = Shape(layers=5, width=528, heads=8, context=64)
PLAIN = "plain DDP"
WAYS: dict[str, tuple[str, float]] = {
    turns.ALONE: ("", 0.0),
    PLAIN: ("", 0.0),
    "none, 80 % pruned": ("none", 0.8),
    "none, 90 % pruned": ("none", 0.9),
    "int4": ("int4", 0.0),
    "int4, 80 % pruned": ("int4", 0.8),
    "int4, 90 % pruned": ("int4", 0.9),
    "sign, 80 % pruned": ("sign", 0.8),
}
"""Spec of the gradients, and the share of the Linear layers' weights that is pruned."""


def make(name: str) -> turns.Way:
    """A way's model, pruned, its gradients packed."""
    bare = GPT(SHAPE)
    spec, amount = WAYS[name]
    model: nn.Module = bare if name == turns.ALONE else DistributedDataParallel(bare, gradient_as_bucket_view=True)
    session = commpress.attach(model, spec) if spec else None
    if session and amount:
        linear = {name: module for name, module in bare.named_modules() if isinstance(module, nn.Linear)}
        masks = Masks(dict(bare.named_parameters()))
        scores = Magnitude(bare, {f"{name}.weight": module.weight for name, module in linear.items()}).scores()
        masks.replace(by_amount(scores, amount))
        session.set_masks(masks.of)
    return turns.Way(model, torch.optim.SGD(bare.parameters(), lr=0.01), session)


def last_line(rows: list[dict[str, Any]]) -> str:
    """Return the line that says what packing alone saves."""
    of = {row["name"]: row["kernel_bytes"] for row in rows}
    return f"90 % pruned, without a codec: {of[PLAIN] / of['none, 90 % pruned']:.1f} times fewer bytes"


if __name__ == "__main__":
    turns.main(__doc__, WAYS, make, SHAPE.context, last_line)
