"""What a run gained against the same run without compression: one sentence, made of the two records alone.

    auto chose int4: 7.8x fewer bytes a step (5.7x with its search), 1.83x faster, same loss (2.518, plain 2.537)

Seconds are those of the median step. Bytes are, too, but for auto where it decides for gradients alone: those are of the steps
by the spec that it has chosen.
Losses count as the same if they differ by SAME_LOSS at most.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from commpress.comm.choice import Choice, cause_of, without_pieces
from commpress.comm.meter import SPEC_IS_NONE
from commpress.launch.records import Record

PLAIN, AUTO, LOOKING = "none", "auto", ", still looking"
SAME_LOSS = 0.02
"""As a share of plain training's. Of the demo, 200 steps with seeds 0 to 3: `none` ends between 2.482 and 2.578, 4 %;
`int4` ends -0.6 % to +2.1 % from `none` of the same seed."""
ABOUT_LOSS = f"Losses that differ by {SAME_LOSS * 100:g} % or less count as the same: the demo's seeds lie 4 % apart."
ALIKE = 1.05
"""Bytes and seconds whose ratio is smaller are called the same."""
SHARED = ("steps", "batch", "accumulate", "context", "layers", "width", "data")
"""Settings that must agree before two runs say something about each other."""


def headline(runs: Sequence[tuple[str, Record]]) -> str:
    """Return the sentence of several runs, by name: of auto's against plain's, else of the fastest that keeps the loss, if any.

    Of one run, or of runs that nothing uncompressed goes with, it is the receipt's last line of the first.
    """
    plain = next((r for _, r in runs if r["settings"]["compress"] == PLAIN), None)
    others = [(n, r) for n, r in runs if plain is not None and r is not plain and comparable(r, plain)]
    if plain is None or not others:
        name, record = runs[0]
        return str(record["receipt"][-1]) if record.get("receipt") else f"{name}: {_sent(record)}"
    by_auto = [(n, r) for n, r in others if r["settings"]["compress"] == AUTO]
    keep = [(n, r) for n, r in others if (off := _off(r, plain)) is not None and off <= SAME_LOSS]
    name, record = min(by_auto or keep or others, key=lambda run: float(run[1]["median_step_seconds"]))
    if not by_auto and len(others) > 1:
        name += f", the fastest of {len(others)}" + (" that keeps the loss" if keep else "")
    return sentence(name, record, plain)


def comparable(one: Record, other: Record) -> bool:
    """Whether two runs are of the same model, ranks, steps and text."""
    keys = ("parameters", "world_size", "steps_done", "text")
    settings = ((r["settings"].get(key) for key in SHARED) for r in (one, other))
    return all(one.get(key) == other.get(key) for key in keys) and list(next(settings)) == list(next(settings))


def sentence(name: str, run: Record, plain: Record) -> str:
    """Return what a run of that name gained against the `plain` one."""
    faster = plain["median_step_seconds"] / run["median_step_seconds"] if run["median_step_seconds"] else 1.0
    return f"{_subject(name, run)}: {_bytes(run)}, {_speed(faster)}, {_loss(run, plain)}"


def chosen(run: Record) -> str:
    """Return the spec that auto has chosen; empty if it is still looking, or the run is not auto's."""
    _, by_auto, spec = str(run.get("report", {}).get("spec", "")).rpartition(f"{AUTO}: ")
    return spec if by_auto and not spec.endswith(LOOKING) else ""


def times(ratio: float) -> str:
    """Return 1.83x, 12.3x."""
    return f"{ratio:.3g}x"


def _subject(name: str, run: Record) -> str:
    if run["settings"]["compress"] != AUTO:
        return name
    spec = chosen(run)
    if spec == PLAIN:
        choices = [Choice.of(one) for one in run["report"].get("choices", ())]
        return f"{name} chose {PLAIN}, since {cause_of(choices) or 'no spec was faster on this link'}"
    return f"{name} chose {spec}" if spec else f"{name} was still looking after {run['steps_done']} steps"


def _bytes(run: Record) -> str:
    """Return the bytes of a step against a dense one, and of all steps where a search or a warm-up changes them."""
    whole = float(run["traffic"]["ratio"])
    step = _of_chosen(run) or _of_most(run) or whole
    beside = ""
    if max(step, whole) > ALIKE * min(step, whole):
        by = "with its search" if run["settings"]["compress"] == AUTO else "over the run"
        beside = f" ({_times_bytes(whole)} {by})"
    return f"{_fewer(step)} a step{beside}"


def _of_chosen(run: Record) -> float | None:
    """Dense bytes over sent ones in the steps by the spec that auto has chosen, whatever it tried before or behind them; None
    where parameters are exchanged beside the gradients, by a spec of their own."""
    report, spec = run.get("report", {}), without_pieces(chosen(run))
    rows = report.get("rows", [])
    if any(row.get("role") == "parameters" for row in rows):
        return None
    mine = [row for row in rows if row["spec"] == spec]
    steps = max((row["steps"] for row in mine), default=0)
    if not steps:
        return None
    always = [
        row for row in rows if row["spec"] != spec and row["reason"] not in ("", SPEC_IS_NONE)
    ]  # none compresses these
    share = steps / report["steps"]
    dense, sent = (
        sum(row[key] for row in mine) + share * sum(row[key] for row in always) for key in ("dense_bytes", "sent_bytes")
    )
    return float(dense / sent) if sent else None


def _of_most(run: Record) -> float | None:
    """The median of a step's dense bytes over its sent ones; None if most steps send nothing, which have no such ratio."""
    rows = [row for row in run["curve"] if "dense_bytes" in row]
    steps = [(b["dense_bytes"] - a["dense_bytes"], b["sent_bytes"] - a["sent_bytes"]) for a, b in pairwise(rows)]
    ratios = [dense / sent for dense, sent in steps if sent > 0]
    return statistics.median(ratios) if 2 * len(ratios) > len(steps) else None


def _fewer(ratio: float) -> str:
    if 1 / ALIKE < ratio < ALIKE:
        return "the same bytes"
    return f"{_times_bytes(ratio)} fewer bytes" if ratio > 1 else f"{_times_bytes(1 / ratio)} more bytes"


def _times_bytes(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _speed(faster: float) -> str:
    if 1 / ALIKE < faster < ALIKE:
        return "no faster and no slower"
    return f"{times(faster)} faster" if faster > 1 else f"{times(1 / faster)} slower"


def _loss(run: Record, plain: Record) -> str:
    off = _off(run, plain)
    if off is None:
        return "its loss not known, as a run has not finished"
    both = f"({run['final_validation_loss']:.3f}, plain {plain['final_validation_loss']:.3f})"
    if abs(off) <= SAME_LOSS:
        return f"same loss {both}"
    return f"loss {abs(off):.1%} {'higher' if off > 0 else 'lower'} {both}"


def _off(run: Record, plain: Record) -> float | None:
    """How far a run's loss is above plain's, as a share of it; None if a run has not finished."""
    ours, theirs = run["final_validation_loss"], plain["final_validation_loss"]
    return None if ours is None or theirs is None else float(ours / theirs - 1) if theirs else 0.0


def _sent(run: Record) -> str:
    return f"sent {run['traffic']['sent_bytes'] / 1e6 / max(run['steps_done'], 1):.3f} MB a step, {_bytes(run)}"
