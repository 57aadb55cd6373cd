"""Step time against bandwidth, as one SVG: `python benchmarks/picture.py docs/step_time.svg STEPTIMES.json...`

The records are those of `training.py --json`, one a link. Both axes are logarithmic; the line at 1 is no communication at
all. The same records give the same bytes.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "commpress", "font.size": 11}

from matplotlib import pyplot  # noqa: E402  (the backend comes first)

from commpress.launch import records, units  # noqa: E402

GREY = {"color": "0.4", "markersize": 4}
SHOWN = {
    "plain DDP": {**GREY, "linestyle": "--"},
    "PowerSGD rank 4": {**GREY, "linestyle": ":", "marker": "s"},
    "int8": {"color": "#15803d", "linewidth": 2},
    "int4": {"color": "#1d4ed8", "linewidth": 2},
    "topk(0.01)|int4": {"color": "#c2410c", "linewidth": 2},
}
"""The rows that are drawn, in this order: what they are compared with in grey."""
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
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    top = 2.0
    for name, style in SHOWN.items():
        points = [
            (rate, row["ratio"])
            for rate, record in links.items()
            for row in record["rows"]
            if row["name"] == name and records.ran(row)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **{"marker": "o", **style})
            top = max(top, *(ratio for _, ratio in points))
    axes.axhline(1.0, color="0.2", linewidth=1)
    axes.text(max(links), 0.97, "no communication", ha="right", va="top", color="0.2", fontsize=10)
    axes.set(
        xscale="log", yscale="log", xlabel="bandwidth of a host's link", ylabel="seconds a step,\nno communication = 1"
    )
    axes.set_ylim(0.8, top * 1.2)
    ticks = [tick for tick in TICKS if tick <= top * 1.2]
    axes.set_xticks(list(links), [units.bandwidth(rate) for rate in links])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    record = next(iter(links.values()))
    axes.set_title(
        f"{record['parameters'] / 1e6:.1f} M-parameter transformer, {records.conditions(record)}", fontsize=11
    )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
