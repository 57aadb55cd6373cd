"""What is in a model's file: bytes by layer, how many values are left, and of which kinds its weights are."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from commpress.model.judgement.forms import Side
from commpress.model.stored import Stored


def layer_bytes(path: Path) -> dict[str, int]:
    """Bytes of the tensors of a safetensors file by the layer that they belong to, in the file's order."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found: dict[str, int] = {}
    for key, how in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
        if key != "__metadata__":
            name = key.removesuffix(":scale").removesuffix(":mask")
            layer = name.rpartition(".")[0] or name
            found[layer] = found.get(layer, 0) + how["data_offsets"][1] - how["data_offsets"][0]
    return found


def counts(content: Stored) -> dict[str, int]:
    """How many values a model has, how many are not 0, and how many masks leave out of the file. Shared ones count once."""
    all_values: dict[str, Tensor] = {
        **content.tensors,
        **{name: codes.values for name, codes in content.integers.items()},
    }
    return {
        "values": sum(x.numel() for x in all_values.values()),
        "left": sum(int(x.count_nonzero()) for x in all_values.values()),
        "pruned": sum(int((~mask).sum()) for mask in content.masks.values()),
    }


def kinds(side: Side) -> dict[str, int]:
    """Values by kind: "float32", or as "int8 static", "int4 weights in groups", the largest kind first; "zeros" beside them."""
    content = side.content
    if content is None:
        return {}
    found: dict[str, int] = {}
    for x in content.tensors.values():
        kind = str(x.dtype).removeprefix("torch.")
        found[kind] = found.get(kind, 0) + x.numel()
    for name, codes in content.integers.items():
        static = name.rpartition(".")[0] in content.ranges
        inputs = "static" if static else "dynamic" if name in side.dynamic else "weights"
        kind = f"int{codes.bits} {inputs}{' in groups' if codes.scale.shape[1] > 1 else ''}"
        found[kind] = found.get(kind, 0) + codes.values.numel()
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    pruned = counts(content)["pruned"]
    return {**found, **({"zeros": pruned} if pruned else {})}


def of_side(side: Side) -> dict[str, Any]:
    """Return what a judgement says of the content of a side; None and empty tables where no file tells it."""
    return {
        "counts": None if side.content is None else counts(side.content),
        "kinds": kinds(side),
        "layers": {} if side.stored is None else layer_bytes(side.stored),
        "stored_bytes": None if side.stored is None else side.stored.stat().st_size,
        "left_out": side.left_out,
    }
