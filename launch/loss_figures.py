"""The report's figures of losses: over bytes, over time, over the time on each link. Names stand at their lines' ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from commpress import extras
from commpress.launch.figures import LEGEND_HEIGHT, PLOT_HEIGHT, Look, styled, with_menu
from commpress.launch.records import Record

try:
    import plotly.graph_objects as go
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.loss_figures", error, "launch") from None

DIRECT = 6
"""More lines than these have a legend: their labels would not find room at their ends."""
DECADES = 1.7
"""Fewer of them have ticks at 2 and 5 as well."""
LABEL_HEIGHT, LETTER_WIDTH = 17, 7.3
PLOT_INSIDE = (280, 240)
"""Pixels of a label, and of what the axes enclose on a phone."""


def curves(
    runs: Sequence[tuple[str, Record]], axis: str, x: Callable[[Record], float], log: bool, look: Mapping[str, Look]
) -> go.Figure:
    """Held-out loss of runs; of one that was not validated on its way, smoothed training loss as a thin line.

    `x` is a place for a row of the curve.
    """
    figure = go.Figure()
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, record in runs:
        own = look[name]
        # a logarithmic axis has no place for what came before the first byte
        there = [row for row in record["curve"] if row["step"] and (not log or x(row) > 0)]
        rows = [row for row in there if row["validation_loss"] is not None]
        losses, style = [row["validation_loss"] for row in rows], {"mode": "lines+markers", "line": own.line}
        if len(rows) < 2:
            rows = [row for row in there if row["train_loss"] is not None]
            losses, style = (
                smoothed([row["train_loss"] for row in rows]),
                {"mode": "lines", "line": {**own.line, "width": 1.5}},
            )
        lines[name] = [(x(row), loss) for row, loss in zip(rows, losses, strict=True)]
        figure.add_scatter(
            x=[place for place, _ in lines[name]],
            y=losses,
            name=escape(name),
            marker=own.marker,
            hovertemplate="%{y:.4f} at %{x:,.4~g}<extra>%{fullData.name}</extra>",
            **style,
        )
    return labelled(over(figure, axis, log), lines, log, look)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of what lies within a twentieth of the length on either side: single batches say little."""
    reach = len(values) // 20
    near = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(each) / len(each) for each in near]


def losses(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    axis: str,
    log: bool,
    look: Mapping[str, Look],
    direct: bool = True,
) -> go.Figure:
    """Held-out loss of each name: (places, losses), labelled at its end if `direct`."""
    figure = go.Figure()
    kept = {}
    for name, (x, y) in lines.items():
        kept[name] = [(a, b) for a, b in zip(x, y, strict=True) if not log or a > 0]
        figure.add_scatter(
            x=[a for a, _ in kept[name]],
            y=[b for _, b in kept[name]],
            name=escape(name),
            mode="lines",
            line=look[name].line,
            hovertemplate="%{y:.4f} at %{x:.4~g}<extra>%{fullData.name}</extra>",
        )
    # without the loss at the start, which is that of a model that knows nothing
    known = {name: [point for point in points if point[0] != lines[name][0][0]] for name, points in kept.items()}
    return labelled(over(figure, axis, log), known, log, look, direct)


def labelled(
    figure: go.Figure,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    log: bool,
    look: Mapping[str, Look],
    direct: bool = True,
) -> go.Figure:
    """Let the axes show where `lines` of (place, loss) are; names at the lines' ends, in place of a legend, if `direct`."""
    shown = {name: points for name, points in lines.items() if points and math.isfinite(points[-1][1])}
    if not shown:
        return figure
    low = min(loss for points in shown.values() for _, loss in points)
    high = max(loss for points in shown.values() for _, loss in (points[0], points[-1]))
    edge = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    low, high = low - edge, high + edge
    figure.update_yaxes(range=[low, high])
    places = [place for points in shown.values() for place, _ in points]
    first, last = (math.log10(min(places)), math.log10(max(places))) if log else (0.0, max(places))
    first, last = first - 0.03 * (last - first), last + 0.03 * (last - first or 1)
    if not direct or len(shown) > DIRECT:
        return figure
    figure.update_xaxes(range=[first, last], **({"dtick": "D2"} if log and last - first < DECADES else {}))
    figure.update_layout(showlegend=False, height=PLOT_HEIGHT + LEGEND_HEIGHT)
    texts = {name: f"{name} {points[-1][1]:.3f}" for name, points in shown.items()}
    ends = {
        name: (((math.log10(x) if log else x) - first) / (last - first), (y - low) / (high - low))
        for name, (*_, (x, y)) in sorted(shown.items(), key=lambda item: -item[1][-1][1])
    }
    for name, (beside, up) in label_places(ends, {name: len(text) for name, text in texts.items()}).items():
        figure.add_annotation(
            **{"x": ends[name][0], "xref": "paper", "xshift": 8 if beside else 0},
            **{"xanchor": "left" if beside else "right", "y": up, "yref": "paper", "yanchor": "middle"},
            **{
                "text": f"<b>{escape(texts[name])}</b>",
                "font": {"size": 12, "color": look[name].colour},
                "showarrow": False,
            },
            bgcolor="rgba(255, 255, 255, 0.7)",
        )
    return figure


def label_places(ends: Mapping[str, tuple[float, float]], letters: Mapping[str, int]) -> dict[str, tuple[bool, float]]:
    """Whether a label of so many letters begins beside the end of its line, or ends above it, and how high it is.

    Off each other in a plot of a phone's width: on a wider page they have more room. `ends` and heights are shares of the plot.
    """
    found: dict[str, tuple[bool, float]] = {}
    begins: dict[str, float] = {}
    high, margin = LABEL_HEIGHT / PLOT_INSIDE[1], 8 / PLOT_INSIDE[0]

    def wide(name: str) -> float:
        return letters[name] * LETTER_WIDTH / PLOT_INSIDE[0]

    def free(name: str, left: float, up: float) -> bool:
        return 0.5 * high <= up <= 1 - 0.5 * high and all(
            abs(up - other_up) >= high or left + wide(name) <= begins[other] or begins[other] + wide(other) <= left
            for other, (_, other_up) in found.items()
        )

    for name, (x, y) in ends.items():
        beside = x + margin + wide(name) <= 1
        begins[name] = left = x + margin if beside else x - wide(name)
        start = y if beside else y + 0.8 * high  # above its own line, which comes from the left
        tries = [start + side * step * high / 2 for step in range(40) for side in (1, -1)]
        found[name] = beside, next((up for up in tries if free(name, left, up)), start)
    return found


def losses_by_link(
    links: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], axis: str, look: Mapping[str, Look]
) -> go.Figure:
    """`losses` of each link in one figure with a menu; a name that has no step time on a link is left out there."""
    names = list(dict.fromkeys(name for lines in links.values() for name in lines))
    empty: tuple[Sequence[float], Sequence[float]] = ([], [])
    whole = {link: {name: lines.get(name, empty) for name in names} for link, lines in links.items()}
    figure = losses(next(iter(whole.values())), axis, False, look, direct=False)
    choices = {
        link: {"x": [list(x) for x, _ in lines.values()], "y": [list(y) for _, y in lines.values()]}
        for link, lines in whole.items()
    }
    return with_menu(figure, choices)


def over(figure: go.Figure, axis: str, log: bool) -> go.Figure:
    """Loss over something."""
    figure.update_xaxes(
        title=axis, type="log" if log else "linear", **({"dtick": 1, "tickformat": ",~g"} if log else {})
    )
    figure.update_yaxes(title="loss (nats a byte), lower is better")
    return styled(figure)
