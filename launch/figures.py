"""The report's figures: each function takes numbers and returns a plotly figure that fits a phone.

A name has the same look on the whole page: commpress in strong colours, the rest grey and dashed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from commpress import extras
from commpress.launch.records import SPANS, Record
from commpress.launch.units import bandwidth

try:
    import plotly.graph_objects as go
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.figures", error, "launch") from None

INK = "#1e293b"
COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#be185d", "#0e7490", "#a16207", "#4338ca")
GREYS = ("#475569", "#7b8794")
DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
PHASES = {"encode": "#1d4ed8", "wire": "#c2410c", "decode": "#15803d", "exposed": "#64748b"}
SPAN_COLOURS = {"forward": "#a5b4fc", "backward": "#7dd3fc", **PHASES}
LINES = ("training", "encode", "wire", "decode")
TICKS = tuple(step * scale for scale in (0.1, 1, 10, 100) for step in (1, 1.5, 2, 3, 5, 7))

PLOT_HEIGHT = 330
LEGEND_HEIGHT = 18
"""Pixels of a legend entry on a phone, where each may have its own line."""
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
        title="against no communication", type="log", tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS]
    )
    return styled(figure)


def step_bars(ratios: Mapping[str, float], hover: Mapping[str, str], look: Mapping[str, Look]) -> go.Figure:
    """Draw bars of step time, no communication = 1, for records without a bandwidth."""
    names = list(ratios)[::-1]  # the first one on top
    figure = go.Figure()
    figure.add_bar(
        x=[ratios[name] for name in names],
        y=[escape(name) + " " for name in names],  # a little air before the bar
        orientation="h",
        marker_color=[look[name].colour for name in names],
        text=[f"{ratios[name]:.2f}" for name in names],
        textposition="outside",
        cliponaxis=False,
        hovertext=[escape(hover[name]) for name in names],
        hovertemplate="%{hovertext}<extra>%{y}</extra>",
    )
    figure.update_xaxes(title="no communication = 1", range=[0, max(ratios.values()) * 1.15])
    return styled(figure, entries=0, height=90 + 30 * len(names))


def curves(
    runs: Sequence[tuple[str, Record]], axis: str, x: Callable[[Record], float], log: bool, look: Mapping[str, Look]
) -> go.Figure:
    """Draw the training loss of runs as a thin line and held-out loss as a marked one. `x` gives the place of a curve's row."""
    figure = go.Figure()
    for name, record in runs:
        own = look[name]
        for key, style in (
            ("train_loss", {"mode": "lines", "line": {"color": own.colour, "width": 1}, "opacity": 0.35}),
            ("validation_loss", {"mode": "lines+markers", "line": own.line, "marker": own.marker}),
        ):
            # a logarithmic axis has no place for what came before the first byte
            rows = [row for row in record["curve"] if row[key] is not None and (not log or x(row) > 0)]
            figure.add_scatter(
                x=[x(row) for row in rows],
                y=[row[key] for row in rows],
                name=escape(name),
                legendgroup=name,
                showlegend=key == "validation_loss",
                hovertemplate=f"%{{y:.4f}} at %{{x:.4~g}}<extra>{escape(name)}, {key.split('_')[0]}</extra>",
                **style,
            )
    return over(figure, axis, log)


def losses(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], axis: str, log: bool, look: Mapping[str, Look]
) -> go.Figure:
    """Draw the held-out loss of each name: (places, losses)."""
    figure = go.Figure()
    for name, (x, y) in lines.items():
        kept = [(a, b) for a, b in zip(x, y, strict=True) if not log or a > 0]
        figure.add_scatter(
            x=[a for a, _ in kept],
            y=[b for _, b in kept],
            name=escape(name),
            mode="lines",
            line=look[name].line,
            hovertemplate="%{y:.4f} at %{x:.4~g}<extra>%{fullData.name}</extra>",
        )
    return over(figure, axis, log)


