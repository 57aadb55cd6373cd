"""TensorBoard's scalars: what is read back is what record.json says, over restarts too."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import outcome, run

from commpress.launch import data, scalars, train

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)
TINY = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "warmup_steps": 2, "threads": 1}
STEPS, STOPPED_AT = 6, 3


def read(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}}"""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def trained(settings: dict[str, Any], stopped: bool) -> bool:
    """A run of this rank, asked to stop during step STOPPED_AT if `stopped`."""
    drawn, sample = 0, data.sample

    def counted(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if stopped and drawn == STOPPED_AT:
            signal.raise_signal(signal.SIGTERM)
        return sample(*arguments)

    data.sample = counted
    try:
        return train.train(train.Settings(**settings))
    finally:
        data.sample = sample


def test_a_run_and_its_restart_hold_what_record_json_says(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    settings = {
        **TINY,
        "data": text,
        "out": tmp_path / "run",
        "steps": STEPS,
        "eval_every": 2,
        "tensorboard": True,
        "compress": "int4",
    }
    assert run(2, trained, settings, True) == [False, False]
    assert max(read(tmp_path / "run")["loss/train"]) == STOPPED_AT
    assert run(2, trained, {**settings, "resume": True}, False) == [True, True]
    found = read(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    curve = {row["step"]: row for row in record["curve"]}

    for tag, key in (("loss/train", "train_loss"), ("loss/validation", "validation_loss")):
        expected = {step: row[key] for step, row in curve.items() if row[key] is not None}
        assert found[tag] == pytest.approx(expected)
    steps = range(1, STEPS + 1)
    rates = {step: train.learning_rate(step - 1, train.Settings(**settings)) for step in steps}
    assert found["learning rate"] == pytest.approx(rates)
    for tag, key, unit in (("commpress/sent_mb_per_step", "sent_bytes", 1e6), ("seconds/step", "seconds", 1.0)):
        assert found[tag] == pytest.approx({s: (curve[s][key] - curve[s - 1][key]) / unit for s in steps})
    ratios = [
        (curve[s]["dense_bytes"] - curve[s - 1]["dense_bytes"]) / (curve[s]["sent_bytes"] - curve[s - 1]["sent_bytes"])
        for s in steps
    ]
    assert list(found["commpress/ratio"].values()) == pytest.approx(ratios)
    assert min(ratios) > 4
    for phase in ("encode", "wire", "decode", "exposed"):
        assert sum(found[f"commpress/{phase}_ms"].values()) == pytest.approx(1e3 * record["traffic"][phase], rel=1e-4)


def test_steps_after_the_checkpoint_that_a_run_resumes_from_are_hidden(tmp_path: Path) -> None:
    def write(first: int, steps: range, loss: float) -> None:
        board = scalars.Scalars(tmp_path / "tensorboard", first, 2.0 * first)
        for step in steps:
            row = {"step": step, "train_loss": loss, "validation_loss": None, "seconds": 2.0 * step}
            board.note(row, 0.1, {"commpress/ratio": 4.0})
        board.close()

    write(0, range(1, 6), 1.0)
    write(3, range(5, 9, 2), 2.0)  # rows two steps apart: the figures are still those of one step
    found = read(tmp_path)
    assert found["loss/train"] == {1: 1.0, 2: 1.0, 3: 1.0, 5: 2.0, 7: 2.0}
    assert "loss/validation" not in found
    assert set(found["commpress/ratio"]) == {1, 2, 3, 5, 7}
    assert set(found["seconds/step"].values()) == {2.0}


def required() -> str:
    """What a rank meets where rank 0 has no tensorboard."""
    if torch.distributed.get_rank() == 0:
        vars(torch.utils).pop("tensorboard", None)  # as if no test before had imported it
        sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]
    try:
        return outcome(lambda: scalars.require(torch.device("cpu")))
    finally:
        sys.modules.pop("torch.utils.tensorboard", None)


def test_without_tensorboard_all_ranks_say_so() -> None:
    for said in run(2, required, fresh=True):
        assert said.startswith("ValueError: --tensorboard needs tensorboard (")
        assert said.endswith("pip install 'commpress[tensorboard]'")
