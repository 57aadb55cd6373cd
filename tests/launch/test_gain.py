"""The demo's last line and a report's first: a sentence of the runs' own numbers, and what explain predicts beside them."""

import re

import pytest
import report_samples
from report_samples import PLAIN, compared

from commpress.launch import demo, foretold, gain, report
from commpress.launch.records import Record


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            compared("int4", 125, 2.5, 0.1),
            "int4: 8.0x fewer bytes a step, 2x faster, same loss (2.500, plain 2.500)",
        ),
        (
            compared("int8", 250, 2.6, 0.4),
            "int8: 4.0x fewer bytes a step, 2x slower, loss 4.0% higher (2.600, plain 2.500)",
        ),
        (
            compared("int8", 250, 2.4, 0.2),
            "int8: 4.0x fewer bytes a step, no faster and no slower, loss 4.0% lower",
        ),
        (
            compared("odd", 2000, 2.5, 0.2),
            "odd: 2.0x more bytes a step, no faster and no slower, same loss",
        ),
        (
            compared("auto", 1000, 2.5, 0.2, "auto: none"),
            "auto chose none, since no spec was faster on this link: the same bytes a step, no faster and no slower, same loss",
        ),
        (
            compared("auto", 250, 2.5, 0.1, "auto: int8, still looking"),
            "auto was still looking after 20 steps: 4.0x fewer bytes a step, 2x faster, same loss",
        ),
        (
            compared("auto", 125, 2.5, 0.1, "auto: int4, parameters int8"),
            "auto chose int4, parameters int8: 8.0x fewer bytes a step, 2x faster, same loss",
        ),
        (
            compared("auto", 125, 2.5, 0.1, "gradients auto, parameters int8; auto: int4"),
            "auto chose int4: 8.0x fewer bytes a step, 2x faster, same loss",
        ),
        (
            compared("auto", 250, 2.5, 0.1, "auto: int4, parameters int8, still looking"),
            "auto was still looking after 20 steps: 4.0x fewer bytes a step",
        ),
        (
            compared("auto", 125, 2.5, 0.1, "auto: int4") | {"traffic": {**PLAIN["traffic"], "ratio": 5.0}},
            "auto chose int4: 8.0x fewer bytes a step (5.0x with its search), 2x faster, same loss",
        ),
        (
            compared("sign", 30, 2.5, 0.1) | {"traffic": {**PLAIN["traffic"], "ratio": 18.0}},
            "sign: 33.3x fewer bytes a step (18.0x over the run), 2x faster, same loss",
        ),
        (
            compared("int4", 125, 2.5, 0.1) | {"final_validation_loss": None},
            "int4: 8.0x fewer bytes a step, 2x faster, its loss not known, as a run has not finished",
        ),
    ],
)
def test_the_sentence_says_what_was_measured_and_no_more(run: Record, expected: str) -> None:
    assert gain.headline([("none", PLAIN), (run["settings"]["compress"], run)]).startswith(expected)


def test_bytes_are_those_of_what_auto_chose_though_it_tries_another_spec_until_the_last_step() -> None:
    run = compared("auto", 125, 2.5, 0.1, "auto: int8")  # the curve is of int4
    rows = [
        {"spec": "none", "reason": "spec is none", "steps": 5, "dense_bytes": 4_500, "sent_bytes": 4_500},
        {"spec": "int8", "reason": "", "steps": 10, "dense_bytes": 9_000, "sent_bytes": 2_250},
        {"spec": "int4", "reason": "", "steps": 5, "dense_bytes": 4_500, "sent_bytes": 500},
        {"spec": "none", "reason": "an integer tensor", "steps": 20, "dense_bytes": 2_000, "sent_bytes": 2_000},
    ]
    run["report"] |= {"steps": 20, "rows": rows}
    told = gain.headline([("none", PLAIN), ("auto", run)])
    assert told.startswith("auto chose int8: 3.1x fewer bytes a step (8.0x with its search)")  # 10,000 to 3,250


def test_bytes_of_parameters_that_are_exchanged_too_are_not_left_out() -> None:
    run = compared("auto", 250, 2.5, 0.1, "auto: int4")
    row = {"spec": "int4", "role": "gradients", "reason": "", "steps": 20, "dense_bytes": 10_000, "sent_bytes": 1_250}
    beside = {"spec": "none", "role": "parameters", "reason": "spec is none", "sent_bytes": 3_750}
    run["report"] |= {"steps": 20, "rows": [row, row | beside]}
    assert gain.headline([("none", PLAIN), ("auto", run)]).startswith("auto chose int4: 4.0x fewer bytes a step, ")