def losses_by_link(
    links: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], axis: str, look: Mapping[str, Look]
) -> go.Figure:
    """Draw `losses` of each link in one figure with a menu; a name without a step time on a link is left out there."""
    names = list(dict.fromkeys(name for lines in links.values() for name in lines))
    empty: tuple[Sequence[float], Sequence[float]] = ([], [])
    whole = {link: {name: lines.get(name, empty) for name in names} for link, lines in links.items()}
    figure = losses(next(iter(whole.values())), axis, False, look)
    choices = {
        link: {"x": [list(x) for x, _ in lines.values()], "y": [list(y) for _, y in lines.values()]}
        for link, lines in whole.items()
    }
    return with_menu(figure, choices)


def over(figure: go.Figure, axis: str, log: bool) -> go.Figure:
    """Return an empty figure of loss over something."""
    figure.update_xaxes(
        title=axis, type="log" if log else "linear", **({"dtick": 1, "tickformat": ",~g"} if log else {})
    )
    figure.update_yaxes(title="loss (nats a byte)")
    return styled(figure)


def bars(
    runs: Sequence[tuple[str, Record]], axis: str, series: dict[str, tuple[str, float]], colours: Mapping[str, str]
) -> go.Figure:
    """Draw a group of bars per run. `series` maps a legend to (the key in its traffic, the unit to divide by)."""
    figure = go.Figure()
    names = [escape(name) for name, _ in runs]
    for legend, (key, unit) in series.items():
        heights = [r["traffic"][key] / unit / max(r["steps_done"], 1) for _, r in runs]
        figure.add_bar(
            x=names,
            y=heights,
            name=legend,
            marker_color=colours[legend],
            hovertemplate="%{y:.4~g}<extra>%{fullData.name}</extra>",
        )
    figure.update_yaxes(title=axis)
    return styled(figure, entries=len(series))


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
            line={"shape": "hv", "color": COLOURS[0]},
            marker={"color": COLOURS[0] if best else GREYS[1], "size": 9 if best else 6},
            text=[escape(text) for _, _, text in found],
            hovertemplate="%{text}<br>%{y:.4~g} at %{x:,.6~g}<extra></extra>",
        )
    figure.update_xaxes(title="size (g)")
    figure.update_yaxes(title="quality (f)")
    return styled(figure)


def dense_and_small(pairs: Mapping[str, tuple[float, float]], axis: str) -> go.Figure:
    """Draw two bars for each name, one for the dense model and one for the small one."""
    figure = go.Figure()
    for i, (legend, colour) in enumerate((("dense", GREYS[1]), ("small", COLOURS[0]))):
        figure.add_bar(
            x=[escape(name) for name in pairs],
            y=[pair[i] for pair in pairs.values()],
            name=legend,
            marker_color=colour,
            hovertemplate="%{x}: %{y:.4~g}<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=axis)
    return styled(figure)


class Bar(NamedTuple):
    """Bytes that one run sent a step of one bucket."""

    bucket: str
    sent_bytes: float
    hover: str


def buckets(dense: Mapping[str, float], sent: Mapping[str, Sequence[Bar]], look: Mapping[str, Look]) -> go.Figure:
    """Draw the bytes per step of each bucket: dense in grey, and a bar per run. `dense` is by bucket, `sent` by run."""
    figure = go.Figure()
    figure.add_bar(
        x=[escape(bucket) for bucket in dense],
        y=list(dense.values()),
        name="dense",
        marker_color="#94a3b8",
        hovertemplate="%{y:,.0f} B<extra>dense</extra>",
    )
    for name, rows in sent.items():
        figure.add_bar(
            x=[escape(row.bucket) for row in rows],
            y=[row.sent_bytes for row in rows],
            name=escape(name),
            marker_color=look[name].colour,
            hovertext=[escape(row.hover) for row in rows],
            hovertemplate="%{y:,.0f} B, %{hovertext}<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title="bucket", type="category", categoryarray=[escape(bucket) for bucket in dense])
    figure.update_yaxes(title="bytes a step and rank", type="log", dtick=1, exponentformat="SI")
    return styled(figure, entries=len(sent) + 1)


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
            marker={"color": pale(SPAN_COLOURS[phase]), "line": {"color": SPAN_COLOURS[phase], "width": 1}},
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
