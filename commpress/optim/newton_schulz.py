"""Newton-Schulz (Jordan et al., Muon, 2024): the nearest matrix with singular values of about 1, by matrix products alone."""

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import torch
from numba import config
from torch import Tensor

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic a x + b x^3 + c x^5 that torch.optim.Muon takes: its slope at 0 is as large as can be."""
LEAST_NORM = 1e-7
MULTIPLY_BFLOATS = "avx512bf16", "amx-bf16"
"""A CPU's instructions for products of bfloat16: AMD has the first since Zen 4, Intel's servers both since Sapphire Rapids."""
FOUND = {} if config.CPU_NAME else llvm.get_host_cpu_features()
ON_CPU = torch.bfloat16 if any(FOUND.get(one) for one in MULTIPLY_BFLOATS) else torch.float32
"""The dtype of the products on a CPU. Where loops are for a processor that is named (NUMBA_CPU_NAME), it is that of all."""


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return, for each matrix U D V^T in `matrices` ([k, rows, columns], any float dtype), U S V^T: float32, the same shape.

    The singular values S are between about 0.7 and 1.2. The products are in bfloat16, but in float32 on a CPU that has no
    instructions for them.
    """
    x = matrices.to(ON_CPU if matrices.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=LEAST_NORM)[:, None, None]
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).to(torch.float32)
