"""`commpress explain`: what people type, what it refuses, what it prints, and its predictions beside measured steps."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ended, run_command

from commpress.comm import cost
from commpress.comm import speed as codec_speed
from commpress.comm.cost import Cluster, Speed
from commpress.comm.plan import Plan
from commpress.launch import explain, predictions, speed
from commpress.launch.speed import Measured

SMALL = ("--params", "2m", "--world", "4", "--bandwidth", "1gbit")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured all the same, on less memory."""
    monkeypatch.setattr(codec_speed, "VALUES", 2**14)
    monkeypatch.setattr(speed, "SOCKET_BYTES", 2**21)


def called(*arguments: object) -> Ended:
    """The command, in a terminal wide enough for its table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return run_command("explain", *arguments)


def record(rate: str = "1gbit", **changes: Any) -> dict[str, Any]:
    """A step-time record."""
    link = {"hosts": 2, "ranks_per_host": 1, "rate": rate, "delay": "0ms", "loss": "0%", "shaped": True}
    rows = [
        {"name": "no communication", "kind": "floor", "seconds": 0.3, "quartiles": [0.3, 0.3, 0.3], "error": ""},
        {"name": "plain DDP", "kind": "torch", "seconds": 0.8, "quartiles": [0.8, 0.8, 0.8], "error": ""},
        {"name": "bf16_compress", "kind": "torch", "error": "RuntimeError: not on Gloo"},
        {"name": "power_sgd", "kind": "torch", "seconds": 0.5, "quartiles": [0.5, 0.5, 0.5], "error": ""},
        {"name": "int4", "kind": "commpress", "seconds": 0.4, "quartiles": [0.4, 0.4, 0.4], "error": ""},
    ]
    whole = {"what": "step times", "link": link, "machine": "EPYC, 2 cores", "world_size": 2, "parameters": 16_800_000}
    return {**whole, "rows": rows, **changes}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--params", "many"), "params 'many': expected a number of parameters above 0, such as 7e9, 7b or 350m"),
        (("--params", ""), "params ''"),
        (("--params", "0"), "params '0'"),
        (
            ("--bandwidth", "10gb"),
            "bandwidth '10gb': expected a number above 0 and kbit, mbit, gbit or tbit, such as 10gbit",
        ),
        (("--bandwidth", "0gbit"), "bandwidth '0gbit'"),
        (("--delay", "20"), "delay '20': expected a number and us, ms or s, such as 20ms"),
        (("--world", "1"), "world 1: expected the number of ranks, at least 2"),
        (("--spec", "int5"), "spec 'int5': unknown codec 'int5'"),
        (("--spec", "powersgd(4)"), "--spec powersgd(4): powersgd(4) sends whole matrices as factors"),
        (("--bucket-mb", "0"), "bucket-mb 0.0: expected a number above 0"),
        (("--ranks-per-host", "8"), "ranks-per-host 8: expected 1 to 4"),
        (("--step-seconds", "-1"), "step-seconds -1.0: expected a number from 1e-09 to 1e+06"),
        (("--cores", "-1"), "cores -1: expected a number above 0"),
        (("--device", "tpu"), "device 'tpu': expected cpu or cuda"),
        (("steps.json",), "steps.json: records are read with --check only"),
        (("--check",), "--check: expected at least one step-time record, got none"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value(arguments: tuple[str, ...], complaint: str) -> None:
    done = called(*SMALL, *arguments)
    assert done.code == 1
    assert complaint in done.err


def test_a_table_without_step_seconds_has_communication_alone(tmp_path: Path) -> None:
    path = tmp_path / "explain.json"
    done = called(*SMALL, "--spec", "int4", "--spec", "topk(0.01)", "--json", path)
    assert done.code == 0, done.err
    assert "needs --step-seconds" in done.out
    assert "hours a day" not in done.out
    assert "measured now on one core of this machine" in done.out
    saved = json.loads(path.read_text())
    dense, int4, topk = saved["rows"]
    buckets = cost.layout(2_000_000, 25 * 2**20)
    assert dense["sent_bytes"] == cost.sent_bytes(cost.DENSE, buckets, 4) == 12_000_000
    assert int4["sent_bytes"] == cost.sent_bytes(Plan.of("int4"), buckets, 4)
    assert int4["ratio"] == pytest.approx(dense["sent_bytes"] / int4["sent_bytes"])
    assert (int4["exchange"], topk["exchange"]) == ("two_shot", "one_shot")
    assert dense["communication_seconds"] >= 12_000_000 * cost.FRAME / 125e6
    assert int4["feedback_bytes"] == 4 * 2_000_000 * 5 // 4
    assert "step_seconds" not in int4


def test_hosts_of_several_ranks_get_rows_by_node(tmp_path: Path) -> None:
    path = tmp_path / "explain.json"
    done = called(*SMALL, "--spec", "int4", "--ranks-per-host", "2", "--json", path)
    assert "Of hierarchical the bytes inside a host count, too" in done.out
    dense, flat, by_node = json.loads(path.read_text())["rows"]
    assert [row["exchange"] for row in (dense, flat, by_node)] == ["all_reduce", "two_shot", "hierarchical(2)"]
    assert by_node["feedback_bytes"] == 4 * 2_000_000 * 3 // 4 - 2_000_000  # between two nodes nobody encodes again
    assert by_node["communication_seconds"] < dense["communication_seconds"]


def test_a_table_with_step_seconds_has_savings(tmp_path: Path) -> None:
    path = tmp_path / "explain.json"
    done = called("--params", "20m", "--world", "4", "--bandwidth", "1gbit", "--step-seconds", "0.5", "--json", path)
    assert done.code == 0, done.err
    assert all(f" {spec} " in done.out for spec in ("plain DDP", *explain.SPECS))
    assert "two thirds of it backward" in done.out
    rows = {row["spec"]: row for row in json.loads(path.read_text())["rows"]}
    dense, int4 = rows["none"], rows["int4"]
    assert 0.5 < int4["step_seconds"] < dense["step_seconds"]
    assert int4["saved_hours_a_day"] == pytest.approx(24 * (1 - int4["step_seconds"] / dense["step_seconds"]))
    steps = 86400 / dense["step_seconds"]
    assert int4["saved_bytes_a_day"] == pytest.approx(steps * 4 * (dense["sent_bytes"] - int4["sent_bytes"]))
    assert dense["saved_hours_a_day"] == dense["saved_bytes_a_day"] == 0


def test_bytes_are_in_mb_with_three_digits_whatever_their_size() -> None:
    assert [predictions.megabytes(n) for n in (0, 1, 4123, 68.4e6, 999.6e6, 7.112e9, -2.5e6, 9.96618e12)] == [
        "0", "0.00000100", "0.00412", "68.4", "1,000", "7,110", "-2.50", "9,970,000",
    ]  # fmt: skip


def test_the_tables_widest_rows_are_whole() -> None:
    """Of 1e18 parameters, with every column."""
    row = {"spec": "ZeroOneAdamW topk(0.01)|int4", "exchange": "hierarchical(8)", "ratio": 204.0}
    row |= {"sent_bytes": 4e18, "saved_bytes_a_day": 4e23, "feedback_bytes": 4e18, "communication_seconds": 1.23e-9}
    row |= {"step_seconds": 1.23e-9, "saved_hours_a_day": -123.4, "break_even": 1.2345e9}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", "80")
        predictions.show(predictions.table([row], "", known=True))
    assert "…" not in out.getvalue()
    assert "400,000,000,000,000,000 " in out.getvalue()


def test_break_even_in_words() -> None:
    assert [predictions.bits(b) for b in (None, math.inf, 1.25e9, 12.5e6, 2e12, 10.0)] == [
        "never", "any link", "10 Gbit/s", "100 Mbit/s", "16 Tbit/s", "80 bit/s",
    ]  # fmt: skip


def test_measured_speeds_are_those_that_a_codec_needs() -> None:
    here = Measured.here(["int4", "bf16", "topk(0.01)"], torch.device("cpu"))
    assert here.stack > 0
    assert all(speed.encode > 0 for speed in here.speeds.values())
    assert here.speeds["int4"].recode[0] > 0  # two_shot encodes a second time
    assert here.speeds["topk(0.01)"].recode == (0, 0)
    assert [here.speeds[s].add > 0 for s in ("none", "bf16", "int4")] == [True, True, False]


def test_predictions_beside_a_record() -> None:
    """The floor of the record, this machine's speeds, the record's link: rows that cannot be predicted are left out."""
    speed, dense = Speed(1e-9, (5e-10, 2e-10), (8e-10, 2e-10)), Speed(4e-10, (0, 0), (0, 0), 6e-10)
    here = Measured("a core", {"none": dense, "int4": speed}, 1e-10)
    found = explain.compared(record(), here)
    assert [(c.name, c.measured) for c in found] == [("plain DDP", 0.8), ("int4", 0.4)]
    cluster = Cluster(2, 125e6, cores=1, stack=1e-10)
    buckets = cost.layout(16_800_000, 25 * 2**20)
    for c, plan, known in zip(found, (cost.DENSE, Plan.of("int4")), (dense, speed), strict=True):
        assert c.predicted == pytest.approx(cost.step(plan, buckets, known, cluster, 0.3).seconds)
        assert c.error == pytest.approx(c.predicted / c.measured - 1)
    # a floor that varies makes the slowest rank late, and with it all; so do smaller and fewer buckets and more ranks
    floor = {"name": "no communication", "kind": "floor", "seconds": 0.3, "quartiles": [0.2, 0.3, 0.4]}
    late = explain.compared(record(rows=[floor, *record()["rows"][1:]]), here)
    assert all(b.predicted > a.predicted for a, b in zip(found, late, strict=True))
    crowded = explain.compared(record(world_size=4), here)
    assert all(b.predicted > a.predicted for a, b in zip(found, crowded, strict=True))


def test_links_with_loss_are_not_predicted_and_loopback_has_no_rate() -> None:
    here = Measured("a core", dict.fromkeys(("none", "int4"), Speed(0, (0, 0), (0, 0))), 0.0)
    lossy = record()
    lossy["link"]["loss"] = "0.1%"
    assert explain.compared(lossy, here) == []
    assert [c.predicted for c in explain.compared(record("loopback"), here)] == [pytest.approx(0.3)] * 2


def test_check_prints_errors_and_their_median(tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "out.json"
    first.write_text(json.dumps(record("100mbit")))
    second.write_text(json.dumps(record("10gbit")))
    done = called("--check", first, second, "--json", out)
    assert done.code == 0, done.err
    assert "median error" in done.out
    assert "over 4 rows" in done.out
    rows = json.loads(out.read_text())["rows"]
    assert [row["link"] for row in rows] == ["2 ranks, 100mbit, 0ms"] * 2 + ["2 ranks, 10gbit, 0ms"] * 2
    assert all(set(row) == {"link", "name", "predicted", "measured", "error"} for row in rows)


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"rows": []}', json.dumps(record(rows=[])), json.dumps(record("fast"))]
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    done = called("--check", path)
    assert done.code == 1
    assert f"error: {path}" in done.err
