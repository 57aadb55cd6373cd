"""The HTML report and the command line around it."""

import json
import re
from pathlib import Path

import pytest
import report_samples
from commands import run_command

from commpress.launch import figures, records, report
from commpress.launch.records import Record, read
from commpress.launch.sections import benchmarks, runs, timelines

TRAFFIC = {"received_bytes": 1, "encode": 0.1, "wire": 0.2, "decode": 0.05, "exposed": 0.1}


def record(spec: str, sent: int, final: float | None, **changes: object) -> Record:
    rows = [
        {"step": i, "train_loss": 5.0 - i, "validation_loss": 5.1 - i, "seconds": i / 10, "sent_bytes": i * sent}
        for i in range(3)
    ]
    return {
        "settings": {"compress": spec, "out": f"runs/{spec}"},
        "traffic": {"dense_bytes": 2000, "sent_bytes": 2 * sent, "ratio": 1000 / sent if sent else 1.0, **TRAFFIC},
        "curve": rows,
        "steps_done": 2,
        "median_step_seconds": 0.1,
        "final_validation_loss": final,
        "machine": {"processor": "<a processor>"},
        "world_size": 2,
        "backend": "gloo",
        **changes,
    }


def test_the_page_stands_alone_and_names_every_run() -> None:
    html = report.page([record("none", 1000, 3.1), record("topk(0.1)|int4", 30, 3.2), record("<b>", 10, None)])
    assert "topk(0.1)|int4" in html
    assert "&lt;b&gt;" in html
    assert "<b>" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?https?:", html)
    assert html.count("plotly.js v") == 1
    assert '<meta name="viewport"' in html
    assert "+0.1000" in html
    assert "not finished" in html
    assert html.count('class="plotly-graph-div"') == 4


def test_runs_of_one_spec_are_told_apart() -> None:
    records = [record("int4", 100, 3.0, settings={"compress": "int4", "out": out}) for out in ("a", "b", None)]
    assert runs.titles(records) == ["int4 (a)", "int4 (b)", "int4 (run 3)"]


def test_a_run_that_sent_nothing_has_no_place_on_a_logarithmic_axis() -> None:
    report.page([record("none", 0, 3.1)])


def test_a_folder_of_a_run_is_a_page_with_its_sizes_and_latencies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = {"record.json": record("int4", 100, 3.0), "judged/judgement.json": report_samples.judgement()}
    row = {"format": "onnx", "path": "model.onnx", "bytes": 1234567, "difference": 1e-6}
    failed = ["integer cannot be written: ValueError: softmax of '1'"]
    files["exported/export.json"] = {"what": "export", "of": "runs/small", "failed": failed, "rows": [row]}
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))
    (run / "ending.json").write_text("{}")  # none of a report's
    assert run_command("report", run) == (0, f"report in {run / 'report.html'}\n", "")
    html = (run / "report.html").read_text()
    assert "<h2>Exported files</h2>" in html
    assert "1.235" in html
    assert "softmax of &#x27;1&#x27;" in html
    assert "ms a call, median" in html
    assert "int4" in html
    assert run_command("report", tmp_path / "more.html", run, run / "record.json").code == 0
    (tmp_path / "empty").mkdir()
    for given in ((tmp_path / "empty",), (tmp_path / "page.html", tmp_path / "empty")):
        code, _, err = run_command("report", *given)
        assert code == 1
        assert "empty: a folder without record.json, search.json, " in err
    code, _, err = run_command("report", tmp_path / "page.html")
    assert (code, "expected files of runs after the page to write" in err) == (1, True)


