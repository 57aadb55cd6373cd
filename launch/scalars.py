"""Scalars for TensorBoard: record.json's curve and the numbers of `session.log()`, written during training.

Values per step (MB, seconds) are means since the last row, so the sums agree with record.json.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def require(device: torch.device) -> None:
    """Raise ValueError on all ranks if rank 0, which alone writes, cannot import tensorboard. Collective."""
    reason = ""
    if dist.get_rank() == 0:
        try:
            from torch.utils import tensorboard  # noqa: F401
        except ImportError as error:
            reason = str(error)
    missing = torch.tensor(len(reason), dtype=torch.int64, device=device)
    dist.broadcast(missing, 0)
    if missing.item():
        reason = reason or "rank 0 cannot import it"
        raise ValueError(f"--tensorboard needs tensorboard ({reason}): pip install 'commpress[tensorboard]'")


@dataclasses.dataclass
class Scalars:
    """A writer into `folder`, in which a resumed run goes on after step `done`: later steps of an earlier start are hidden.

    `seconds` are the run's seconds up to step `done`.
    """

    folder: Path
    done: int
    seconds: float

    def __post_init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=self.done + 1 if self.done else 0)

    def note(self, row: Mapping[str, Any], lr: float, traffic: Mapping[str, float]) -> None:
        """Write a row of the curve, with the learning rate of its last update and the session's log; on disk at once."""
        values = {"loss/train": row["train_loss"], "loss/validation": row["validation_loss"]}
        steps = row["step"] - self.done
        if steps:  # there has been no update at step 0
            values |= {"learning rate": lr, "seconds/step": (row["seconds"] - self.seconds) / steps, **traffic}
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
        self.done, self.seconds = row["step"], row["seconds"]

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
