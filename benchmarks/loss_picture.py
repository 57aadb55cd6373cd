"""Seconds of training to a held-out loss against bandwidth, as one SVG, from the records of `time_to_loss.py`.

Records of one link are put together; of rows of one name the one with the most steps counts, whatever it came to. A way that
never got to the loss has no point there.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import labels
from matplotlib import pyplot

from commpress.launch import records, units

TARGET = 3.15
"""A held-out loss that the slowest way, plain DDP at 100 Mbit/s, reaches in four minutes; without training it is 5.65. Chosen
after the runs, near the lowest that all of them reached: docs/measured.md has other losses."""
TICKS = (5, 10, 20, 30, 60, 120, 240, 480)


def seconds_to(row: dict[str, Any], target: float) -> float | None:
    """Return the seconds after which a row's loss is at the target, between validations by a straight line; None if never."""
    points = list(zip(row["seconds"], row["loss"], strict=True))
    for (before, above), (after, below) in pairwise(points):
        if below <= target < above:
            return float(before + (after - before) * (above - target) / (above - below))
    return None


def by_link(paths: list[Path]) -> dict[float, dict[str, float | None]]:
    """The seconds to TARGET by the bits a second of the link, rising, and by name. Raises ValueError for another file."""
    found: dict[float, dict[str, Any]] = {}
    for path in paths:
        record = json.loads(path.read_text())
        if record.get("what") != "loss by time" or not record["link"]["shaped"]:
            raise ValueError(f"{path}: expected a record of benchmarks/time_to_loss.py, of a link with a rate")
        of = found.setdefault(units.rate(record["link"]["rate"]), {})
        for row in record["rows"]:
            if row["name"] not in of or row["steps"][-1] > of[row["name"]]["steps"][-1]:
                of[row["name"]] = row
    return {rate: {name: seconds_to(row, TARGET) for name, row in of.items()} for rate, of in sorted(found.items())}


def draw(paths: list[Path], out: Path) -> None:
    """Write the picture of these records. Raises ValueError for another file."""
    links = by_link(paths)
    first = json.loads(paths[0].read_text())
    figure, axes = pyplot.subplots(figsize=(5.2, 4.0))
    axes.set(xscale="log", yscale="log", xlabel="bandwidth of a host's link", ylabel="seconds, lower is better")
    ends = {}
    for name in labels.STYLES:
        points = [(rate, seconds) for rate, of in links.items() if (seconds := of.get(name)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **labels.style(name))
            ends[f"{name}, {points[0][1]:.0f} s"] = points[0]
    axes.set_xticks(list(links), [units.bandwidth(rate) for rate in links])
    least, most = axes.get_ylim()
    ticks = [tick for tick in TICKS if least <= tick <= most]
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(links) / (max(links) / min(links)) ** 0.95, max(links) * 1.3)
    labels.label_ends(axes, ends, {end: labels.STYLES[end.partition(", ")[0]][0] for end in ends}, left=True)
    what = f"GPT, {first['parameters'] / 1e6:.1f} M parameters, {records.conditions(first)}, {first['machine']}"
    labels.head(axes, title_of(links), f"seconds of training to a held-out loss of {TARGET}\n{what}")
    labels.save(figure, out)


def title_of(links: dict[float, dict[str, float | None]]) -> str:
    """Say how much sooner auto is there than plain DDP, from the slowest link on."""
    told = []
    for rate, of in links.items():
        ours, plain = of.get("auto"), of.get("plain DDP")
        if ours and plain:
            told.append(f"{plain / ours:.1f}x at {units.bandwidth(rate)}")
    return f"auto reaches the same loss sooner than plain DDP:\n{', '.join(told)}" if told else "Seconds to a loss"
