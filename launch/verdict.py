"""One sentence, from predictions: whether training waits for the network, and what to do about it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from commpress.comm.auto import SPECS
from commpress.comm.cost import BACKWARD
from commpress.comm.search import PLAIN, WORTH

BEYOND = ("sign", "topk(0.01)|int4")
"""A 1-bit spec and a sparse one, which keep the loss only with a compressed optimizer."""
MATTERS = 0.9
"""They are named if the better one takes less than this share of the best safe spec's time."""
LOST = 0.1
"""The network is the bottleneck if the exchange takes more than this share of a step."""
FREE = "no safe spec is predicted to be faster"

Row = Mapping[str, Any]


def verdict(rows: Sequence[Row], step_seconds: float | None) -> str:
    """Return the sentence; `rows` come from `predictions.predicted`, with SPECS and BEYOND among others.

    Without `step_seconds`, which is a step without communication, the exchange alone is judged.
    """
    known = "communication_seconds" if step_seconds is None else "step_seconds"
    seconds = {str(row["spec"]): float(row[known]) for row in rows}
    plain = seconds[PLAIN]
    best = min((spec for spec in SPECS if spec != PLAIN), key=seconds.__getitem__)
    faster = f"{best} is predicted at {span(seconds[best])}" if seconds[best] < WORTH * plain else ""
    said = _exchange_alone(plain, faster) if step_seconds is None else _whole_step(plain, plain - step_seconds, faster)
    beyond = min(BEYOND, key=seconds.__getitem__)
    if seconds[beyond] < MATTERS * min(plain, seconds[best]):
        said += (
            f" {beyond} is predicted at {span(seconds[beyond])}, but 1-bit and sparse specs need a compressed optimizer, "
            "such as commpress.optim.OneBitAdamW, to keep the loss."
        )
    return said


def _exchange_alone(plain: float, faster: str) -> str:
    alone = f"plain DDP would exchange for {span(plain)} a step"
    if not faster:
        return f"Your network is not the bottleneck: {alone}; {FREE}."
    # backward hides an exchange that takes no longer than it
    return (
        f"Your network is the bottleneck of steps that compute for less than {span(plain / BACKWARD)}: {alone}; {faster}. "
        "commpress.attach(model) finds it. Say --step-seconds for the whole step."
    )


def _whole_step(plain: float, lost: float, faster: str) -> str:
    # waiting, and computing for as much longer as the exchange takes cores from it
    whole = span(plain)
    part = span(lost, like=plain).removesuffix(whole[whole.index(" ") :])
    spends = f"plain DDP would spend {part} of {whole} a step on its exchange"
    if lost <= LOST * plain:
        return f"Your network is not the bottleneck: {spends}; {faster or FREE}."
    if faster:
        return f"Your network is the bottleneck: {spends}; {faster}. commpress.attach(model) finds it."
    return f"Your network is the bottleneck, but {FREE}: {spends}."


def span(seconds: float, like: float | None = None) -> str:
    """Return seconds with a unit, the unit of `like` if given: 420 ms, 3.1 ms, 12.5 s."""
    size = seconds if like is None else like
    unit, factor = ("s", 1.0) if size >= 1 else ("ms", 1e3)
    value = seconds * factor
    digits = 2 if value <= 0 else max(0, min(2, 2 - math.floor(math.log10(value))))
    return f"{value:,.{digits}f} {unit}"
