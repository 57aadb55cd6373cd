"""Step time against bandwidth, as one SVG: `python benchmarks/step_picture.py docs/step_time.svg 1gbit=FILE.json ...`

The records are those of `step_time.py --json`, one for each speed of link. Both axes are logarithmic; the line at 1 is no
communication at all.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "commpress", "font.size": 11}

from matplotlib import pyplot  # noqa: E402  (the backend comes first)

MBIT = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
SHOWN = {"ddp": "plain DDP", "int8": "int8", "int4": "int4", "topk(0.01)|int4": "topk(0.01)|int4"}


def megabits(rate: str) -> float:
    """1gbit -> 1000.0"""
    return float(rate[:-4]) * MBIT[rate[-4:]]


def main() -> None:
    """Draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("records", nargs="+", metavar="RATE=FILE")
    chosen = options.parse_args()
    pairs = (entry.split("=", 1) for entry in chosen.records)
    records = {megabits(rate): json.loads(Path(name).read_text()) for rate, name in pairs}
    figure, axes = pyplot.subplots(figsize=(7.5, 3.8))
    for spec, label in SHOWN.items():
        points = [
            (rate, row["ratio"])
            for rate, record in sorted(records.items())
            for row in record["rows"]
            if row["spec"] == spec
        ]
        style = {"color": "0.4", "linestyle": "--"} if spec == "ddp" else {}
        axes.plot(*zip(*points, strict=True), marker="o", label=label, **style)
    axes.axhline(1.0, color="0.7", linewidth=1)
    axes.text(1000, 0.97, "no communication", ha="center", va="top", color="0.5", fontsize=9)
    axes.set_ylim(bottom=0.8)
    axes.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel="seconds a step,\nno communication = 1")
    axes.set_xticks(sorted(records), [f"{r:,.0f}" for r in sorted(records)])
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    first = next(iter(records.values()))
    axes.set_title(f"{first['parameters'] / 1e6:.0f} M-parameter transformer, 2 hosts", fontsize=11)
    figure.tight_layout()
    chosen.out.parent.mkdir(exist_ok=True)
    figure.savefig(chosen.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
