"""What else turns float32 into 8 or 4 bits: torch's own, and on a CPU pi-quant (`pip install pypiquant`) where it is installed.

Both have one scale for the whole tensor, which a pass over it finds, and no feedback. On a CPU they run on one thread, as the
codecs do; on a GPU torch's own waits for the host, which reads the scale.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

Calls = dict[tuple[str, str], Callable[[], object]]
"""What is timed, by name and action."""
ABSENT = "pi-quant: not installed; pip install pypiquant"


def peers(x: Tensor) -> Calls:
    """Return what is timed on x, float32."""
    return torchs(x) | (pi_quants(x) if x.device.type == "cpu" and find_spec("piquant") else {})


def torchs(x: Tensor) -> Calls:
    """Return torch.quantize_per_tensor with the largest magnitude as the scale, and its top-k of 1 %."""

    def encode() -> Tensor:
        return torch.quantize_per_tensor(x, float(x.abs().max()) / 127, 0, torch.qint8)

    coded = encode()
    return {
        ("torch.quantize_per_tensor, qint8", "encode"): encode,
        ("torch.quantize_per_tensor, qint8", "decode"): coded.dequantize,
        ("torch.topk(x.abs(), 1 %)", "encode"): lambda: torch.topk(x.abs(), x.numel() // 100),
    }


def pi_quants(x: Tensor) -> Calls:
    """Return pi-quant's kernels to 8 and 4 bits, and back."""
    from piquant import Context, DataType, ReduceOp, RoundMode

    context, n, out = Context(1), x.numel(), torch.empty_like(x)
    calls: Calls = {}
    for bits, dtype in ((8, DataType.UINT8), (4, DataType.UINT4)):
        payload = torch.empty(n * bits // 8, dtype=torch.uint8)

        def encode(dtype: DataType = dtype, payload: Tensor = payload) -> tuple[float, int]:
            found = context.compute_quant_params_ptr_float32(x.data_ptr(), dtype, n)
            places = x.data_ptr(), DataType.F32, payload.data_ptr(), dtype
            context.quantize_ptr(*places, n, *found, RoundMode.NEAREST)
            return found

        def decode(dtype: DataType = dtype, payload: Tensor = payload, found: tuple[float, int] = encode()) -> None:
            places = payload.data_ptr(), dtype, out.data_ptr(), DataType.F32
            context.dequantize_ptr(*places, n, *found, ReduceOp.SET)

        calls |= {(f"pi-quant, {bits} bits", "encode"): encode, (f"pi-quant, {bits} bits", "decode"): decode}
    return calls
