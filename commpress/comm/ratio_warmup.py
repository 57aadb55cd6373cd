"""The warm-up of a sparse codec's ratio, as in Deep Gradient Compression (Lin et al., arXiv:1712.01887, section 3.3).

    topk(0.25->0.01, 500)|int4       steps 0 to 99     topk(0.25)|int4
                                     100 to 199        topk(0.131)|int4       the ratio falls exponentially,
                                     200 to 299        topk(0.069)|int4       in stages of a fifth of the steps each
                                     300 to 399        topk(0.0362)|int4
                                     400 to 499        topk(0.019)|int4
                                     from 500 on       topk(0.01)|int4

A codec has one ratio, and its payload's length follows from it: this is no codec, but says which codec a step has. A step is
an exchange of gradients. All ranks count the same steps, so they have the same one.
"""

import re
from dataclasses import dataclass

from commpress.comm.codecs import WORDS, Codec, parse
from commpress.comm.codecs.base import share_text
from commpress.comm.codecs.random_k import RandomK
from commpress.comm.codecs.topk import TopK

STAGES = 5
"""Stages of a warm-up, each of which has its own ratio."""
ARROW = "->"
_LIKE = re.compile(rf"\s*([a-z][a-z0-9_]*)\s*\(([^()]*{ARROW}[^()]*)\)\s*(\|.*)?", re.DOTALL)
_ARGUMENT = re.compile(rf"\s*([^,]*?)\s*{ARROW}\s*([^,]*?)\s*,\s*([0-9]+)\s*")


def stage(step: int, steps: int) -> int:
    """Return the stage of a step, from 0 on; STAGES if a warm-up of so many steps is over."""
    return step * STAGES // steps if step < steps else STAGES


@dataclass(frozen=True)
class RatioWarmup:
    """A codec whose ratio begins at `first` and has fallen to the codec's own after so many `steps`."""

    codec: TopK | RandomK
    first: float
    steps: int

    def __str__(self) -> str:
        word = self.codec.word
        first, last = (share_text(word, share)[len(word) + 1 : -1] for share in (self.first, self.codec.ratio))
        rest = str(self.codec).removeprefix(share_text(word, self.codec.ratio))
        return f"{word}({first}{ARROW}{last}, {self.steps}){rest}"

    def at(self, step: int) -> Codec:
        """Return the codec of a step; the first step of a run is 0."""
        reached = stage(step, self.steps)
        if reached == STAGES:
            return self.codec
        ratio = self.first * (self.codec.ratio / self.first) ** (reached / STAGES)
        return self.codec.keeping(float(f"{ratio:.3g}") if reached else self.first)


def ratio_warmup(spec: object) -> RatioWarmup | None:
    """Read a spec with an arrow in its first stage, such as `topk(0.25->0.01, 500)|int4`; return None for all others.

    Raises ValueError, with the spec and the expected form.
    """
    if not isinstance(spec, str) or (match := _LIKE.fullmatch(spec)) is None:
        return None
    word, argument, values = match[1], match[2], match[3] or ""
    if word in WORDS and not (WORDS[word].sparse and WORDS[word].outer):
        raise ValueError(f"spec {spec!r}: {word} has no ratio that could fall; expected topk or randomk")
    if (read := _ARGUMENT.fullmatch(argument)) is None:
        raise ValueError(
            f"spec {spec!r}: expected the first ratio, the last one and the steps between, as in "
            f"topk(0.25{ARROW}0.01, 500); got ({argument.strip()})"
        )
    try:
        first, last = (parse(f"{word}({share}){values}") for share in (read[1], read[2]))
    except ValueError as error:
        raise ValueError(f"spec {spec!r}: {error}") from None
    assert isinstance(first, TopK | RandomK)
    assert isinstance(last, TopK | RandomK)
    if first.ratio <= last.ratio:
        raise ValueError(f"spec {spec!r}: expected a first ratio above the last, got {read[1]} and {read[2]}")
    if (steps := int(read[3])) < 1:
        raise ValueError(f"spec {spec!r}: expected at least 1 step, got {steps}")
    return RatioWarmup(last, first.ratio, steps)
