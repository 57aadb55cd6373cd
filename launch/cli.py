"""The `commpress` command: train, demo, report, lab, explain, probe, search, export, judge, shrink; `commpress --version`.

Under torchrun: `torchrun --no-python ... commpress train`.
"""

import importlib
import sys
from collections.abc import Sequence

from commpress import extras

COMMANDS = {
    "train": "Train",
    "demo": "Demo",
    "report": "Report",
    "lab": "Lab",
    "explain": "Explain",
    "probe": "Probe",
    "search": "Search",
    "export": "Export",
    "judge": "Judge",
    "shrink": "Shrink",
}
"""The modules of the commands, and the classes of their flags."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the console script. Ends with a sentence if the packages of the `launch` extra are not installed."""
    args = sys.argv[1:] if args is None else args
    if list(args) == ["--version"]:
        from commpress.launch import version

        print("\n".join(version.lines()))
        return
    try:
        import plotly  # noqa: F401  the report's

        from commpress.launch import command_line
    except ModuleNotFoundError as error:
        sys.exit(f"error: {extras.missing('the commpress command', error, 'launch')}")
    wanted = [name for name in COMMANDS if name == args[0]] if args else []
    # import all modules only for the help that lists them: a rank that trains need not import the report's packages
    known = {
        name: getattr(importlib.import_module(f"commpress.launch.{name}"), COMMANDS[name])
        for name in wanted or COMMANDS
    }
    if wanted:
        command_line.read(known[args[0]], f"commpress {args[0]}", args[1:]).run()
        return
    about = "Train with compressed traffic, and see what it saves.\n--version prints what a bug report needs."
    command_line.read_command(known, about, "commpress", args or ["--help"]).run()


if __name__ == "__main__":
    main()
