"""Pruned weights leave the file: what is kept of a tensor and a bit a value, and a few nodes that rebuild it with its zeros.

    mask   uint8 [ceil(n / 8), 1]     a bit a value in row-major order, the lowest first
    kept   [1, k]                     the values that are not 0, of the tensor's own type

    places = NonZero(Reshape(BitwiseAnd(mask, [1, 2, 4, ..., 128]), [-1]))      int64 [1, k]
    tensor = Reshape(ScatterElements(zeros [1, n], places, kept, axis=1), shape)

At 4 bits Cast is around it: ScatterElements takes int8, and ONNX's INT4 comes out of the last node. onnxruntime computes all of
it once, when a session is made, and finds the weights as if they had been in the file, so its fusions and kernels are the same.
A mask that does not fit what is kept is an error of ScatterElements.
"""

from typing import Any

import numpy as np

LEAST_SAVED = 0.1
"""The share of a tensor's bytes that has to be saved."""
NODES = 800
"""Bytes that the nodes, their names and small inputs take for one tensor, about."""
MOST_FOLDED = 2**30
"""Bytes. onnxruntime from 1.27 on does not compute a node in advance whose output is larger."""
BITS = {"FLOAT": 32, "INT8": 8, "INT4": 4}
"""By the name of the types that weights have: bits a value."""


def masked_bytes(n: int, kept: int, bits: int) -> int:
    """Return what a tensor of n values takes in the file, about: its mask if that saves LEAST_SAVED, else all of it."""
    whole = -(-n * bits // 8)
    masked = -(-kept * bits // 8) + -(-n // 8) + NODES
    foldable = max(8 * kept, 4 * n if bits == 32 else n) <= MOST_FOLDED
    return masked if foldable and masked <= (1 - LEAST_SAVED) * whole else whole


def leave_out(graph: Any) -> None:
    """Leave zeros out of the initializers of a graph of onnx_ir where that makes the file smaller."""
    shared: dict[Any, Any] = {}
    made: list[Any] = []
    for name, value in [*graph.initializers.items()]:
        bits = BITS.get(value.dtype.name)
        if bits is None or value.is_graph_output() or value.is_graph_input():
            continue
        values = value.const_value.numpy()
        kept = values != 0
        if masked_bytes(values.size, int(kept.sum()), bits) < -(-values.size * bits // 8):
            made += _rebuilt(graph, value, kept, shared)
            del graph.initializers[name]
    if made:
        graph.insert_before(graph[0], made)


def _rebuilt(graph: Any, value: Any, kept: Any, shared: dict[Any, Any]) -> list[Any]:
    """The nodes that give what an initializer is, whose place they take."""
    import onnx_ir as ir

    values, nodes, of = value.const_value.numpy(), list[Any](), ir.DataType
    dtype = of.INT8 if value.dtype == of.INT4 else value.dtype

    def constant(name: str, array: Any) -> Any:
        tensor = ir.Tensor(array, name=name)
        made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(made)
        return made

    def node(operator: str, *inputs: Any, **attributes: Any) -> Any:
        nodes.append(ir.node(operator, inputs, attributes))
        return nodes[-1].outputs[0]

    def once(key: Any, make: Any) -> Any:
        if key not in shared:
            shared[key] = make()
        return shared[key]

    def zeros() -> Any:
        size = constant(f"pruned:size:{values.size}:{dtype.name}", np.array([1, values.size]))
        return node("ConstantOfShape", size, value=ir.Tensor(np.zeros(1, dtype.numpy())))

    eight = once("bits", lambda: constant("pruned:bits", 1 << np.arange(8, dtype=np.uint8)))
    flat = once("flat", lambda: constant("pruned:flat", np.array([-1])))
    shape = once(
        values.shape, lambda: constant(f"pruned:shape:{'x'.join(map(str, values.shape))}", np.array(values.shape))
    )
    mask = constant(f"{value.name}:mask", np.packbits(kept.reshape(-1), bitorder="little").reshape(-1, 1))
    left = constant(f"{value.name}:kept", values[kept].reshape(1, -1))
    places = node("NonZero", node("Reshape", node("BitwiseAnd", mask, eight), flat))
    # onnxruntime from 1.27 on computes in advance only what has a known size
    places.shape, places.type = ir.Shape(left.shape), ir.TensorType(of.INT64)
    halves = value.dtype == of.INT4
    left = node("Cast", left, to=of.INT8) if halves else left
    whole = node("ScatterElements", once((values.size, dtype), zeros), places, left, axis=1)
    whole = node("Reshape", whole, shape)
    whole = node("Cast", whole, to=of.INT4) if halves else whole
    value.replace_all_uses_with(whole)
    whole.name, whole.shape, whole.type = value.name, value.shape, value.type
    return nodes
