"""The programs: training, the demo, the report and the `commpress` command."""

import importlib
from typing import Any

PROGRAMS = ("cli", "demo", "explain", "lab", "probe", "ray_train", "report", "search", "shrink", "train")
"""Names that are imported on first use, since they need the `launch` extra."""


def __getattr__(name: str) -> Any:
    if name in PROGRAMS:
        return importlib.import_module(f"commpress.launch.{name}")
    raise AttributeError(f"module 'commpress.launch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PROGRAMS})
