"""Sums by bucket, their ratio, and the three forms of a report: text, dict, JSON."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from commpress.comm.meter import PHASES, Meter, Report


def metered() -> Meter:
    """Two steps: one bucket compressed, one too small."""
    meter = Meter()
    for _ in range(2):
        large = meter.row(0, 100_000, "float32", "int4", "two_shot", "")
        small = meter.row(1, 10, "float32", "none", "all_reduce", "fewer than 256 values")
        for row, dense, sent in ((large, 400_000, 51_600), (small, 40, 40)):
            row.steps += 1
            row.dense_bytes += dense
            row.sent_bytes += sent
            row.received_bytes += sent + 4
        large.seconds["encode"] += 0.25
        large.seconds["wire"] += 0.5
        small.seconds["wire"] += 0.125
        meter.steps += 1
        meter.exposed += 0.0625
        meter.hidden += 2.0
    return meter


def test_a_row_is_found_again_and_a_bucket_laid_out_anew_gets_a_new_one() -> None:
    meter = Meter()
    first = meter.row(0, 1000, "float32", "int4", "two_shot", "")
    assert meter.row(0, 1000, "float32", "int4", "two_shot", "") is first
    others = [
        meter.row(1, 1000, "float32", "int4", "two_shot", ""),
        meter.row(0, 1001, "float32", "int4", "two_shot", ""),
        meter.row(0, 1000, "bfloat16", "int4", "two_shot", ""),
        meter.row(0, 1000, "float32", "none", "all_reduce", "spec is none"),
    ]
    assert len({id(row) for row in (first, *others)}) == 5


def test_report_adds_up_its_rows() -> None:
    report = metered().report("int4", 1, 2)
    assert (report.spec, report.rank, report.world_size, report.steps) == ("int4", 1, 2, 2)
    assert report.dense_bytes == 2 * 400_040
    assert report.sent_bytes == 2 * 51_640
    assert report.received_bytes == 2 * 51_648
    assert report.ratio == pytest.approx(400_040 / 51_640)
    assert report.seconds == {"encode": 0.5, "wire": 1.25, "decode": 0.0, "exposed": 0.125, "hidden": 4.0}


def test_ratio_is_one_where_nothing_was_sent() -> None:
    assert Meter().report("int4", 0, 1).ratio == 1.0


def test_a_report_does_not_change_afterwards() -> None:
    meter = metered()
    report = meter.report("int4", 0, 2)
    row = meter.row(0, 100_000, "float32", "int4", "two_shot", "")
    row.sent_bytes += 1000
    row.seconds["encode"] += 1.0
    assert report.rows[0].sent_bytes == 2 * 51_600
    assert report.rows[0].seconds["encode"] == 0.5


def test_text_says_how_and_why_not() -> None:
    text = str(metered().report("int4", 0, 2))
    assert "commpress int4: rank 0 of 2, 2 steps" in text
    assert "int4 by two_shot" in text
    assert "not compressed: fewer than 256 values" in " ".join(text.replace("│", " ").split())
    assert "100,000" in text
    assert "0.400" in text  # MB a step, dense
    assert "0.052" in text  # MB a step, sent
    assert "7.7" in text  # the ratio
    assert "2000.00 ms hidden, 62.50 ms" in text


def test_text_of_a_bucket_that_was_not_there_in_every_step() -> None:
    meter = metered()
    meter.row(0, 5000, "float32", "int4", "two_shot", "").steps += 1
    assert "0 (1 steps)" in str(meter.report("int4", 0, 2))


def test_text_before_the_first_step() -> None:
    assert "0 steps" in str(Meter().report("sign", 0, 4))


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    report = metered().report("topk(0.01)|int4", 0, 2)
    path = tmp_path / "report.json"
    report.write_json(path)
    read = json.loads(path.read_text())
    assert read == report.to_dict()
    assert read["ratio"] == report.ratio
    assert [row["reason"] for row in read["rows"]] == ["", "fewer than 256 values"]
    assert set(read["rows"][0]["seconds"]) == set(PHASES)
    assert isinstance(report, Report)


def test_several_sessions_make_one_report_with_the_roles_apart() -> None:
    outer = Meter()
    row = outer.row(0, 100_000, "float32", "topk(0.01)|int2", "one_shot", "", "outer")
    row.steps, row.dense_bytes, row.sent_bytes, row.received_bytes = 1, 800_000, 2_000, 2_000
    outer.steps = 2
    both = Report.merge(metered().report("int4", 1, 2), outer.report("topk(0.01)|int2", 1, 4))
    assert (both.spec, both.rank, both.world_size, both.steps) == ("int4; topk(0.01)|int2", 1, 4, 2)
    assert both.roles == {
        "gradients": {"dense_bytes": 800_080, "sent_bytes": 103_280, "received_bytes": 103_296},
        "outer": {"dense_bytes": 800_000, "sent_bytes": 2_000, "received_bytes": 2_000},
    }
    assert (both.dense_bytes, both.sent_bytes) == (1_600_080, 105_280)
    assert both.seconds["encode"] == 0.5
    text = str(both)
    assert "all gradients" in text
    assert "all outer" in text
    assert "outer 0 (1" in text
    assert both.to_dict()["roles"] == both.roles


def test_rules_of_one_spec_share_what_they_send_together() -> None:
    meter = Meter()
    for steps, spec in ((1, "none"), (3, "int4")):  # auto tries two
        row = meter.row(0, 1000, "float32", spec, "all_reduce", "", "gradients", {"[ab]*: none": 250, "*: none": 750})
        row.steps, row.dense_bytes, row.sent_bytes = steps, 4000 * steps, 2000 * steps
    alone = meter.row(1, 500, "float32", "none", "all_reduce", "", "gradients", {"[ab]*: none": 0, "*: none": 500})
    alone.steps, alone.dense_bytes, alone.sent_bytes = 4, 8000, 8000
    meter.steps = 4
    report = meter.report("[ab]*: none, *: none", 0, 2)
    assert report.rules == {
        "[ab]*: none": {
            **{"values": 250, "dense_bytes": 4000, "sent_bytes": 2000, "received_bytes": 0},
            "ratio": 2.0,
        },
        "*: none": {
            **{"values": 1250, "dense_bytes": 20_000, "sent_bytes": 14_000, "received_bytes": 0},
            "ratio": pytest.approx(20 / 14),
        },
    }
    assert report.to_dict()["rules"] == report.rules
    text = str(report)
    assert "commpress [ab]*: none, *: none: rank 0 of 2" in text
    rows = [line for line in text.splitlines() if "by rule" in line]
    assert [line.split()[1:4] for line in rows] == [["[ab]*:", "none", "│"], ["*:", "none", "│"]]
    assert "1,250" in rows[1]


def test_without_rules_there_is_no_row_of_one() -> None:
    report = metered().report("int4", 0, 2)
    assert report.rules == {}
    assert "by rule" not in str(report)


def test_no_reports_are_not_one() -> None:
    with pytest.raises(ValueError, match="got 0 reports"):
        Report.merge()


def test_a_log_has_means_of_the_steps_since_an_earlier_report() -> None:
    meter = metered()
    first = meter.report("int4", 0, 2)
    assert first.log() == pytest.approx(
        {
            **{"commpress/sent_mb_per_step": 0.05164, "commpress/ratio": 400_040 / 51_640},
            **{"commpress/ratio_bf16": 200_020 / 51_640, "commpress/encode_ms": 250.0, "commpress/wire_ms": 625.0},
            **{"commpress/decode_ms": 0.0, "commpress/exposed_ms": 62.5, "commpress/hidden_ms": 2000.0},
        }
    )
    row = meter.row(0, 100_000, "float32", "int4", "two_shot", "")
    row.dense_bytes += 400_000
    row.sent_bytes += 100_000
    meter.steps += 4
    meter.exposed += 1.0
    second = meter.report("int4", 0, 2)
    assert second.log(first) == pytest.approx(
        {
            **{"commpress/sent_mb_per_step": 0.025, "commpress/ratio": 4.0, "commpress/ratio_bf16": 2.0},
            **{f"commpress/{phase}_ms": 0.0 for phase in (*PHASES, "hidden")},
            "commpress/exposed_ms": 250.0,
        }
    )
    assert second.log(second) == {}
    assert all(type(value) in (int, float) for value in second.log().values())


def test_a_log_has_each_role_where_there_are_several_and_no_ratio_of_nothing() -> None:
    meter = metered()
    buffers = meter.row(0, 100, "int64", "none", "broadcast", "", "buffers")
    buffers.dense_bytes += 1000
    found = meter.report("int4", 0, 2).log()
    assert found["commpress/gradients/ratio"] == pytest.approx(400_040 / 51_640)
    assert found["commpress/buffers/sent_mb_per_step"] == 0.0
    assert "commpress/buffers/ratio" not in found
    assert found["commpress/ratio_bf16"] == pytest.approx((400_040 + 1000) / (2 * 51_640))  # integers stay as they are


def test_a_notebook_shows_the_same_table_escaped_and_without_scripts() -> None:
    meter = metered()
    meter.row(
        2, 5, "float32", "none", "all_reduce", "<script>alert(1)</script> [b]", rules={"[ab]*: <i>": 5}
    ).steps += 1
    report = meter.report("*: <b>int4", 0, 2)
    page = report._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [b]" in page
    assert "<caption>commpress *: &lt;b&gt;int4: rank 0 of 2, 2 steps</caption>" in page
    root = ElementTree.fromstring(f"<div>{page}</div>")  # every tag is closed
    cells = ["".join(cell.itertext()) for cell in root.iter() if cell.tag in ("td", "th")]
    text = str(report)
    assert [cell for cell in cells if cell and cell not in text and " " not in cell] == []
    assert len(list(root.iter("tr"))) == 1 + 3 + 2