def test_what_the_guard_has_turned_off_is_told_with_its_cause() -> None:
    run = compared("auto", 1000, 2.5, 0.2, "auto: none")
    trials = [
        {"spec": "none", "measured": 0.2},
        {"spec": "int4", "measured": 0.1, "hurt": "the loss was nan under int4"},
    ]
    run["report"]["choices"] = [{"spec": "none", "step": 9, "trials": trials, "cause": "the loss was nan under int4"}]
    told = gain.headline([("none", PLAIN), ("auto", run)])
    assert told.startswith("auto chose none, since the loss was nan under int4: the same bytes a step")


def test_of_several_runs_the_fastest_that_keeps_the_loss_is_told_and_others_models_say_nothing() -> None:
    fast, kept, other = (
        compared("sign", 30, 3.0, 0.05),
        compared("int4", 125, 2.5, 0.1),
        compared("int8", 250, 2.5, 0.01),
    )
    told = gain.headline([("none", PLAIN), ("sign", fast), ("int4", kept), ("int8", other | {"parameters": 999})])
    assert told.startswith("int4, the fastest of 2 that keeps the loss: 8.0x fewer")
    assert gain.headline([("int8", other), ("none", PLAIN | {"parameters": 7})]) == "receipt of int8"
    assert gain.headline([("int8", other | {"receipt": []})]).startswith(
        "int8: sent 0.000 MB a step, 4.0x fewer bytes a step"
    )


def test_one_with_steps_that_send_nothing_is_told_by_all_its_bytes() -> None:
    run = compared("topk", 100, 2.5, 0.1)
    for i, row in enumerate(run["curve"]):
        row["sent_bytes"] = i // 4 * 400
    assert gain.headline([("none", PLAIN), ("topk", run)]).startswith("topk: 10.0x fewer bytes a step, 2x faster")


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        ({"none": 0.2, "int8": 0.15, "int4": 0.1}, "predicts int4 2x faster than plain DDP"),
        ({"none": 0.1, "int8": 0.15, "int4": 0.2}, "predicts no gain either"),
    ],
)
def test_without_a_link_the_table_and_the_sentence_have_what_explain_predicts(
    seconds: dict[str, float], sentence: str
) -> None:
    told = foretold.Foretold("1 Gbit/s", [0.2, 0.1], seconds, {})
    assert told.sentence == f"on a link of 1 Gbit/s `commpress explain` {sentence}"
    records = [report_samples.run("none", 32.0), report_samples.run("int4", 4.0)]
    columns = demo.results(records, "loopback", told).columns
    assert [[*column.cells] for column in columns][-1] == ["200 ms", "100 ms"]
    assert "predicted, 1 Gbit/s" in [column.header for column in columns]
    assert "predicted, 1 Gbit/s" not in [column.header for column in demo.results(records, "1 Gbit/s").columns]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            report_samples.step_times(2, "1gbit", 1e3),
            r"1 Gbit/s, 2 hosts: \S+ is the fastest, .* faster than plain DDP",
        ),
        (report_samples.losses(), r"\S.* has the lowest held-out loss, \d\.\d+, with .* MB"),
        (report_samples.timeline(), "The median of 5 recorded steps took 224 ms"),
        (report_samples.judgement(), "70% of the values pruned, int8 static: 3.3x smaller; .*"),
        (
            {
                "what": "export",
                "of": "m",
                "rows": [{"format": "onnx", "path": "m.onnx", "bytes": 2e6, "difference": 0.0}],
            },
            "Exported as onnx; the smallest is onnx, 2.000 MB",
        ),
        (
            {"what": "explain", "params": 10, "world": 2, "bandwidth": 1e9, "device": "one core", "rows": []},
            "Nothing is predicted",
        ),
    ],
)
def test_a_report_of_any_other_kind_opens_with_its_result(record: Record, expected: str) -> None:
    found = re.search(r"<h1>(.*?)</h1>", report.page([record]))
    assert found is not None
    assert re.fullmatch(expected, found[1])
