"""The folder that Transformers loads through torchao: `from_pretrained(folder)` gives the model with integer weights.

    config.json         quantization_config: torchao's words for weights of integers, and which modules have none
    model.safetensors   torchao's layout: of each weight int8 codes and scales, also at 4 bits a byte a weight

Outputs are bit for bit those of training. There is no place in it for static inputs, for a weight of several modules, nor for
other layers than Linear and Embedding. Reading it runs no code of the folder's.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commpress import extras
from commpress.model import quantization
from commpress.model.export.parts import Layer, layers_of

FILE = "transformers"


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model, one of Transformers', into a folder. Raises ValueError for what has no place in it."""
    library = _transformers()
    layers = layers_of(model)
    names = {name: layers[module] for name, module in model.named_modules() if module in layers}
    _require_place(model, names, library)
    converted: Any = copy.deepcopy(model)
    if quantization.is_prepared(converted):
        quantization.convert(converted)
    plain = [
        name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and name not in names
    ]
    config = library.TorchAoConfig(
        _words(next(iter(names.values()))),
        modules_to_not_convert=plain,
        include_input_output_embeddings=any(layer.embedding for layer in names.values()),
    )
    from transformers.quantizers.auto import AutoHfQuantizer

    converted.config.quantization_config = config
    converted.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    converted.save_pretrained(path)


def run(path: Path, model: Any, inputs: tuple[Any, ...]) -> Any:
    """The outputs of the model that Transformers makes of a folder."""
    return type(model).from_pretrained(path, local_files_only=True).eval()(*inputs)


def _require_place(model: nn.Module, names: dict[str, Layer], library: Any) -> None:
    if not isinstance(model, library.PreTrainedModel):
        raise ValueError(f"export to torchao: {type(model).__name__} is not a Transformers model, expected one")
    if not names:
        raise ValueError("export to torchao: nothing is quantised, expected integers; use the model's save_pretrained")
    first: dict[int, str] = {}
    for name, layer in names.items():
        if not isinstance(layer.module, (nn.Linear, nn.Embedding)):
            kind = next(each for each in type(layer.module).__mro__ if each.__module__.startswith("torch."))
            raise ValueError(
                f"export to torchao: {name!r} is a {kind.__name__}, for which torchao has no integers; "
                "expected nn.Linear and nn.Embedding"
            )
        if layer.activations == "static":
            raise ValueError(f"export to torchao: {name!r} has static inputs, expected dynamic ones or none")
        if (other := first.setdefault(id(layer.codes), name)) != name:
            raise ValueError(f"export to torchao: {other!r} and {name!r} share a weight, expected one for each")


def _words(layer: Layer) -> Any:
    """torchao's config of a layer. When a folder is loaded, each weight's own layout counts."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    codes = layer.codes
    granularity = PerAxis(0) if layer.by_row else PerGroup(codes.values.shape[1] // codes.scale.shape[1])
    dtype = getattr(torch, f"int{codes.bits}")
    if layer.activations == "dynamic":
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise extras.missing("export to torchao", error, "transformers") from error
    return transformers
