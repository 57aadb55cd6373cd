"""The benchmark of training steps: its PowerSGD is right, its records hold what they promise, and what fails says why."""

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
import torch
import torch.distributed as dist
from commands import started_by_torchrun
from ranks import run
from torch import Tensor, nn

from commpress.launch.model import Shape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from peers import counted  # noqa: E402
from powersgd import PowerSGD  # noqa: E402

INPUTS, HIDDEN, OUTPUTS = 20, 30, 8
VALUES = (HIDDEN, INPUTS), (OUTPUTS, HIDDEN), (HIDDEN, HIDDEN)
"""Shapes of the matrices of `network()`."""
VECTORS = HIDDEN + OUTPUTS + HIDDEN


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, OUTPUTS))


def exchanged(rank: int, steps: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Over some steps: the sums of what PowerSGD returned and of the true means, what it still holds, bytes of each call."""
    model, generator = network(), torch.Generator().manual_seed(dist.get_rank())
    parameters = list(model.parameters())
    powersgd = PowerSGD(parameters, rank)
    returned = [torch.zeros_like(p) for p in parameters]
    true = [torch.zeros_like(p) for p in parameters]
    held = [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        x = torch.randn(5, INPUTS, generator=generator)
        for sum_, gradient in zip(true, torch.autograd.grad(model(x).square().sum(), parameters), strict=True):
            dist.all_reduce(gradient)
            sum_ += gradient / dist.get_world_size()
        powersgd.carry()
        model(x).square().sum().backward()
        with counted() as sent:
            powersgd.exchange()
        for sum_, p in zip(returned, parameters, strict=True):
            sum_ += p.grad
    powersgd.carry()
    for sum_, p in zip(held, parameters, strict=True):
        if p.grad is not None:
            dist.all_reduce(sum_.copy_(p.grad))
            sum_ /= dist.get_world_size()
    return returned, true, held, sent


def test_powersgd_of_full_rank_is_the_mean() -> None:
    returned, true, _, _ = run(2, exchanged, HIDDEN, 1)[0]
    for mine, mean in zip(returned, true, strict=True):
        torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-4)


def test_powersgd_loses_nothing_and_ranks_agree_bit_for_bit() -> None:
    results = run(3, exchanged, 2, 4)
    for ours in zip(*(returned for returned, _, _, _ in results), strict=True):
        assert all(torch.equal(ours[0], other) for other in ours)
    returned, true, held, _ = results[0]
    assert any(lost.abs().max() > 0.1 for lost in held)  # rank 2 does lose something
    for mine, mean, lost in zip(returned, true, held, strict=True):
        torch.testing.assert_close(mine + lost, mean, rtol=1e-3, atol=1e-3)


def test_powersgd_sends_the_bytes_of_the_papers_formula() -> None:
    _, _, _, sent = run(2, exchanged, 4, 1)[0]
    assert len(sent) == 2
    assert sum(sent) == 4 * (
        sum(4 * (rows + columns) for rows, columns in VALUES) + VECTORS
    )  # W = 2: 2 (W - 1) / W = 1


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


@pytest.mark.slow
def test_a_step_time_record_holds_what_it_promises_and_a_hook_that_fails_says_why(tmp_path: Path) -> None:
    names = ("plain DDP", "torch bf16", "PowerSGD rank 4", "int4", "bagua")
    record = run_tiny(tmp_path, "int4", "--rounds", "1", "--steps", "2", "--only", *names)
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
    assert set(rows) == {"plain DDP", "PowerSGD rank 4", "int8"}
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
