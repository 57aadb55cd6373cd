"""Common parts of the tests of the trainers: the environment of a launcher, data, and what a report must say."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
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


def tracked(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of ours, of all of TensorBoard's files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if "commpress/" in tag:
                found.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
    return found


def require_sums(found: dict[str, dict[int, float]], report: dict[str, Any], every: int) -> None:
    """What a tracker has of a training's windows of so many steps adds up to the report."""
    sent = next(values for tag, values in found.items() if tag.endswith("commpress/sent_mb_per_step"))
    assert len(sent) == report["steps"] // every
    assert sum(sent.values()) * every * 1e6 == pytest.approx(report["sent_bytes"], rel=1e-4)
    names = {tag[tag.index("commpress/") :] for tag in found}
    milliseconds = {f"commpress/{phase}_ms" for phase in ("encode", "wire", "decode", "exposed", "hidden")}
    assert names == milliseconds | {"commpress/sent_mb_per_step", "commpress/ratio", "commpress/ratio_bf16"}


def blocks(section: str) -> list[str]:
    """The Python blocks of a section of docs/trainers.md."""
    text = DOCS.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def flat(parameters: Iterator[Tensor]) -> Tensor:
    """All values, in one new tensor."""
    return torch.cat([p.detach().flatten() for p in parameters])


def require_one_choice(ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
    """All runs of all ranks, the first of them unbroken, have chosen one recipe of integers, and have the same parameters."""
    whole = ranks[0][0]
    assert whole["recipe"]["budget"]["settled"]
    assert "int" in whole["phase"]
    for found in ranks:
        for pieced in found:
            assert torch.equal(pieced["parameters"], whole["parameters"])
            assert pieced["recipe"] == whole["recipe"]
