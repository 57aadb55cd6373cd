"""The file of `stored.py`, which commpress reads: integers, no pruned weights, and the ranges of static inputs.

Its values load into a plain model, which does not round inputs. Reading it runs no code, and damage is noticed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from commpress.model import stored
from commpress.model.ranges import quantizer_of

FILE = "model.safetensors"


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model. Zeros that would take more than their mask are left out as pruned."""
    masks = {name: p != 0 for name, p in model.named_parameters() if type(p) is nn.Parameter}
    stored.save(path, model, masks=masks)


def run(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a plain model with the file's values: weights are those of training, inputs are not rounded."""
    state = stored.load(path).state_dict()
    for module in model.modules():
        for quantizer in (getattr(module, "weight_fake_quantizer", None), quantizer_of(module)):
            if quantizer is not None:
                quantizer.enabled = False
    return torch.func.functional_call(model, state, inputs, tie_weights=False, strict=False)
