"""The benchmark of training steps: its records hold what they promise, and what fails says why."""

import contextlib
import importlib.util
import io
import json
import multiprocessing.process
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from commands import started_by_torchrun
from ranks import run

from commpress.launch.model import GPT, Shape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))


def run_tiny(folder: Path, *arguments: str) -> dict[str, Any]:
    """The benchmark on two ranks of this machine with a model of a few thousand parameters: record, and "printed"."""
    path = folder / "record.json"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    printed, silent = run(2, started, [*arguments, "--json", str(path)], store.port, fresh=True, timeout=120)
    assert not silent
    return {**json.loads(path.read_text()), "printed": printed}


def started(arguments: list[str], port: int) -> str:
    """What the benchmark prints on this rank, with a small model and a validation every 3 steps."""
    training = benchmark()
    training.SHAPE, training.EVERY = Shape(layers=1, width=32, heads=2, context=16), 3
    multiprocessing.process.current_process()._config["daemon"] = False  # what tries a row starts processes
    said = contextlib.redirect_stdout(io.StringIO())
    with started_by_torchrun(port), said as out, mock.patch.object(sys, "argv", ["training.py", *arguments]):
        training.main()
    return out.getvalue()


def rows_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name."""
    return {row["name"]: row for row in record["rows"]}


def powersgd_bytes(rank: int, shape: Shape) -> int:
    """4 r (rows + columns) for each matrix, as the paper has it, and vectors as they are."""
    sent = 0
    for p in GPT(shape).parameters():
        sent += p.numel() if p.dim() == 1 else min(rank * (len(p) + p[0].numel()), p.numel())
    return 4 * sent


@pytest.mark.slow
def test_a_step_time_record_holds_what_it_promises_and_a_hook_that_fails_says_why(tmp_path: Path) -> None:
    names = ("plain DDP", "torch bf16", "powersgd(4)", "powersgd(4), one bucket", "int4", "bagua")
    record = run_tiny(tmp_path, "int4", "powersgd(4)", "--rounds", "1", "--steps", "2", "--only", *names)
    rows, printed = rows_of(record), record["printed"]
    assert record["what"] == "step times"
    assert (record["world_size"], record["tokens_per_step"], record["steps"]) == (2, 64, 2)
    assert record["link"]["shaped"] is False
    assert record["parameters"] > 10_000
    assert set(rows) == {"no communication", *names}
    ran = {name: row for name, row in rows.items() if not row["error"]}
    for name, row in ran.items():
        assert row["seconds"] > 0, name
        assert len(row["quartiles"]) == 3
        assert row["ratio"] == pytest.approx(row["seconds"] / rows["no communication"]["seconds"])
        assert {"kind", "tokens_per_second", "sent_bytes", "kernel_bytes", "phases"} <= set(row)
    # two ranks: an all-reduce sends as much as the gradient has bytes
    assert rows["no communication"]["sent_bytes"] == 0
    assert rows["plain DDP"]["sent_bytes"] == 4 * record["parameters"]
    assert rows["int4"]["sent_bytes"] < 0.6 * record["parameters"]
    sent = {rows[name]["sent_bytes"] for name in ("powersgd(4)", "powersgd(4), one bucket")}
    assert sent == {powersgd_bytes(4, Shape(layers=1, width=32, heads=2, context=16))}
    assert set(rows["int4"]["phases"]) == {"encode", "wire", "decode", "exposed", "hidden"}
    assert "NCCL" in rows["torch bf16"]["error"]
    assert "setuptools_rust" in rows["bagua"]["error"]
    assert rows["torch bf16"]["error"] in printed
    assert printed.rstrip().splitlines()[-1].startswith("times as fast as plain DDP: ")


@pytest.mark.slow
def test_steps_by_muon_have_newton_schulz_and_coordinates_apart(tmp_path: Path) -> None:
    names = ["no communication", "plain DDP", "EF21Muon none", "EF21Muon int4", "EF21Muon rotate|sign"]
    record = run_tiny(tmp_path, "--optimizer", "muon", "--rounds", "1", "--steps", "2")
    rows = rows_of(record)
    assert record["optimizer"] == "Muon"
    assert list(rows) == names
    for name, row in rows.items():
        assert row["error"] == ""
        parts = [row[key] for key in ("newton_schulz_seconds", "rest_seconds")]
        assert min(parts) > 0, name
        assert sum(parts) < 2 * row["seconds"], name
    assert rows["no communication"]["sent_bytes"] == 0
    assert rows["plain DDP"]["sent_bytes"] == rows["EF21Muon none"]["sent_bytes"] == 4 * record["parameters"]
    coordinates = [rows[name]["coordinates_seconds"] for name in names]
    assert min(coordinates[3:]) > 0
    assert "Newton-" in record["printed"]


@pytest.mark.slow
def test_a_loss_record_holds_what_it_promises(tmp_path: Path) -> None:
    record = run_tiny(tmp_path, "int8", "--loss", "6")
    rows, printed = rows_of(record), record["printed"]
    assert record["what"] == "losses"
    assert set(rows) == {"plain DDP", "int8"}
    for row in rows.values():
        assert row["steps"] == [0, 3, 6]
        assert row["loss"][0] == rows["plain DDP"]["loss"][0]  # the same weights, the same windows
        assert row["sent_bytes"] == sorted(row["sent_bytes"])
        assert row["error"] == ""
        assert {"kind", "lr", "steps_to_target"} <= set(row)
    assert rows["plain DDP"]["sent_bytes"][-1] == 6 * 4 * record["parameters"]
    assert rows["int8"]["sent_bytes"][-1] < 0.3 * rows["plain DDP"]["sent_bytes"][-1]
    assert f"steps to {record['target']:.2f}" in " ".join(printed.split())


def test_steps_to_a_loss_are_counted_between_validations() -> None:
    row = {"steps": [0, 10, 20], "loss": [5.0, 3.0, 2.0]}
    assert benchmark().steps_to(5.5, row) == 0
    assert benchmark().steps_to(2.5, row) == pytest.approx(15)
    assert benchmark().steps_to(1.9, row) is None


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--only 'plain': expected a row's name, one of no communication, plain DDP, "):
        benchmark().chosen_ways(["int4"], ["plain", "DDP"], "no communication", None)


def test_muon_has_rows_of_its_own() -> None:
    rows = benchmark().chosen_ways(["int4"], None, "no communication", None, "muon")
    assert [way.name for way in rows] == ["no communication", "plain DDP", "EF21Muon int4"]
    with pytest.raises(ValueError, match=r"--only .int4.: expected a row.s name, one of .* EF21Muon int4, "):
        benchmark().chosen_ways(["int4"], ["int4"], "no communication", None, "muon")


def test_losses_by_another_optimizer_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["training.py", "--loss", "3", "--optimizer", "muon"]
    with mock.patch.object(sys, "argv", arguments), pytest.raises(SystemExit):
        benchmark().main()
    assert "--optimizer muon: --loss trains by SGD, expected sgd" in capsys.readouterr().err


def test_what_comes_every_few_steps_is_spread_over_them() -> None:
    assert benchmark().by_period([1.0, 1.0, 4.0, 1.0, 1.0, 7.0], 3) == [2.0, 3.0]


def benchmark() -> ModuleType:
    """benchmarks/training.py; `training` is another module here."""
    spec = importlib.util.spec_from_file_location("benchmarks_training", BENCHMARKS / "training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