def test_the_command_line(tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "deep" / "report.html"
    good.write_text(json.dumps(record("int4", 100, 3.0)))
    bad.write_text('{"settings": {}}')
    assert run_command("report", out, good) == (0, f"report in {out}\n", "")
    assert out.read_text().count("int4")
    for path, message in ((bad, "it has no 'traffic'"), (tmp_path / "missing.json", "cannot be read as a run's")):
        with pytest.raises(ValueError, match=message):
            read(path)
    failed = run_command("report", out, bad)
    assert failed.code == 1
    assert "not a run's record.json" in failed.err


def sections(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_only_sections_for_which_there_is_data_appear(tmp_path: Path) -> None:
    paths = report_samples.write(tmp_path)
    for kind, expected in {
        "steps0": ["Step time against bandwidth"],
        "losses": ["Loss against bytes"],
        "trace-rank0": ["Timeline of a step"],
        "run0": ["Loss against bytes", "Loss against time", "Bytes and seconds a step", "Settings and machine"],
    }.items():
        assert sections(report.page([read(tmp_path / f"{kind}.json")])) == expected
    assert len(sections(report.page([read(path) for path in paths]))) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"what": "weather"}, "expected one of a run's record.json, a record of step times, .* found none of them"),
        ({"machine": ...}, "not a record of step times, it has no 'machine'"),
        ({"rows": [{"name": "int4", "kind": "commpress"}]}, "not a record of step times: row 0, it has no 'seconds'"),
        ({"link": {"hosts": 2}}, "the link, it has no 'ranks_per_host'"),
        ({"link": {**report_samples.step_times(2, "fast", 1.0)["link"]}}, "rate 'fast': expected a number above 0"),
    ],
)
def test_a_file_that_is_none_is_named_with_the_reason(tmp_path: Path, change: dict[str, object], message: str) -> None:
    changed = {**report_samples.step_times(2, "1gbit", 1e3), **change}
    path = tmp_path / "some.json"
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    with pytest.raises(ValueError, match=rf"some\.json: .*{message}"):
        read(path)


@pytest.mark.parametrize("text", ["[]", '{"traceEvents": [{"ph": "X", "name": "aten::add", "ts": 0, "dur": 1}]}'])
def test_other_json_is_none_either(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"some\.json: (expected one of|not a timeline of a session: no span of forward)"
    ):
        read(path)


def test_step_times_are_sorted_by_rate_and_repeated_ones_are_their_median() -> None:
    measured = [report_samples.step_times(2, rate, mbit) for rate, mbit in (("1gbit", 1e3), ("100mbit", 1e2))]
    again = [json.loads(json.dumps(measured[1])) for _ in range(2)]
    again[0]["rows"][1]["ratio"], again[1]["rows"][1]["ratio"] = 900.0, 17.0
    ratios, _ = benchmarks.ratios_by_rate([*measured, *again])
    slow, fast = (m["rows"][1]["ratio"] for m in measured[::-1])
    assert ratios["plain DDP"] == {1e8: max(slow, 17.0), 1e9: fast}
    assert list(ratios["plain DDP"]) == [1e8, 1e9]
    assert "bf16 hook" not in ratios
    html = report.page(measured)
    assert "RuntimeError: bf16 is not supported by Gloo" in html
    assert html.count("<td>bf16 hook</td>") == 1  # the same reason on both links


def test_delays_and_hosts_have_figures_of_their_own() -> None:
    links = [(2, "1gbit", 1e3, "0ms"), (2, "100mbit", 1e2, "0ms"), (2, "1gbit", 1e3, "20ms"), (4, "1gbit", 1e3, "0ms")]
    html = report.page([report_samples.step_times(*link) for link in links])
    assert re.findall(r"<h3>(.*? ranks.*?)</h3>", html) == [
        "2 hosts, 2 ranks",
        "2 hosts, 2 ranks, 20ms delay",
        "4 hosts, 4 ranks on 2 cores",
    ]
    assert html.count('class="plotly-graph-div"') == 3


def test_time_to_a_loss_is_its_steps_times_the_step_of_each_link() -> None:
    losses, measured = report_samples.losses(), report_samples.step_times(2, "100mbit", 1e2)
    html = report.page([losses, measured])
    ddp = next(row for row in losses["rows"] if row["name"] == "plain DDP")
    seconds = next(row["seconds"] for row in measured["rows"] if row["name"] == "plain DDP")
    assert (
        f"<td>plain DDP</td><td>{ddp['steps_to_target']}</td><td>{ddp['steps_to_target'] * seconds:,.1f}</td>" in html
    )
    assert "<td>topk(0.01)</td><td></td><td>not reached</td>" in html
    # step times of another number of ranks say nothing about these losses
    assert "Loss against time" not in report.page([losses, report_samples.step_times(4, "100mbit", 1e2)])


