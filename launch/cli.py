"""The `commpress` command: train, demo, report, lab, explain. Under torchrun: `torchrun --no-python ... commpress train`."""

import sys
from collections.abc import Sequence

from commpress import extras


def main(args: Sequence[str] | None = None) -> None:
    """Run the console script. Ends with a sentence if the packages of the `launch` extra are not installed."""
    try:
        import plotly  # noqa: F401  the report's

        from commpress.launch import command_line
    except ModuleNotFoundError as error:
        sys.exit(f"error: {extras.missing('the commpress command', error, 'launch')}")
    from commpress.launch.demo import Demo
    from commpress.launch.explain import Explain
    from commpress.launch.lab import Lab
    from commpress.launch.report import Report
    from commpress.launch.train import Train

    commands = {"train": Train, "demo": Demo, "report": Report, "lab": Lab, "explain": Explain}
    about = "Train with compressed traffic, and see what it brings."
    args = sys.argv[1:] if args is None else args
    command_line.read_command(commands, about, "commpress", args or ["--help"]).run()


if __name__ == "__main__":
    main()
