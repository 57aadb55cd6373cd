"""The report's figures: each function takes numbers and returns a plotly figure that fits a phone.

A name has the same look on the whole page: commpress in strong colours, the rest grey and dashed. Lines
and bars are labelled where they are; axes show the range in which they differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from commpress import extras
from commpress.launch import palette
from commpress.launch.palette import COLOURS, GREYS, INK
from commpress.launch.records import SPANS
from commpress.launch.units import bandwidth

try:
    import plotly.graph_objects as go
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.figures", error, "launch") from None

DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
LINES = ("training", "encode", "wire", "decode")
TICKS = tuple(step * scale for scale in (0.1, 1, 10, 100) for step in (1, 1.5, 2, 3, 5, 7))

PLOT_HEIGHT = 330
LEGEND_HEIGHT = 18
"""Pixels of a legend entry on a phone, where each may have its own line."""
BAR_HEIGHT, HEADING_HEIGHT = 24, 32
BUTTONS = ("toImage", "zoom2d", "resetScale2d")
"""The buttons of a figure: more of them would cover it on a phone."""


class Look(NamedTuple):
    """The style of a name in all figures."""

    colour: str
    dash: str
    width: float
    symbol: str

    @property
    def line(self) -> dict[str, object]:
        return {"color": self.colour, "dash": self.dash, "width": self.width}

    @property
    def marker(self) -> dict[str, object]:
        return {"color": self.colour, "symbol": self.symbol, "size": 8}


def looks(names: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Return a look for each (name, kind); kind is "floor", "torch", "peer" or "commpress"."""
    found: dict[str, Look] = {}
    ours = others = 0
    for name, kind in names:
        if name in found:
            continue
        if kind == "floor":
            found[name] = Look(INK, "solid", 1.5, "line-ew")
        elif kind == "commpress":
            found[name] = Look(COLOURS[ours % len(COLOURS)], "solid", 3, SYMBOLS[ours % len(SYMBOLS)])
            ours += 1
        else:
            dash = DASHES[others % len(DASHES)]
            found[name] = Look(GREYS[others % len(GREYS)], dash, 1.8, f"{SYMBOLS[others % len(SYMBOLS)]}-open")
            others += 1
    return found


def step_times(
    ratios: Mapping[str, Mapping[float, float]], hover: Mapping[str, Sequence[str]], look: Mapping[str, Look]
) -> go.Figure:
    """Draw lines of step time, no communication = 1, over bits a second of the link, both logarithmic.

    `ratios` maps a name to {bits a second: ratio}, rising; `hover` has a text for each of its points.
    """
    figure = go.Figure()
    for name, points in ratios.items():
        figure.add_scatter(
            x=list(points),
            y=list(points.values()),
            name=escape(name),
            mode="lines+markers",
            line=look[name].line,
            marker=look[name].marker,
            text=[escape(text) for text in hover[name]],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        )
    rates = sorted({rate for points in ratios.values() for rate in points})
    figure.update_xaxes(
        title="bandwidth of a host's link",
        type="log",
        tickvals=rates,
        ticktext=[bandwidth(rate).removesuffix("bit/s").replace(" ", "") + "bit" for rate in rates],
    )
    figure.update_yaxes(
        title="step time, lower is better", type="log", tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS]
    )
    return styled(figure)


class Bar(NamedTuple):
    """A bar: what it is of (a run, a phase), its value, its colour, what stands in or beside it, and what a pointer is told."""

    name: str
    value: float
    colour: str
    label: str
    hover: str = ""


def bars(groups: Mapping[str, Sequence[Bar]], axis: str, outlines: Mapping[str, float] | None = None) -> go.Figure:
    """Bars from left to right, each with its label, below the heading of their group.

    `outlines` has a value for a group that is drawn around its bars, as what they are compared with.
    """
    figure = go.Figure()
    rows: dict[str, list[tuple[float, Bar]]] = {}
    at, frames = 0.0, []
    for heading, found in groups.items():
        figure.add_annotation(
            **{"x": 0, "xref": "paper", "xanchor": "left", "y": at, "yanchor": "middle", "showarrow": False},
            text=f"<b>{escape(heading)}</b>",
        )
        at += (HEADING_HEIGHT + BAR_HEIGHT) / 2 / BAR_HEIGHT
        for bar in found:
            rows.setdefault(bar.name, []).append((at, bar))
            if outlines:
                frames.append((at, outlines[heading]))
            at += 1
        at += (HEADING_HEIGHT - BAR_HEIGHT) / 2 / BAR_HEIGHT
    if frames:
        figure.add_bar(
            **{"y": [y for y, _ in frames], "x": [x for _, x in frames], "name": "dense", "width": 0.9},
            **{"orientation": "h", "hovertemplate": "%{x:,.4~g}<extra>dense</extra>"},
            marker={"color": "rgba(0, 0, 0, 0)", "line": {"color": palette.DENSE, "width": 1.5}},
        )
    for name, placed in rows.items():
        figure.add_bar(
            **{"y": [y for y, _ in placed], "x": [bar.value for _, bar in placed], "name": escape(name), "width": 0.8},
            **{"orientation": "h", "marker_color": [bar.colour for _, bar in placed], "cliponaxis": False},
            **{"text": [escape(bar.label) for _, bar in placed], "textposition": "auto", "textangle": 0},
            **{"insidetextanchor": "start", "constraintext": "none"},
            hovertext=[escape(bar.hover or bar.label) for _, bar in placed],
            hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=axis, rangemode="tozero")
    figure.update_yaxes(range=[at - 0.5, -0.7], showticklabels=False, showgrid=False, zeroline=False)
    return styled(figure, entries=0, height=round(80 + at * BAR_HEIGHT))


