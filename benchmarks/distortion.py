"""Error against bits: what each spec loses of real gradients. `python benchmarks/distortion.py [--picture docs/distortion.svg]`

A byte-level GPT of 0.9 M parameters trains on the standard library's source by AdamW, in one process. After some of its steps
the gradient of the batch, all parameters in one row as in a bucket of DDP, is encoded and decoded by every spec, without
feedback: R bits a value against D = |x - decode(encode(x))|^2 / |x|^2. The line is D = 2^(-2R), which no code can beat where
values are independent, normal and of one variance. A gradient is not: a few of its values hold most of its square, and a code
that sends those alone lies below the line. Half a minute on a core.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import commpress
from commpress.launch import data
from commpress.launch.model import GPT, Shape

SPECS = (
    "bf16",
    "fp16",
    "fp8",
    "fp8(e5m2)",
    "int8",
    "int8(stochastic)",
    "int4",
    "int4(stochastic)",
    "int2",
    "sign",
    "topk(0.1)",
    "topk(0.1)|int4",
    "topk(0.1)|sign",
    "topk(0.01)",
    "topk(0.01)|int4",
    "topk(0.01)|sign",
    "topk(0.001)|int4",
    "randomk(0.1)",
    "randomk(0.1)|int4",
    "randomk(0.01)",
    "rotate|int8",
    "rotate|int4",
    "rotate|int2",
    "rotate|sign",
)
"""Some of each family, but `powersgd(r)`, which codes matrices, not rows of values."""
SHAPE, BATCH = Shape(layers=4, width=128, heads=4, context=64), 16
RATE, BETAS, DECAY, CLIP, RISE = 1.5e-3, (0.9, 0.95), 0.1, 1.0, 20
"""The learning rate rises for so many steps."""
STEPS = (1, 30, 100, 300)
"""The gradients of these steps are taken."""
COLORS = {
    **{"topk": "#c2410c", "randomk": "#86198f", "rotate": "#0e7490"},
    **{"int": "#1d4ed8", "sign": "#1d4ed8", "fp": "#15803d", "bf": "#15803d"},
}
"""By how a spec begins; others are black."""


@dataclass(frozen=True)
class Point:
    """What a spec does to the gradients of all steps."""

    spec: str
    bits: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """The mean over the steps."""
        return statistics.mean(self.errors)

    @property
    def above(self) -> float:
        """How many bits a value it takes more than the bound at the same error."""
        return self.bits + 0.5 * math.log2(self.error)


def gradients(steps: Sequence[int]) -> list[Tensor]:
    """The gradients of these steps of one training, float32 [parameters] each, before they are clipped."""
    torch.manual_seed(0)
    model, text, windows, found = GPT(SHAPE), data.load(None), data.generator(0, 0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)
    for step in range(1, max(steps) + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / RISE)
        x, y = data.sample(text.train, BATCH, SHAPE.context, windows)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        if step in steps:  # as DDP fills its buckets: the last layer first
            found.append(torch.cat([p.grad.view(-1) for p in reversed([*model.parameters()]) if p.grad is not None]))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return found


def point(spec: str, xs: Sequence[Tensor]) -> Point:
    """Encode and decode each of these gradients."""
    codec, errors = commpress.parse(spec), []
    for x in xs:
        lost = codec.decode(codec.encode(x), x.numel()).double() - x.double()
        errors.append(float(lost.square().sum() / x.double().square().sum()))
    return Point(spec, 8 * codec.nbytes(xs[0].numel()) / xs[0].numel(), tuple(errors))


def draw(points: Sequence[Point], title: str, out: Path) -> None:
    """Write the picture."""
    import labels
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 7))
    bits = [2 ** (i / 8) for i in range(-64, 33)]
    axes.plot(bits, [2.0 ** (-2 * b) for b in bits], color="0.4")
    least = "the least for normal values, 2^(-2R)"
    axes.annotate(least, (9, 2.0**-18), (-6, 0), textcoords="offset points", fontsize=8, color="0.4", ha="right")
    drawn = [(b, 2.0 ** (-2 * b)) for b in (2 ** (i / 64) for i in range(-512, 257))]
    spots: dict[str, tuple[tuple[float, float], str]] = {}
    for each in points:
        color = next((color for start, color in COLORS.items() if each.spec.startswith(start)), "black")
        bars = [[each.error - min(each.errors)], [max(each.errors) - each.error]]
        axes.errorbar(each.bits, each.error, yerr=bars, fmt="o", markersize=4, color=color, capsize=2)
        low, high = math.log(min(each.errors)), math.log(max(each.errors))
        drawn += [(each.bits, math.exp(low + (high - low) * i / 16)) for i in range(17)]
        spots[each.spec] = (each.bits, each.error), color
    axes.set(xscale="log", yscale="log", xlabel="bits a value, R", ylabel="relative squared error, lower is better")
    axes.set_xlim(min(p.bits for p in points) / 6, max(p.bits for p in points) * 2)
    axes.set_ylim(min(min(p.errors) for p in points) / 5, 2)
    ticks = [tick for tick in (0.003, 0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 16) if tick > axes.get_xlim()[0]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    labels.label_points(axes, spots, drawn)
    below = [each.spec for each in points if each.above < 0]
    said = f"{len(below)} of {len(points)} specs, all top-k, lose less than any code for normal values"
    said = said if all(spec.startswith("topk") for spec in below) else said.replace(", all top-k", "")
    labels.head(axes, said, f"one encoding without feedback; {title}")
    labels.save(figure, out)


def main() -> None:
    """Train, print the table, draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--picture", type=Path, metavar="OUT.svg")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    xs = gradients(STEPS)
    points = [point(spec, xs) for spec in SPECS]
    steps = ", ".join(str(step) for step in STEPS)
    title = f"gradients of a GPT of {xs[0].numel() / 1e6:.1f} M parameters, steps {steps}"
    table = Table(title=f"relative squared error, {title}; no feedback")
    for name in ("spec", "bits a value", *(f"step {step}" for step in STEPS), "mean", "bits above 2^(-2R)"):
        table.add_column(name, justify="left" if name == "spec" else "right")
    for each in points:
        errors = (f"{error:.3g}" for error in (*each.errors, each.error))
        table.add_row(each.spec, f"{each.bits:.3f}", *errors, f"{each.above:+.2f}")
    Console(width=120).print(table)
    if chosen.picture:
        draw(points, title, chosen.picture)
    below = [each.spec for each in points if each.above < 0]
    print(f"below the line of normal values, {len(below)} of {len(points)} specs: {', '.join(below)}")


if __name__ == "__main__":
    main()
