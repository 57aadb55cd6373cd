"""commpress to run: the training program, the demo, the report and the `commpress` command."""

import importlib
from typing import Any

PROGRAMS = ("cli", "demo", "explain", "lab", "probe", "ray_train", "report", "search", "shrink", "train")
"""Imported when they are first asked for: they need the `launch` extra."""


def __getattr__(name: str) -> Any:
    if name in PROGRAMS:
        return importlib.import_module(f"commpress.launch.{name}")
    raise AttributeError(f"module 'commpress.launch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PROGRAMS})
