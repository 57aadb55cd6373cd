"""Codecs and their specs: `parse("topk(0.01)|int4")`. One file per family; add a new one to FAMILIES."""

import re

from commpress.comm.codecs.base import ArgumentError, Codec
from commpress.comm.codecs.cast import BFloat16, Float16, Identity
from commpress.comm.codecs.float8 import Float8
from commpress.comm.codecs.integer import Int4, Int8
from commpress.comm.codecs.powersgd import PowerSGD
from commpress.comm.codecs.random_k import RandomK
from commpress.comm.codecs.rotate import Rotate
from commpress.comm.codecs.sign import Sign
from commpress.comm.codecs.topk import TopK
from commpress.comm.codecs.two_bit import Int2

FAMILIES: tuple[type[Codec], ...] = (
    *(Identity, BFloat16, Float16, Float8, Int8, Int4, Int2, Sign),
    *(TopK, RandomK, Rotate, PowerSGD),
)
WORDS = {family.word: family for family in FAMILIES}

AUTO = "auto"
"""The word for a spec that is found during training. No codec has it."""

_STAGE = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\(\s*([^()]*?)\s*\))?\s*")

__all__ = ["AUTO", "WORDS", "Codec", "parse"]


def parse(spec: str | Codec) -> Codec:
    """Return the codec that a spec names. A codec is returned unchanged.

    A spec is `word` or `word(argument)`, and may go on after `|` with the codec of its values. `str(parse(s))` is canonical.
    Raises ValueError, with the spec and the expected form, TypeError if it is not a string.
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"a spec is a string such as 'topk(0.01)|int4', got {type(spec).__name__}: {spec!r}")
    first, *rest = spec.split("|", 1)
    match = _STAGE.fullmatch(first)
    if match is None:
        raise ValueError(f"spec {spec!r}: cannot read {first!r}, expected a word such as int4 or topk(0.01)")
    word, argument = match.groups()
    if word == AUTO:
        raise ValueError(
            f"spec {spec!r}: attach finds the codec of gradients while training goes on; expected one here, as int4"
        )
    if word not in WORDS:
        raise ValueError(f"spec {spec!r}: unknown codec {word!r}, known: {', '.join(WORDS)}")
    if argument is not None and "->" in argument:
        raise ValueError(
            f"spec {spec!r}: a ratio falls over steps only for gradients under DistributedDataParallel or DeepSpeed at ZeRO 0, "
            "without optimizer=, and in a spec's first stage; expected one ratio here, as in topk(0.01)"
        )
    family = WORDS[word]
    if rest and not family.outer:
        outer = ", ".join(f"{known.word}(...)" if known.sparse else known.word for known in FAMILIES if known.outer)
        raise ValueError(f"spec {spec!r}: only the values of one of {outer} can be coded in turn, not those of {word}")
    values = parse(rest[0]) if rest else None
    if values is not None and not values.flat:
        raise ValueError(
            f"spec {spec!r}: {values} codes matrices, and the values of {word} are not matrices; expected int4 or sign"
        )
    try:
        return family.from_spec(argument, values)
    except ArgumentError as error:
        raise ValueError(f"spec {spec!r}: {error}") from None
