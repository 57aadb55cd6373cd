"""What a reader is told of a value that a recipe cannot have: pydantic's findings as sentences, the key in front."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "string_pattern_mismatch": "text such as '2:4'",
    "too_short": "at least one, or without this key",
    "invalid_key": "a word as key",
}
"""In the place of what pydantic says, which speaks of Python's types."""


def sentence(error: Any, keys: Mapping[str, Sequence[str]]) -> str:
    """One of pydantic's findings, the key in front. `keys` are those of each table, and of the file itself by ""."""
    key = ""
    for place in error["loc"]:
        key += f"[{place}]" if isinstance(place, int) else f".{place}"
    key, kind, got = key.lstrip("."), error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key, {_known(error['loc'], keys)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":  # of a table's own check, which may say the key within
        told = str(error["ctx"]["error"])
        within = bool(error["loc"]) and told.partition(":")[0] in keys[str(error["loc"][0])]
        return f"{key}.{told}" if within else f"{key}: {told}" if key else told
    expected = EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"{key}: expected {expected}, got {shown(got)}{_advice(key, kind, got)}"


def _known(place: tuple[int | str, ...], keys: Mapping[str, Sequence[str]]) -> str:
    """Return which key may be meant, or which there are."""
    known = keys[str(place[0]) if len(place) > 1 else ""]
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"


def shown(got: Any) -> str:
    """Return a value as an error has it, cut at 80 characters."""
    text = "nothing" if got is None else repr(list(got) if isinstance(got, tuple) else got)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _advice(key: str, kind: str, got: Any) -> str:
    if kind == "tuple_type" and isinstance(got, str) and key.endswith(("parameters", "layers", "formats")):
        return f": write [{got!r}]"
    if kind == "float_type" and isinstance(got, str) and got.endswith("%"):
        return ": write a share, 0.8 for 80%"
    if kind in ("int_type", "float_type") and isinstance(got, str):
        return ": write it as a number, without quotes"
    return ""
