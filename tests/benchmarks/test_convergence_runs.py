"""The convergence benchmark: each way trains, once, and the table and the picture say what was kept."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import convergence
from convergence_tasks import Digits, Text

SHORT = ("OneBitAdamW sign", "ZeroOneAdamW sign every 4", "AdamW, powersgd(4) gradients", "DGC topk(0.01)")


def trained(folder: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a run of ten steps each; the second time from their files."""
    rows = []
    for name in names:
        way = next(way for way in convergence.WAYS if way.name == name)
        task = Text() if way.task == "GPT" else Digits()
        first = convergence.once(Path(folder), way, task, 0.001, 1, 10)
        again = convergence.once(Path(folder), way, task, 0.001, 1, 10)
        assert {**again, "seconds": 0, "kernel_bytes": 0} == {**first, "seconds": 0, "kernel_bytes": 0}
        rows.append(first)
    return rows


def kept(name: str, seed: int, loss: float, sent: int) -> dict[str, Any]:
    """What is kept of a whole run: half of the bytes in the warm-up."""
    task = next(way.task for way in convergence.WAYS if way.name == name)
    warm = round(convergence.WARM_UP * convergence.STEPS)
    row = {"name": name, "task": task, "rate": 0.001, "seed": seed, "of_steps": convergence.STEPS}
    row |= {"steps": [0, warm, convergence.STEPS], "loss": [5.5, 3.0, loss], "sent_bytes": [0, sent // 2, sent]}
    return {**row, "kernel_bytes": [0, 0, round(1.01 * sent)], "dense_bytes_a_step": 1000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of three ways, one of them with two seeds."""
    runs = [kept("AdamW", 0, 2.0, 1_500_000), kept("AdamW", 1, 2.2, 1_500_000)]
    runs += [kept("OneBitAdamW sign", 0, 2.1, 100_000), kept("SGD", 0, 0.1, 1_500_000)]
    for i, row in enumerate(runs):
        (tmp_path / f"{i}.json").write_text(json.dumps(row))
    return tmp_path


@pytest.mark.slow
def test_every_kind_of_way_trains_once(tmp_path: Path) -> None:
    ranks = run(2, trained, str(tmp_path), SHORT, timeout=200)
    assert len(list(tmp_path.glob("*.json"))) == len(SHORT)
    for one, other in zip(*ranks, strict=True):
        assert one["loss"] == other["loss"]
        assert one["steps"] == [0, 1, 10]
        assert one["sent_bytes"][-1] < one["dense_bytes_a_step"] * 10 / 2
        assert one["loss"][-1] < one["loss"][0]


def test_the_table_counts_all_bytes_and_those_after_the_warm_up(folder: Path) -> None:
    dense, one_bit, images = convergence.summary(folder)
    assert (dense["name"], one_bit["name"], images["name"]) == ("AdamW", "OneBitAdamW sign", "SGD")
    assert dense["loss"] == pytest.approx(2.1)
    assert (dense["least"], dense["most"], dense["seeds"]) == (2.0, 2.2, 2)
    assert dense["ratio"] == pytest.approx(1.0)
    assert one_bit["ratio"] == pytest.approx(15.0)
    assert one_bit["ratio_after"] == pytest.approx(1000 * (convergence.STEPS - 200) / 50_000)
    assert one_bit["kernel"] == pytest.approx(1.01)


def test_the_table_and_the_picture_are_made_of_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = convergence.summary(folder)
    convergence.show(rows)
    said = capsys.readouterr().out
    assert "OneBitAdamW sign" in said
    assert "+0.00%" in said
    for name in ("one", "two"):
        convergence.draw(rows, folder / f"{name}.svg")
    assert (folder / "one.svg").read_bytes() == (folder / "two.svg").read_bytes()
    assert "OneBitAdamW sign" in (folder / "one.svg").read_text()