def front(points: Mapping[str, Sequence[tuple[float, float, str]]]) -> go.Figure:
    """Draw quality over size of a search's trials: "front" as steps, others as grey points of (size, quality, text)."""
    figure = go.Figure()
    for name, found in points.items():
        best = name == "front"
        figure.add_scatter(
            x=[size for size, _, _ in found],
            y=[quality for _, quality, _ in found],
            name=escape(name),
            mode="lines+markers" if best else "markers",
            line={"shape": "hv", "color": palette.FRONT},
            marker={"color": palette.FRONT if best else GREYS[1], "size": 9 if best else 6},
            text=[escape(text) for _, _, text in found],
            hovertemplate="%{text}<br>%{y:.4~g} at %{x:,.6~g}<extra></extra>",
        )
    figure.update_xaxes(title="size (g), lower is better")
    figure.update_yaxes(title="quality (f), higher is better")
    return styled(figure)


class Block(NamedTuple):
    """One span of a timeline: its place and its text. `row` is its thread."""

    phase: str
    row: int
    start: float
    length: float
    hover: str


def timeline(steps: Mapping[str, Sequence[Block]], rows: Mapping[int, str]) -> go.Figure:
    """Draw spans in ms on the lines training, encode, wire and decode, one step at a time, chosen by a menu.

    `steps` maps a menu text to the step's spans; the first is shown. `rows` names the threads; several of one name
    (transfers that overlap) are thin lines beside each other. There is one trace per phase, for any number of spans.
    """
    order = sorted(rows, key=lambda row: ([*LINES, rows[row]].index(rows[row]), row))
    place: dict[int, float] = {}
    ticks: dict[float, str] = {}
    thickness = {name: 0.8 / max(1, 0.6 * list(rows.values()).count(name)) for name in rows.values()}
    at = 0.0
    for name in dict.fromkeys(rows[row] for row in order):
        lanes = [row for row in order if rows[row] == name]
        for row in lanes:
            place[row] = at + thickness[name] / 2
            at += thickness[name]
        ticks[at - thickness[name] * len(lanes) / 2] = name
        at += 0.25
    choices: dict[str, dict[str, list[list[object]]]] = {}
    for label, blocks in steps.items():
        of = [[block for block in blocks if block.phase == phase] for phase in SPANS]
        choices[label] = {
            "base": [[block.start for block in group] for group in of],
            "x": [[block.length for block in group] for group in of],
            "y": [[place[block.row] for block in group] for group in of],
            "width": [[thickness[rows[block.row]] for block in group] for group in of],
            "hovertext": [[escape(block.hover) for block in group] for group in of],
        }
    figure = go.Figure()
    first = next(iter(choices.values()))
    for i, phase in enumerate(SPANS):
        figure.add_bar(
            **{key: values[i] for key, values in first.items()},
            name=phase,
            orientation="h",
            marker={"color": pale(palette.SPANS[phase]), "line": {"color": palette.SPANS[phase], "width": 1}},
            hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="ms since the step began")
    figure.update_yaxes(
        tickvals=list(ticks), ticktext=[f"{name} " for name in ticks.values()], range=[at, -0.25], showgrid=False
    )
    return with_menu(styled(figure, entries=len(SPANS)), choices)


def pale(colour: str) -> str:
    """Return a paler colour, so that outlines separate spans that touch, and a span of no width is still a line."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.65)"


def with_menu(figure: go.Figure, choices: Mapping[str, Mapping[str, object]]) -> go.Figure:
    """Add a menu above the figure, if there is a choice; each choice is the change that it makes to the traces."""
    if len(choices) > 1:
        buttons = [
            {"label": escape(label), "method": "restyle", "args": [dict(change)]} for label, change in choices.items()
        ]
        figure.update_layout(
            updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"}],
            margin_t=55,
            height=figure.layout.height + 20,
        )
    return figure


def styled(figure: go.Figure, entries: int | None = None, height: int = PLOT_HEIGHT) -> go.Figure:
    """Style a figure to fit a phone: the legend is below, margins are small, and dragging scrolls the page.

    `entries` is the number of legend entries; default: one per trace.
    """
    shown = sum(trace.showlegend is not False for trace in figure.data) if entries is None else entries
    figure.update_layout(
        template="plotly_white",
        autosize=True,
        height=height + LEGEND_HEIGHT * shown,
        margin={"l": 10, "r": 15, "t": 35, "b": 10},
        showlegend=shown > 0,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        font={"size": 13, "color": INK},
        dragmode=False,
        hoverlabel={"font_size": 13},
    )
    figure.update_xaxes(automargin=True, title_standoff=8, title_font_size=13)
    figure.update_yaxes(automargin=True, title_standoff=8, title_font_size=13)
    return figure


def as_html(figure: go.Figure) -> str:
    """Return a figure as a part of a page that has plotly's script."""
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        default_height=f"{figure.layout.height}px",
        config={"responsive": True, "displaylogo": False, "modeBarButtons": [list(BUTTONS)]},
    )
    return html
