"""What the benchmarks' pictures share: their colours, a name a line at its end, and one way to write an SVG.

A way of training has one colour and one line in every picture; what commpress is compared with is grey. Pictures are small, so
that their words can be read on a phone.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.text import Text
from matplotlib.transforms import Bbox

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "commpress",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

BLUE, RED, GREEN, PURPLE, GREY = "#1d4ed8", "#c2410c", "#0f766e", "#86198f", "#475569"
STYLES: dict[str, tuple[str, str, str]] = {
    "plain DDP": (GREY, "--", "o"),
    "bf16": (GREY, "-", "^"),
    "powersgd(4)": (PURPLE, "-", "s"),
    "auto": (BLUE, "-", "o"),
    "int8": (GREEN, "-", "D"),
    "int4": (BLUE, "-", "o"),
    "topk(0.01)|int4": (RED, "-", "v"),
}
"""Colour, line and marker of a name."""


def style(name: str) -> dict[str, Any]:
    """Return how a name is drawn."""
    color, line, marker = STYLES[name]
    own = color != GREY
    return {"color": color, "linestyle": line, "marker": marker, "linewidth": 2.4 if own else 1.6, "markersize": 5}


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Return the heights, moved as little as leaves `least` between any two; their order stays."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    centre: list[float] = []
    for i in order:
        groups.append([i])
        centre.append(heights[i])
        while len(groups) > 1 and centre[-1] - centre[-2] < least * (len(groups[-1]) + len(groups[-2])) / 2:
            joined = groups[-2] + groups[-1]
            groups[-2:], centre[-2:] = [joined], [sum(heights[j] for j in joined) / len(joined)]
    found = list(heights)
    for group, middle in zip(groups, centre, strict=True):
        for place, i in enumerate(group):
            found[i] = middle + least * (place - (len(group) - 1) / 2)
    return found


def label_ends(
    axes: Any, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str], left: bool = False
) -> None:
    """Write each name beside the end of its line, at (x, y) of the data, off the others; on the left of it if `left`."""
    axes.figure.canvas.draw()
    pixels = [axes.transData.transform(end) for end in ends.values()]
    places = apart([float(y) for _, y in pixels], 15.0)
    for (name, end), (_, y), place in zip(ends.items(), pixels, places, strict=True):
        axes.annotate(
            name,
            end,
            xytext=(-9 if left else 9, (place - y) * 72 / axes.figure.dpi),
            textcoords="offset points",
            color=colors[name],
            ha="right" if left else "left",
            va="center",
        )


BESIDE = sorted(
    [(x, y) for x in (6, -6, 24, -24, 48, -48) for y in range(-72, 73, 6)], key=lambda at: (math.hypot(*at), -at[0])
)
"""Where the name of a point may stand, in points of the page, the nearest first."""
NEAR = 12
"""From how far away on a thin line leads from the name to its point."""


def label_points(
    axes: Any, spots: Mapping[str, tuple[tuple[float, float], str]], drawn: Sequence[tuple[float, float]]
) -> None:
    """Write the name of each point, at (x, y) of the data, beside it in its color, off other names and all points, those of
    `drawn` among them.

    Raises RuntimeError where there is no room for one.
    """
    canvas = axes.figure.canvas
    canvas.draw()
    places = [(at, 4) for at, _ in spots.values()] + [(at, 1) for at in drawn]
    taken = [Bbox.from_bounds(*(axes.transData.transform(at) - far), 2 * far, 2 * far) for at, far in places]
    frame = axes.get_window_extent()
    for name, (at, color) in spots.items():
        for x, y in BESIDE:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            text = axes.annotate(
                *(name, at, (x, y)),
                **{"textcoords": "offset points", "fontsize": 8, "color": color, "va": "center"},
                ha="left" if x > 0 else "right",
                arrowprops=line if math.hypot(x, y) > NEAR else None,
            )
            text.get_window_extent()  # which puts it in its place
            here = Text.get_window_extent(text)  # without the line
            if not here.count_overlaps(taken) and frame.contains(*here.min) and frame.contains(*here.max):
                taken.append(here)
                break
            text.remove()
        else:
            raise RuntimeError(f"label_points: found no room for {name!r}")


def head(axes: Any, found: str, about: str) -> None:
    """Write above a picture what it has found, and smaller what it is of; both may have several lines."""
    axes.set_title(found, pad=12 + 11 * about.count("\n") + 11, fontsize=11, fontweight="bold")
    axes.annotate(about, (0, 1), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", fontsize=8.5)


def save(figure: Any, out: Path) -> None:
    """Write the picture: the same figure gives the same bytes."""
    from matplotlib import pyplot

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
