"""The `commpress` command: train, demo, report, lab, explain. Under torchrun: `torchrun --no-python ... commpress train`."""

import sys

from commpress import extras


def main() -> None:
    """The console script. Ends with a sentence if the packages of the `launch` extra are not installed."""
    try:
        import plotly  # noqa: F401  the report's
        import typer
    except ModuleNotFoundError as error:
        sys.exit(f"error: {extras.missing('the commpress command', error, 'launch')}")
    from commpress.launch import demo, explain, lab, report, train

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
    app.command("train")(train.command)
    app.command("demo")(demo.command)
    app.command("report")(report.command)
    app.command("lab")(lab.main)
    app.command("explain")(explain.command)
    app()


if __name__ == "__main__":
    main()
