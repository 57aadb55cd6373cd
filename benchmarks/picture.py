"""Step time against bandwidth, as one SVG: `python benchmarks/picture.py docs/step_time.svg STEPTIMES.json...`

The records are those of `training.py --json`, one a link. Both axes are logarithmic; the line at 1 is no communication at
all. The same records give the same bytes.
"""

import argparse
from pathlib import Path

import labels
from matplotlib import pyplot

from commpress.launch import records, units

SHOWN = ("plain DDP", "powersgd(4)", "int8", "int4", "topk(0.01)|int4")
"""The rows that are drawn."""
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50)


def main() -> None:
    """Draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path, metavar="OUT.svg")
    options.add_argument("records", nargs="+", type=Path, metavar="STEPTIMES.json")
    chosen = options.parse_args()
    try:
        links = by_rate(chosen.records)
    except ValueError as error:
        options.error(str(error))
    draw(links, chosen.out)


def by_rate(paths: list[Path]) -> dict[float, records.Record]:
    """The records by the bits a second of their link, rising. Raises ValueError, which names the file, for another file."""
    found: dict[float, records.Record] = {}
    first = None
    for path in paths:
        record = records.read(path)
        if records.kind(record) != records.STEP_TIMES or not record["link"]["shaped"]:
            raise ValueError(f"{path}: expected the step times of a link with a rate, as `commpress lab` makes it")
        first = first or record
        if (record["model"], records.conditions(record)) != (first["model"], records.conditions(first)):
            raise ValueError(f"{path}: expected the model and the links of {paths[0]} but for the rate")
        found[units.rate(record["link"]["rate"])] = record
    return dict(sorted(found.items()))


def draw(links: dict[float, records.Record], out: Path) -> None:
    """Write the picture of the records of links with so many bits a second."""
    figure, axes = pyplot.subplots(figsize=(5.2, 4.0))
    axes.set(xscale="log", yscale="log", xlabel="bandwidth of a host's link", ylabel="step time, lower is better")
    top, ends = 2.0, {}
    for name in SHOWN:
        points = [
            (rate, row["ratio"])
            for rate, record in links.items()
            for row in record["rows"]
            if row["name"] == name and records.ran(row)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **labels.style(name))
            top = max(top, *(ratio for _, ratio in points))
            ends[f"{name}, {points[0][1]:.1f}x"] = points[0]
    axes.axhline(1.0, color="0.2", linewidth=1)
    axes.text(max(links), 0.97, "no communication = 1", ha="right", va="top", color="0.2", fontsize=10)
    axes.set_ylim(0.8, top * 1.2)
    ticks = [tick for tick in TICKS if tick <= top * 1.2]
    axes.set_xticks(list(links), [units.bandwidth(rate) for rate in links])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(links) / (max(links) / min(links)) ** 1.1, max(links) * 1.2)
    labels.label_ends(axes, ends, {end: labels.STYLES[end.partition(", ")[0]][0] for end in ends}, left=True)
    record = next(iter(links.values()))
    what = f"GPT, {record['parameters'] / 1e6:.1f} M parameters, {records.conditions(record)}, {record['machine']}"
    labels.head(axes, title_of(links), f"step time against no communication\n{what}")
    labels.save(figure, out)


def title_of(links: dict[float, records.Record]) -> str:
    """Say where a step of plain DDP is slow, and what int4 makes of it."""
    rate, record = next(iter(links.items()))
    ratios = {row["name"]: row["ratio"] for row in record["rows"] if records.ran(row)}
    if not {"plain DDP", "int4"} <= ratios.keys():
        return "Step time against bandwidth"
    return f"At {units.bandwidth(rate)} a step takes\n{ratios['plain DDP']:.1f}x by plain DDP, {ratios['int4']:.1f}x by int4"


if __name__ == "__main__":
    main()
