"""The package's commands in this process, as their console script runs them."""

import contextlib
import io
from typing import NamedTuple


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def run_command(*arguments: object) -> Ended:
    """Run `commpress ARGUMENTS` here. An exception that is no end of the program is not caught."""
    from commpress.launch import cli

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))