def test_ours_are_strong_and_others_grey_and_dashed() -> None:
    look = figures.looks([("no communication", "floor"), ("plain DDP", "torch"), ("int4", "commpress"), ("x", "peer")])
    assert look["int4"].dash == look["no communication"].dash == "solid"
    assert look["int4"].colour in figures.COLOURS
    for name in ("plain DDP", "x"):
        assert look[name].dash != "solid"
        assert look[name].colour in figures.GREYS
        assert look[name].width < look["int4"].width


def test_buckets_of_the_first_layout_are_in_the_table_only() -> None:
    both = [(name, report_samples.run(name, bits)) for name, bits in (("int8", 8.0), ("int4", 4.0))]
    html = "".join(runs.bytes_by_bucket(both, figures.looks((name, "commpress") for name, _ in both)))
    assert html.count("<td>16,800,000</td><td>1</td>") == 2
    drawn = json.loads(re.search(r"Plotly\.newPlot\(\s*\S+\s*(\[.*?\]),\s*\{\"template", html, re.DOTALL)[1])
    assert [trace["name"] for trace in drawn] == ["dense", "int8", "int4"]
    assert drawn[0]["x"] == ["0", "1", "2", "3"]
    assert drawn[0]["y"] == [4 * n for n in (400_000, 6_500_000, 6_500_000, 3_400_000)]
    assert drawn[1]["y"] == [400_000, 6_500_000, 6_500_000, 3_400_000]
    assert drawn[2]["hovertext"][:2] == ["not compressed: small", "int4 by two_shot"]


def test_what_a_recipe_left_and_its_phases() -> None:
    record = report_samples.run("int4", 4.0)
    first, second = ({**row, "phase": name} for name in ("prune", "pruned") for row in record["report"]["rows"][1:2])
    phases = {"prune": {"steps": 299, "dense_bytes": 299 * 8_000_000, "sent_bytes": 299 * 1_000_000}}
    small = {"bytes": 6_300_000, "times_smaller": 10.7, "sparsity": 0.8, "validation_loss": 2.3456}
    html = report.page([{**record, "report": {"rows": [first, second], "phases": phases}, "small_model": small}])
    for told in ("By recipe", "80%", "10.7", "2.3456", "prune", "8.0", f"<td>{2 * 299}</td>"):
        assert told in html, told
    assert "By recipe" not in report.page([record])


def test_a_timeline_has_a_trace_a_phase_and_shows_the_median_step() -> None:
    record = report_samples.timeline()
    by_step = {step: [e for e in records.spans(record) if e["args"]["step"] == step] for step in range(5)}
    lengths = {step: timelines.lasted(events) for step, events in by_step.items()}
    assert lengths == pytest.approx({0: 217, 1: 227.5, 2: 220.5, 3: 231, 4: 224})
    chosen = timelines.three_steps(lengths)
    assert chosen == {"median: step 4, 224 ms": 4, "fastest: step 0, 217 ms": 0, "slowest: step 3, 231 ms": 3}
    assert timelines.three_steps({7: 10.0}) == {"median: step 7, 10 ms": 7}
    steps = {label: [timelines.block(e, by_step[s][0]["ts"]) for e in by_step[s]] for label, s in chosen.items()}
    figure = figures.timeline(steps, {0: "training", 1: "encode", 2: "wire", 3: "wire", 4: "decode"})
    assert [trace.name for trace in figure.data] == list(records.SPANS)
    wire = figure.data[3]
    assert len(wire.x) == 12
    assert len(set(wire.y)) == 2  # transfers that overlap lie beside each other
    assert wire.base[0] == pytest.approx(85)
    assert wire.hovertext[0] == "bucket 0, step 4, 19.20 ms"
    assert len(figure.layout.updatemenus[0].buttons) == 3
