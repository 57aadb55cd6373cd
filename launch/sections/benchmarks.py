"""Sections about benchmarks and predictions: step time against bandwidth, loss against bytes and time, `commpress explain`."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from commpress.launch import figures, loss_figures, units
from commpress.launch.records import Record, conditions, link_name, model_name, ran
from commpress.launch.sections.html import figure, megabytes, numbers, table
from commpress.launch.sections.runs import curve_rows


def predictions(explained: Sequence[Record], checked: Sequence[Record]) -> list[str]:
    """The tables of `commpress explain --json` and `commpress probe --json`: what they predict, and what was checked."""
    parts = ["<h2>Predictions</h2>"] if explained or checked else []
    for r in explained:
        rows = [["spec", "exchange", "sent MB a step", "ratio", "communication s", "a step s", "pays below"]]
        for row in r["rows"]:
            figures_of = (megabytes(row["sent_bytes"]), f"{row['ratio']:.1f}", f"{row['communication_seconds']:.3g}")
            step = "" if row.get("step_seconds") is None else f"{row['step_seconds']:.3g}"
            rows.append([str(row["spec"]), str(row["exchange"]), *figures_of, step, str(row.get("break_even", ""))])
        link = units.bandwidth(r["bandwidth"] * 8)
        parts += [f"<p>{r['params']:,} parameters, {r['world']} ranks, {escape(link)} links.</p>", table(rows)]
        parts += [f"<p>{escape(str(r['answer']))}</p>"] if "answer" in r else []
    for r in checked:
        rows = [["link", "row", "predicted s", "measured s", "error"]]
        for row in r["rows"]:
            seconds = (f"{row[key]:.3f}" for key in ("predicted", "measured"))
            rows.append([str(row["link"]), str(row["name"]), *seconds, f"{row['error']:+.0%}"])
        parts += [f"<p>{escape(str(r['answer']))}.</p>", table(rows)]
    return parts


def step_time(measured: Sequence[Record], look: Mapping[str, figures.Look]) -> list[str]:
    """Step time against bandwidth: a figure for each model and kind of link."""
    if not measured:
        return []
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in measured:
        model = f"{r['model']}, {r['parameters'] / 1e6:.1f} M parameters, {r['tokens_per_step']} tokens a step"
        groups.setdefault((model, conditions(r)), []).append(r)
    parts = [
        "<h2>Step time against bandwidth</h2>",
        "<p>Medians of one step against those of the same steps without communication, in the same run. "
        "Lower is better: a flat line near 1 is the aim.</p>",
    ]
    for (model, where), group in groups.items():
        ratios, hover = ratios_by_rate(group)
        parts += [f"<h3>{escape(where)}</h3>", f"<p>{escape(model)}.</p>"]
        if group[0]["link"]["shaped"]:
            parts.append(figure(figures.step_times(ratios, hover, look)))
        elif ratios:
            bars = {
                name: [figures.Bar(name, points[0.0], look[name].colour, f"{points[0.0]:.2f}", hover[name][0])]
                for name, points in ratios.items()
            }
            parts.append(figure(figures.bars(bars, "step time, no communication = 1")))
        parts.append(numbers(table(step_time_rows(group), look=look)))
    failed: dict[tuple[str, str, str], list[str]] = {}
    for r in measured:
        for row in r["rows"]:
            if not ran(row):
                key = (row["name"], row["kind"], row["error"])
                failed.setdefault(key, []).append(link_name(r["link"], hosts=True))
    if failed:
        rows = [
            [name, kind, "all" if len(links) == len(measured) else "; ".join(dict.fromkeys(links)), error]
            for (name, kind, error), links in failed.items()
        ]
        parts += ["<h3>What did not run</h3>", table([["name", "kind", "links", "reason"], *rows], text=True)]
    return parts


def ratios_by_rate(group: Sequence[Record]) -> tuple[dict[str, dict[float, float]], dict[str, list[str]]]:
    """{name: {bits a second: ratio}}, and a text for each; rate 0 where links have none. Of repeated runs, medians."""
    found: dict[str, dict[float, list[Record]]] = {}
    for r in group:
        rate = units.rate(r["link"]["rate"]) if r["link"]["shaped"] else 0.0
        for row in filter(ran, r["rows"]):
            found.setdefault(row["name"], {}).setdefault(rate, []).append(row)
    ratios, hover = {}, {}
    for name, by_rate in found.items():
        points = sorted(by_rate.items())
        ratios[name] = {rate: statistics.median(row["ratio"] for row in rows) for rate, rows in points}
        hover[name] = [
            f"{ratios[name][rate]:.2f}x, {statistics.median(row['seconds'] for row in rows):.3g} s a step"
            + (f", {rows[0]['sent_bytes'] / 1e6:.3g} MB" if rows[0].get("sent_bytes") is not None else "")
            for rate, rows in points
        ]
    return ratios, hover


def step_time_rows(group: Sequence[Record]) -> list[list[str]]:
    """The numbers behind a figure of step times."""
    phases = ("encode", "wire", "decode", "exposed", "hidden")
    head = ["name", "link", "s a step", "middle half", "to none", "tokens/s", "MB claimed", "MB by kernel"]
    rows = [[*head, *(f"{phase} ms" for phase in phases)]]
    for r in group:
        for row in filter(ran, r["rows"]):
            low, high = row["quartiles"][0], row["quartiles"][-1]
            parts = row.get("phases") or {}
            rows.append(
                [
                    row["name"],
                    link_name(r["link"]),
                    f"{row['seconds']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{row['ratio']:.2f}x",
                    f"{row['tokens_per_second']:,.0f}",
                    *(megabytes(row.get(key)) for key in ("sent_bytes", "kernel_bytes")),
                    *(f"{parts[phase] * 1e3:.1f}" if phase in parts else "" for phase in phases),
                ]
            )
    return rows


def loss_against_bytes(
    runs: Sequence[tuple[str, Record]], measured: Sequence[Record], look: Mapping[str, figures.Look]
) -> list[str]:
    """A figure for all runs together, and one for each benchmark of losses."""
    if not runs and not measured:
        return []
    axis = "sent by one rank (MB)"
    parts = ["<h2>Loss against bytes</h2>"]
    if runs:
        parts += [
            "<p>Held-out loss; of a run that was not validated on its way, training loss. Further left and lower is better. "
            "The axis begins at the first validation after the start.</p>",
            figure(loss_figures.curves(runs, axis, lambda row: row["sent_bytes"] / 1e6, True, look)),
            numbers(table(curve_rows(runs), look=look)),
        ]
    for r in measured:
        rows = [row for row in r["rows"] if ran(row)]
        lines = {row["name"]: ([sent / 1e6 for sent in row["sent_bytes"]], row["loss"]) for row in rows}
        steps = sorted({step for row in rows for step in row["steps"]})
        by_step = [dict(zip(row["steps"], row["loss"], strict=True)) for row in rows]
        parts += [
            f"<h3>{escape(model_name(r))}</h3>",
            "<p>Held-out loss, the same windows and initial weights for all.</p>",
            figure(loss_figures.losses(lines, axis, True, look)),
            numbers(
                table(
                    [
                        ["loss at step", *(row["name"] for row in rows)],
                        *([str(s), *(f"{b[s]:.4f}" if s in b else "" for b in by_step)] for s in steps),
                        ["MB in all", *(megabytes(row["sent_bytes"][-1]) for row in rows)],
                    ]
                )
            ),
        ]
        if failed := [[row["name"], row["kind"], row["error"]] for row in r["rows"] if not ran(row)]:
            parts += ["<h3>What did not train</h3>", table([["name", "kind", "reason"], *failed], text=True)]
    return parts


def loss_against_time(
    runs: Sequence[tuple[str, Record]],
    measured: Sequence[Record],
    timed: Sequence[Record],
    look: Mapping[str, figures.Look],
) -> list[str]:
    """Runs by the seconds they took; benchmarks of losses by their steps times the median step on each link."""
    parts = []
    if runs:
        axis = "training time (s)"
        parts.append(figure(loss_figures.curves(runs, axis, lambda row: row["seconds"], False, look)))
    for r in measured:
        same = [t for t in timed if all(t[key] == r[key] for key in ("world_size", "model", "tokens_per_step"))]
        links: dict[str, dict[str, float]] = {}
        for t in sorted(same, key=lambda t: units.rate(t["link"]["rate"]) if t["link"]["shaped"] else float("inf")):
            seconds = {row["name"]: row["seconds"] for row in t["rows"] if ran(row)}
            links.setdefault(link_name(t["link"], hosts=True), {}).update(seconds)
        rows = [row for row in r["rows"] if ran(row) and any(row["name"] in seconds for seconds in links.values())]
        if not rows:
            continue
        lines = {
            link: {
                row["name"]: ([step * seconds[row["name"]] for step in row["steps"]], row["loss"])
                for row in rows
                if row["name"] in seconds
            }
            for link, seconds in links.items()
        }
        reached = [[f"seconds to {r['target']:g}", "steps", *links]]
        for row in rows:
            steps = row["steps_to_target"]
            times = (seconds.get(row["name"]) for seconds in links.values())
            cells = ("" if s is None else "not reached" if steps is None else f"{steps * s:,.1f}" for s in times)
            reached.append([row["name"], "" if steps is None else f"{steps:.0f}", *cells])
        parts += [
            f"<h3>{escape(model_name(r))}</h3>",
            "<p>Steps times the median step on each link.</p>",
            figure(loss_figures.losses_by_link(lines, "training time (s)", look)),
            table(reached, look=look),
        ]
    return ["<h2>Loss against time</h2>", *parts] if parts else []
