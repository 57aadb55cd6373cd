"""Packages that a part of commpress needs beyond the core, and the extra that installs them."""

import sys

from commpress.notice import global_rank, host_name


def missing(part: str, error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return the error for `part`, such as "commpress.model", whose import ended with `error`: it names the extra to install.

    A program of ours that cannot start (`python -m commpress.launch.train`) ends here instead, with that sentence alone.
    """
    program = getattr(sys.modules.get("__main__"), "__spec__", None)
    started = "" if program is None else str(program.name)
    starts = started.startswith("commpress.launch.")
    name = started if starts else part
    sentence = f"{name}: found no {str(error.name).split('.')[0]}, expected it; pip install 'commpress[{extra}]'"
    if starts and part.startswith("commpress.launch"):
        who = f"rank {global_rank()} ({host_name()}): " if global_rank() else ""
        sys.exit(f"error: {who}{sentence}")
    return ModuleNotFoundError(sentence, name=error.name)
