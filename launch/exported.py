"""Exported files on the command line: their table, and the example inputs of a run's model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from commpress.launch.predictions import say, show

if TYPE_CHECKING:
    from commpress.model import Exported

ROWS = 4
"""Rows of the example inputs of a run's model. ExecuTorch plans memory for that many."""


def bytes_of(model: Any) -> tuple[torch.Tensor]:
    """Return example bytes for a GPT, as long as its context."""
    shape, random = (ROWS, model.positions.num_embeddings), torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, shape, generator=random, dtype=torch.int64, device="cpu"),)


def show_exported(files: "Sequence[Exported]") -> None:
    """Print what was written."""
    made = Table("format", "file", "MB", "difference", title="exported", box=box.SIMPLE_HEAD)
    for column in made.columns[2:]:
        column.justify = "right"
    for each in files:
        made.add_row(each.format, str(each.path), f"{each.bytes / 1e6:.3f}", f"{each.difference:.1e}")
    show(made)
    say("difference: the largest of the example's outputs, between training with quantisers on and the file")
