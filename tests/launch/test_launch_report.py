"""The HTML report and the command line around it."""

import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import report_samples
from commands import run_command
from report_samples import PLAIN, compared

from commpress.comm.choice import Choice, Trial
from commpress.launch import figures, loss_figures, palette, records, report
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


def visible(html: str) -> str:
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)


def test_a_report_opens_with_the_gain_then_the_name_the_date_and_the_version() -> None:
    page = visible(
        report.page(
            [
                PLAIN,
                compared("auto", 125, 2.51, 0.1, "auto: int4"),
                compared("sign", 30, 2.9, 0.05),
            ]
        )
    )
    body = page[page.index("<body>") :].split("\n")
    assert body[1] == "<h1>auto chose int4: 8.0x fewer bytes a step, 2x faster, same loss (2.510, plain 2.500)</h1>"
    assert body[2].startswith('<p class="about">demo: none, auto, sign · 2026-11-30 05:42 UTC · commpress 0.1.0 · ')
    assert "<title>demo: none, auto, sign: commpress report</title>" in page


def test_the_report_of_one_run_opens_with_its_receipt() -> None:
    run = compared("int4", 125, 2.51, 0.1) | {
        "receipt": ["not compressed: 3 values a step, small", "commpress int4: paid"]
    }
    assert "<h1>commpress int4: paid</h1>" in report.page([run])


def test_what_auto_chose_stands_in_a_table_the_prediction_beside_the_measurement() -> None:
    trials = [
        Trial("none", 0.2, 0.21),
        Trial("int8", 0.1, 0.11, 0.01, 0.02),
        Trial("int4", 0.09, None, 0.9, hurt="its error"),
    ]
    made = [asdict(Choice("int4", 40, trials)), asdict(Choice("int8", 60, trials, "the means of int4 were <b>"))]
    run = compared("auto", 125, 2.51, 0.1, "auto: int8")
    run["report"]["choices"] = made
    page = visible(report.page([PLAIN, run]))
    chosen = page[page.index("<h2>What auto chose") :].split("<h2>")[1]
    assert "<p>auto: int4 at step 40, int8 at step 60 (the means of int4 were &lt;b&gt;)</p>" in chosen
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>.*</tr>", chosen)]
    assert rows[0] == [
        "run",
        "spec",
        "predicted ms a step",
        "measured ms a step",
        "error",
        "residual",
        "what became of it",
    ]
    assert rows[1:] == [
        ["auto", "none", "200.0", "210.0", "-", "-", ""],
        ["auto", "int8", "100.0", "110.0", "0.01", "0.02", "chosen"],
        ["auto", "int4", "90.0", "-", "0.90", "-", "hurt"],
    ]
    assert "What auto chose" not in report.page([PLAIN])


def test_what_differs_comes_first_and_what_is_the_same_last_and_folded() -> None:
    page = visible(report.page([PLAIN, compared("int4", 125, 2.5, 0.1, lr=0.2)]))
    titles = sections(page)
    assert titles[:2] == ["What differs", "Results"]
    assert titles[-1] == "Settings and machine"
    differs, end = page[page.index("What differs") : page.index("Results")], page[page.index("Settings and machine") :]
    assert re.findall(r"<tr><td>(.*?)</td>", differs) == ["compress", "lr"]
    assert "<td>0.1</td><td>0.2</td>" in differs
    assert end.index("<details>") < end.index("<td>ranks</td>")
    assert "lr" not in re.findall(r"<tr><td>(.*?)</td>", end)


def test_the_processor_is_told_as_lscpu_tells_it() -> None:
    end = visible(report.page([report_samples.run("int4", 4.0)])).partition("Settings and machine")[2]
    assert "<td>family 25, model 17, simd avx2 avx512f, l2_kib 1024</td>" in end


def test_the_numbers_that_matter_are_on_the_left() -> None:
    head, *_ = runs.summary([("none", PLAIN)])
    assert head == ["run", "fewer bytes", "ms/step", "loss", "against none", "MB/step", "steps"]


def traces(html: str) -> list[dict[str, object]]:
    """What plotly draws, of all figures of the page."""
    found = re.findall(r"Plotly\.newPlot\(\s*\S+\s*(\[.*?\]),\s*\{\"template", html, re.DOTALL)
    return [trace for figure in found for trace in json.loads(figure)]


