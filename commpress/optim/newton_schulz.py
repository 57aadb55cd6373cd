"""Newton-Schulz (Jordan et al., Muon, 2024): the nearest matrix with singular values of about 1, by matrix products alone."""

import torch
from torch import Tensor

from commpress.kernels.cpu.instructions import MULTIPLIES_BFLOATS

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic a x + b x^3 + c x^5 that torch.optim.Muon takes: its slope at 0 is as large as can be."""
LEAST_NORM = 1e-7
CPU_DTYPE = torch.bfloat16 if MULTIPLIES_BFLOATS and torch.backends.mkldnn.is_available() else torch.float32
"""The dtype of the products on a CPU. Without oneDNN (mkldnn) torch does not use the instructions for bfloat16."""


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of Muon's matrix products on a device."""
    return CPU_DTYPE if device.type == "cpu" else torch.bfloat16


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return, for each matrix U D V^T in `matrices` ([k, rows, columns], any float dtype), U S V^T: float32, the same shape.

    The singular values S are between about 0.7 and 1.2. The products have the `product_dtype` of the device.
    """
    x = matrices.to(product_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=LEAST_NORM)[:, None, None]
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).to(torch.float32)
