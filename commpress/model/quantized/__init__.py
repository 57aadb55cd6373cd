"""Which modules are quantised: by exact type, the class that computes with their codes, and the names of their weights.

    nn.Linear, nn.Embedding          weight                                                      torchao's classes
    Transformers' Conv1D             weight, transposed                                          `conv1d.py`
    nn.Conv1d to 3d                  weight; a row is all of an output channel                   `convolution.py`
    nn.MultiheadAttention            in_proj_weight, or q, k and v_proj_weight; out_proj.weight  `attention.py`
    nn.RNN, nn.LSTM, nn.GRU          weight_ih_l0, weight_hh_l0, weight_hr_l0, ...               `recurrent.py`

A module that is prepared gets another class and stays the object that it is, with all its parameters.
"""

import sys
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from commpress.model.layers import is_conv1d
from commpress.model.quantized.attention import QuantizedMultiheadAttention
from commpress.model.quantized.convolution import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from commpress.model.quantized.recurrent import QuantizedGRU, QuantizedLSTM, QuantizedRNN
from commpress.model.quantized.weights import Decoder, Quantized, WeightQuantizer

__all__ = [
    "Decoder",
    "Quantized",
    "WeightQuantizer",
    "class_of",
    "kinds",
    "rounds_inputs",
    "row_shape",
    "weights_of",
]

OURS: dict[type, type] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
    nn.RNN: QuantizedRNN,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
}


def kinds() -> tuple[type, ...]:
    """Types of modules that can be quantised; no subclass of them: one may read its weights in its own way."""
    library = sys.modules.get("transformers.pytorch_utils")  # else no module can be a Conv1D
    return (nn.Linear, nn.Embedding, *OURS, *([] if library is None else [library.Conv1D]))


def class_of(module: nn.Module, qat: Any) -> type:
    """The class with fake quantisers of a module of these kinds; `qat` is torchao's package."""
    if is_conv1d(module):
        from commpress.model.quantized.conv1d import FakeQuantizedConv1D

        return FakeQuantizedConv1D
    found: type = OURS.get(type(module)) or (
        qat.FakeQuantizedLinear if isinstance(module, nn.Linear) else qat.FakeQuantizedEmbedding
    )
    return found


def weights_of(module: Any) -> dict[str, Tensor]:
    """The weights of a module of these kinds that are quantised, by their names in it."""
    names: list[str] = ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        separate = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        names = [*(["in_proj_weight"] if module._qkv_same_embed_dim else separate), "out_proj.weight"]
    elif isinstance(module, nn.RNNBase):
        names = [name for name in module._flat_weights_names if name.startswith("weight")]
    return {name: attrgetter(name)(module) for name in names}


def row_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape in which a row of a convolution's weight stands, (inputs / groups, kernel...); empty for other modules."""
    if isinstance(module, _ConvNd):
        return (module.in_channels // module.groups, *module.kernel_size)
    return ()


def rounds_inputs(module: nn.Module) -> bool:
    """Whether inputs of a module can be rounded, too: of Linear, Conv1D and convolutions."""
    return isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)
