"""A prologue in a pass of its own. Most loops that encode apply it in their own pass."""

from typing import Any

from torch import Tensor

from commpress.kernels.cpu.arrays import steps, values
from commpress.kernels.cpu.blocks import run_prologue


def apply(x: Tensor, prologue: Any) -> None:
    """`prologue` of the table."""
    run_prologue(values(x), steps(prologue))
