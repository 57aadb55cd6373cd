"""One HTML file from any number of record.json: loss against bytes and time, bytes and seconds a step, the settings.

It needs nothing from the network: plotly's script is in it, once.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
import typer

Record = dict[str, Any]

COLOURS = ("#1f4e9c", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#475569")
PHASES = {"encode": "#1f4e9c", "wire": "#c2410c", "decode": "#15803d", "exposed": "#94a3b8"}
NEEDED = ("settings", "traffic", "curve", "steps_done", "median_step_seconds", "machine", "world_size", "backend")

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>commpress report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1e293b; margin: 0 auto; padding: 1rem; max-width: 62rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #cbd5e1; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.figure {{ margin: 1rem 0; }}
</style>
</head>
<body>
<h1>commpress report</h1>
{body}
</body>
</html>
"""


def read(path: Path) -> Record:
    """A run's record.json. Raises ValueError if it is not one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a run's record.json: {error}") from error
    missing = [key for key in NEEDED if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{path}: not a run's record.json, it has no {missing[0]!r}")
    return dict(record)


def page(records: Sequence[Record]) -> str:
    """The report as HTML. Raises ValueError without records."""
    if not records:
        raise ValueError("a report needs at least one record.json, got none")
    names = titles(records)
    runs = list(zip(names, records, strict=True))
    figures = [
        curves(runs, "Loss over bytes sent", "sent by one rank (MB)", lambda row: row["sent_bytes"] / 1e6, log=True),
        curves(runs, "Loss over training time", "training time (s)", lambda row: row["seconds"], log=False),
        bars(runs, "Bytes a step", "MB a step and rank", {"dense": ("dense_bytes", 1e6), "sent": ("sent_bytes", 1e6)}),
        bars(runs, "Seconds by phase", "ms a step", {phase: (phase, 1e-3) for phase in PHASES}),
    ]
    parts = [
        f'<div class="wide">{table(summary(runs))}</div>',
        "<p>Loss is in nats a byte. Bytes and seconds of communication are rank 0's. <em>Dense</em> is what DDP sends "
        "without compression. <em>Exposed</em> is what training waited for after its last gradient was ready; the "
        "other phases overlap with each other and with backward.</p>",
        *(
            f'<div class="figure">{as_html(figure, first=i == 0)}</div>'  # the first one brings the script along
            for i, figure in enumerate(figures)
        ),
        "<h2>Settings and machine</h2>",
        f'<div class="wide">{table(settings(runs))}</div>',
    ]
    return PAGE.format(body="\n".join(parts))


def titles(records: Sequence[Record]) -> list[str]:
    """A name for each run: its spec, and where two share one, their folder too."""
    specs = [str(r["settings"]["compress"]) for r in records]
    counts = Counter(specs)
    seen: Counter[str] = Counter()
    names = []
    for spec, record in zip(specs, records, strict=True):
        if counts[spec] > 1:
            seen[spec] += 1
            spec = f"{spec} ({record['settings'].get('out') or f'run {seen[spec]}'})"
        names.append(spec)
    return names


def summary(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """The table of results, its head first. "to none" is the loss less that of the first run whose spec is none."""
    head = ["spec", "steps", "dense MB/step", "sent MB/step", "ratio", "median ms/step", "val. loss", "to none"]
    base = next((r["final_validation_loss"] for _, r in runs if r["settings"]["compress"] == "none"), None)
    rows = []
    for name, r in runs:
        steps, traffic, final = max(r["steps_done"], 1), r["traffic"], r["final_validation_loss"]
        rows.append(
            [
                name,
                str(r["steps_done"]),
                *(f"{traffic[key] / 1e6 / steps:.3f}" for key in ("dense_bytes", "sent_bytes")),
                f"{traffic['ratio']:.1f}",
                f"{r['median_step_seconds'] * 1e3:.0f}",
                "not finished" if final is None else f"{final:.4f}",
                "" if final is None or base is None else f"{final - base:+.4f}",
            ]
        )
    return [head, *rows]


def settings(runs: Sequence[tuple[str, Record]]) -> list[list[str]]:
    """Settings, ranks and machine of each run, a column a run."""
    columns = [
        {
            **r["settings"],
            "parameters": r.get("parameters"),
            "text": (r.get("text") or {}).get("source"),
            "ranks": r["world_size"],
            "backend": r["backend"],
            "torch": r.get("torch"),
            **r["machine"],
        }
        for _, r in runs
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [["", *(name for name, _ in runs)], *([k, *(str(c.get(k, "")) for c in columns)] for k in keys)]


def curves(
    runs: Sequence[tuple[str, Record]], title: str, axis: str, x: Callable[[Record], float], log: bool
) -> go.Figure:
    """Training loss as a thin line and validation loss as a marked one, a colour a run."""
    figure = go.Figure()
    for i, (name, record) in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        for kind, key, style in (
            ("training", "train_loss", {"mode": "lines", "line": {"color": colour, "width": 1}, "opacity": 0.35}),
            ("validation", "validation_loss", {"mode": "lines+markers", "line": {"color": colour, "width": 2.5}}),
        ):
            # a logarithmic axis has no place for what came before the first byte
            rows = [row for row in record["curve"] if row[key] is not None and (not log or x(row) > 0)]
            figure.add_scatter(
                x=[x(row) for row in rows], y=[row[key] for row in rows], name=f"{escape(name)}, {kind}", **style
            )
    figure.update_xaxes(title=axis, type="log" if log else "linear")
    figure.update_yaxes(title="loss (nats a byte)")
    return styled(figure, title)


def bars(runs: Sequence[tuple[str, Record]], title: str, axis: str, series: dict[str, tuple[str, float]]) -> go.Figure:
    """A group of bars a run. `series` maps a legend to (the key in its traffic, the unit to divide by)."""
    figure = go.Figure()
    names = [escape(name) for name, _ in runs]
    for i, (legend, (key, unit)) in enumerate(series.items()):
        heights = [r["traffic"][key] / unit / max(r["steps_done"], 1) for _, r in runs]
        figure.add_bar(
            x=names,
            y=heights,
            name=legend,
            marker_color=PHASES.get(legend, COLOURS[i]),
            text=[f"{height:.3g}" for height in heights],
            textposition="outside",
            cliponaxis=False,
        )
    figure.update_yaxes(title=axis)
    return styled(figure, title)


def styled(figure: go.Figure, title: str) -> go.Figure:
    """The look that all figures share: it fits a phone, so the legend is below and margins are small."""
    figure.update_layout(
        title=title,
        template="plotly_white",
        autosize=True,
        margin={"l": 55, "r": 15, "t": 50, "b": 50},
        legend={"orientation": "h", "y": -0.25},
        font={"size": 13, "color": "#1e293b"},
    )
    figure.update_yaxes(automargin=True)
    return figure


def as_html(figure: go.Figure, first: bool) -> str:
    """A figure as a part of a page; the first of a page carries plotly's script."""
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=first,
        default_height="440px",
        config={"responsive": True, "displaylogo": False},
    )
    return html


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, its first row the head. Cells are escaped."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The report to write.")],
    records: Annotated[list[Path], typer.Argument(metavar="RECORD.json...", help="The record.json of each run.")],
) -> None:
    """Write one HTML report from the records of any number of runs."""
    try:
        html = page([read(path) for path in records])
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    typer.echo(f"report in {out}")
