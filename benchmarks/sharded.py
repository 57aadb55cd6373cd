"""Step time of FSDP2 with and without compression, against no communication, the ways taking turns.

python -m commpress.launch.lab 2 1gbit -- python benchmarks/sharded.py [--rounds 7] [--json OUT]
"""

import itertools
from typing import Any

import torch
import turns
from torch.distributed.fsdp import fully_shard

import commpress
from commpress.launch.model import GPT, Shape

SHAPE = Shape(layers=5, width=512, heads=8, context=64)
PLAIN = "FSDP2"
WAYS: dict[str, tuple[str, str] | None] = {
    turns.ALONE: None,
    PLAIN: None,
    "gradients int8, parameters int8": ("int8", "int8"),
    "gradients int4, parameters int8": ("int4", "int8"),
    "gradients int4, parameters int4": ("int4", "int4"),
    "the same, forward prefetch": ("int4", "int4"),
    "gradients int4, parameters delta|int4": ("int4", "delta|int4"),
}


def make(name: str) -> turns.Way:
    """A way's model, sharded unless it is alone."""
    model: Any = GPT(SHAPE)
    if name != turns.ALONE:
        blocks = [fully_shard(block) for block in model.blocks]
        root = fully_shard(model)
        if "prefetch" in name:
            for module, following in itertools.pairwise([root, *blocks]):
                module.set_modules_to_forward_prefetch([following])
    spec = WAYS[name]
    session = commpress.attach(model, gradients=spec[0], parameters=spec[1]) if spec else None
    return turns.Way(model, torch.optim.SGD(model.parameters(), lr=0.01), session)


def last_line(rows: list[dict[str, Any]]) -> str:
    """How much faster than FSDP2 alone."""
    best = min(rows[2:], key=lambda row: row["seconds"])
    return f"{best['name']}: {rows[1]['seconds'] / best['seconds']:.1f} times as fast as FSDP2"


if __name__ == "__main__":
    turns.main(__doc__, WAYS, make, SHAPE.context, last_line)
