"""A prologue in a pass of its own; most loops that encode do it in theirs."""

from typing import Any

from torch import Tensor

from commpress.kernels.cpu.arrays import steps
from commpress.kernels.cpu.blocks import run_prologue


def apply(x: Tensor, prologue: Any) -> None:
    """`prologue` of the table."""
    run_prologue(x.numpy(), steps(prologue))
