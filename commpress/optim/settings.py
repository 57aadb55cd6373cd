"""Settings of optimizers: their ranges, and their values as ranks compare them."""

from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """Return a setting of a group as a JSON value."""
    return value.item() if isinstance(value, Tensor) else value


def require_in_range(name: str, value: float, least: float, below: float = float("inf")) -> None:
    """Raise ValueError unless least <= value < below."""
    if not least <= value < below:
        raise ValueError(f"{name} {value}: expected a number in [{least:g}, {below:g})")
