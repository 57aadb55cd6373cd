"""BatchNormalization behind a convolution of integers: it becomes part of the scales and the bias, and the codes stay.

    (w * x + c - mean) k + shift = (k s) codes * x + (c - mean) k + shift,    k = gain / sqrt(variance + epsilon)

Between a convolution and the rounding of the next layer's inputs it would keep onnxruntime from integer kernels. Where k is
below 0 the codes of that output are negated; where that cannot be (the lowest code has no opposite) or k is 0, all stays.
"""

from typing import Any

import numpy as np


def fold(graph: Any) -> None:
    """Fold them in a graph of onnx_ir that has been optimised."""
    import onnx_ir as ir

    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        conv = norm.inputs[0].producer()
        if conv is None or conv.op_type != "Conv" or not _only(norm.inputs[0]):
            continue
        decode = conv.inputs[1].producer()
        constants = [*norm.inputs[1:], *conv.inputs[2:], *(() if decode is None else decode.inputs[:2])]
        if decode is None or not all(value is None or value.is_initializer() for value in constants):
            continue
        codes, scale = decode.inputs[:2]
        if decode.op_type != "DequantizeLinear" or not all(map(_only, (conv.inputs[1], codes, scale))):
            continue
        gain, shift, mean, variance = (value.const_value.numpy().astype(np.float64) for value in norm.inputs[1:])
        k = gain / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        values = codes.const_value.numpy()
        signed = values.astype(np.int8)
        lowest = signed.reshape(len(signed), -1).min(axis=1)
        if scale.const_value.numpy().ndim != 1 or not _fits(k, lowest, codes.name):
            continue
        turned = np.where((k < 0).reshape(-1, *[1] * (signed.ndim - 1)), -signed, signed)
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        before = 0.0 if bias is None else bias.const_value.numpy().astype(np.float64)
        codes.const_value = ir.Tensor(turned.astype(values.dtype), name=codes.name)
        scale.const_value = ir.Tensor((scale.const_value.numpy() * np.abs(k)).astype(np.float32), name=scale.name)
        given = ir.Tensor(((before - mean) * k + shift).astype(np.float32), name=f"{scale.name}.shift")
        value = ir.Value(name=given.name, shape=given.shape, type=ir.TensorType(given.dtype), const_value=given)
        graph.register_initializer(value)
        conv.resize_inputs(3)
        conv.replace_input_with(2, value)
        norm.outputs[0].replace_all_uses_with(norm.inputs[0], replace_graph_outputs=True)
        graph.remove(norm, safe=True)
    for name, value in [*graph.initializers.items()]:
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _only(value: Any) -> bool:
    """Whether nothing else reads it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _fits(k: Any, lowest: Any, name: str) -> bool:
    return bool((k != 0).all() and np.isfinite(k).all() and (lowest[k < 0] > (-8 if "int4" in name else -128)).all())