def test_a_colour_has_one_meaning_on_the_whole_page(tmp_path: Path) -> None:
    html = report.page([read(path) for path in report_samples.write(tmp_path)])
    colours: dict[str, set[str]] = {}
    for trace in traces(html):
        marker, line = trace.get("marker", {}), trace.get("line", {})
        own = line.get("color") or marker.get("color")
        for colour in own if isinstance(own, list) else [own]:
            if str(colour).startswith("#"):
                colours.setdefault(str(trace["name"]), set()).add(str(colour))
    for name, phase in palette.PHASES.items():
        assert colours[name] == {phase}
    strong = {
        name: found for name, found in colours.items() if not found & {*palette.GREYS, palette.DENSE, palette.INK}
    }
    assert all(len(found) == 1 for found in colours.values()), colours
    assert len({colour for found in strong.values() for colour in found}) == len(strong), strong
    for name in ("int4", "none", "topk(0.01)|int4"):  # in the tables, too
        assert f'<span class="own" style="border-color: {next(iter(colours[name]))}">{name}</span>' in html


VISIONS = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no green": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no blue": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
"""Machado, Oliveira and Fernandes (2009), of linear RGB."""


def seen(colour: str, vision: str) -> tuple[float, float, float]:
    """A colour in CIE L*a*b* as those eyes see it."""
    rgb = [
        ((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    rgb = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, rgb, strict=True)))) for row in VISIONS[vision]]
    to_xyz = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8729))
    x, y, z = (sum(a * b for a, b in zip(row, rgb, strict=True)) for row in to_xyz)
    f, g, h = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * g - 16, 500 * (f - g), 200 * (g - h)


@pytest.mark.parametrize("vision", VISIONS)
def test_colour_blind_eyes_tell_them_apart(vision: str) -> None:
    for together in ((*palette.COLOURS[:3], palette.GREYS[0]), tuple(palette.PHASES.values())):
        for one, other in itertools.combinations(together, 2):
            assert math.dist(seen(one, vision), seen(other, vision)) > 15, (one, other)


def test_bytes_are_megabytes_in_every_table_and_figure(tmp_path: Path) -> None:
    html = report.page([read(path) for path in report_samples.write(tmp_path)])
    words = visible(html) + " ".join(
        re.findall(r'"text":"(.*?)"', re.sub(r"<script>/\*.*?</script>", "", html, count=1))
    )
    assert not re.search(
        r"\b[KG]i?B\b|\bMiB\b|\bbytes a step\b(?!.*<h1>)|\b\d+ B\b", words.replace("fewer bytes a step", "")
    )
    assert "MB" in words


def test_labels_stand_at_their_lines_and_off_each_other() -> None:
    close = {"none": (1.0, 0.2), "auto": (0.5, 0.21), "OneBitAdamW sign": (0.52, 0.22)}
    places = loss_figures.label_places(close, {name: len(name) + 6 for name in close})
    assert places["none"][0] is False  # no room on the right of the plot
    assert places["auto"][0] is True
    assert all(0 < up < 1 for _, up in places.values())
    assert abs(places["auto"][1] - places["OneBitAdamW sign"][1]) > 0.05


def test_loss_axes_leave_out_the_loss_of_a_model_that_knows_nothing() -> None:
    run = report_samples.run("none", 32.0)
    drawn = loss_figures.curves(
        [("none", run)], "s", lambda row: row["seconds"], False, figures.looks([("none", "torch")])
    )
    low, high = drawn.layout.yaxis.range
    found = [row["validation_loss"] for row in run["curve"] if row["validation_loss"]]
    assert low < min(found) < found[1] < high < found[0]
    assert [note.text for note in drawn.layout.annotations] == [f"<b>none {found[-1]:.3f}</b>"]
    assert not drawn.layout.showlegend


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
        "run0": [
            "Results",
            "Loss against bytes",
            "Loss against time",
            "Bytes and seconds a step",
            "Settings and machine",
        ],
    }.items():
        assert sections(report.page([read(tmp_path / f"{kind}.json")])) == expected
    assert len(sections(report.page([read(path) for path in paths]))) == 9


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
        f"plain DDP</span></td><td>{ddp['steps_to_target']}</td><td>{ddp['steps_to_target'] * seconds:,.1f}</td>"
        in html
    )
    assert "topk(0.01)</span></td><td></td><td>not reached</td>" in html
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
    drawn = {trace["name"]: trace for trace in traces(html)}
    assert list(drawn) == ["dense", "int8", "int4"]
    sizes = (400_000, 6_500_000, 6_500_000, 3_400_000)
    assert sorted(drawn["dense"]["x"]) == sorted(4 * n / 1e6 for n in (*sizes, *sizes))
    assert drawn["int8"]["x"] == [n / 1e6 for n in sizes]
    assert drawn["int4"]["text"][0] == "int4 0.200 MB"
    assert drawn["int4"]["hovertext"][:2] == ["0.200 MB, not compressed: small", "3.250 MB, int4 by two_shot"]


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
