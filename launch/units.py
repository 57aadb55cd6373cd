"""Rates, delays and shares as people type them: `10gbit`, `20ms`, `0.1%`. Each function raises ValueError for other text."""

import re

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*"
MOST = 1e18
"""The largest number with its unit, in bits a second, seconds or parameters, so that results stay finite."""


def rate(text: str, name: str = "rate") -> float:
    """Return `10gbit`, `2.5Mbit` in bits a second; `name` is its name in the error."""
    found = _split(text, "([kmgt]?)bit")
    if found is None or not 1 <= (value := found[0] * PREFIXES[found[1]]) <= MOST:
        raise ValueError(
            f"{name} {text!r}: expected a number above 0 and kbit, mbit, gbit or tbit, such as 10gbit, from 1 bit a second to "
            f"{MOST:g}"
        )
    return value


def seconds(text: str, name: str = "delay") -> float:
    """Return `20ms`, `50us`, `1s`, `0ms` in seconds."""
    found = _split(text, "(us|ms|s)")
    if found is None or (value := found[0] * _SECONDS[found[1]]) > MOST:
        raise ValueError(f"{name} {text!r}: expected a number and us, ms or s, such as 20ms, at most {MOST:g} s")
    return value


def share(text: str, name: str = "loss") -> float:
    """Return `0.1%` as a number in [0, 1)."""
    found = _split(text, "(%)")
    if found is None or found[0] >= 100:
        raise ValueError(f"{name} {text!r}: expected a percentage below 100, such as 0.1%")
    return found[0] / 100


def parameters(text: str, name: str = "params") -> int:
    """Return `7e9`, `7b`, `350m` as a number of parameters."""
    found = _split(text, "([kmbt]?)")
    if found is None or not 0 < (value := found[0] * (PREFIXES | {"b": 1e9})[found[1]]) <= MOST:
        raise ValueError(
            f"{name} {text!r}: expected a number of parameters above 0, such as 7e9, 7b or 350m, at most {MOST:g}"
        )
    return max(1, round(value))


def bandwidth(bits: float) -> str:
    """1e9 -> "1 Gbit/s", with three digits."""
    unit = next((u for u in reversed(PREFIXES) if bits >= PREFIXES[u]), "")
    return f"{bits / PREFIXES[unit]:.3g} {'k' if unit == 'k' else unit.upper()}bit/s"


def _split(text: str, unit: str) -> tuple[float, str] | None:
    found = re.fullmatch(_NUMBER + unit, text.strip().lower())
    return None if found is None else (float(found[1]), found[2])
