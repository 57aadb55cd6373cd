"""Common parts of the tests of the trainers: the environment of a launcher, data, and what a report must say."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import TensorDataset
from training import batch

import commpress
from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.optim import OneBitAdamW, ZeroOneAdamW

MICRO = 8
"""Examples of a rank in one backward."""
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "one bit": lambda p: OneBitAdamW(p, lr=0.02, warmup_steps=2, max_norm=1.0),
    "zero one": lambda p: ZeroOneAdamW(p, lr=0.02, warmup_steps=2, sync_every=3),
}
DOCS = Path(__file__).parents[2] / "docs" / "trainers.md"


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun sets, for this rank; what libraries keep of it for the process is dropped at the end."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,  # nobody connects: the group is there
        "OMP_NUM_THREADS": 1,
        "HF_HUB_OFFLINE": 1,
    }
    with mock.patch.dict(os.environ, {name: str(value) for name, value in names.items()}):
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """Accelerate keeps one state a process; the next training shall have its own."""
    with contextlib.suppress(ImportError):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def examples(count: int) -> TensorDataset:
    """`count` inputs and classes, the same everywhere."""
    return TensorDataset(*batch(0, 0, size=count))


def payload_bytes(report: dict[str, Any], spec: str) -> int:
    """Return the bytes that a rank of two sends of a report's buckets by this spec: a payload, whole or in two chunks."""
    assert report["world_size"] == 2
    codec, total = commpress.parse(spec), 0
    for row in report["rows"]:
        cuts = {"one_shot": [0, row["values"]], "two_shot": chunk_bounds(row["values"], 2, codec.granularity)}
        total += row["steps"] * sum(codec.nbytes(b - a) for a, b in itertools.pairwise(cuts[row["exchange"]]))
    return total


def blocks(section: str) -> list[str]:
    """The Python blocks of a section of docs/trainers.md."""
    text = DOCS.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def flat(parameters: Iterator[Tensor]) -> Tensor:
    """All values, in one new tensor."""
    return torch.cat([p.detach().flatten() for p in parameters])
