"""The HTML report and the command line around it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from commpress.launch import report

TRAFFIC = {"received_bytes": 1, "encode": 0.1, "wire": 0.2, "decode": 0.05, "exposed": 0.1}


def record(spec: str, sent: int, final: float | None, **changes: object) -> report.Record:
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
    runs = [record("int4", 100, 3.0, settings={"compress": "int4", "out": out}) for out in ("a", "b", None)]
    assert report.titles(runs) == ["int4 (a)", "int4 (b)", "int4 (run 3)"]


def test_a_run_that_sent_nothing_has_no_place_on_a_logarithmic_axis() -> None:
    report.page([record("none", 0, 3.1)])


def test_the_command_line(tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "deep" / "report.html"
    good.write_text(json.dumps(record("int4", 100, 3.0)))
    bad.write_text('{"settings": {}}')
    command = [sys.executable, "-m", "commpress.launch.cli", "report", out]
    done = subprocess.run([*command, good], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert out.read_text().count("int4")
    for path, message in ((bad, "it has no 'traffic'"), (tmp_path / "missing.json", "cannot be read as a run's")):
        with pytest.raises(ValueError, match=message):
            report.read(path)
    app = typer.Typer()
    app.command()(report.command)
    failed = CliRunner().invoke(app, [str(out), str(bad)])
    assert failed.exit_code == 1
    assert "not a run's record.json" in failed.stderr
