"""The section about the choices of `auto`: what was tried, the prediction beside the measurement, and what became of it."""

from collections.abc import Sequence
from html import escape

from commpress.comm.choice import HEAD, Choice, history
from commpress.launch.records import Record
from commpress.launch.sections.html import table


def choices(runs: Sequence[tuple[str, Record]]) -> list[str]:
    """The table of the last search of each run or session by `auto`, and all of its choices."""
    found = [(name, [Choice.of(one) for one in r.get("report", {}).get("choices", ())]) for name, r in runs]
    found = [(name, made) for name, made in found if made]
    if not found:
        return []
    rows = [["run", *HEAD[:-1], "what became of it"]]
    rows += [[name, *cells] for name, made in found for cells in made[-1].rows()]
    said = (
        "<p>The specs of the last search: the step that the cost model predicted beside the median of the measured ones. The "
        "error is |mean - dense mean| / |dense mean|, the residual |residual| / |gradient|: the largest that were measured.</p>"
    )
    all_choices = (f"<p>{escape(name)}: {escape(history(made))}</p>" for name, made in found)
    return ["<h2>What auto chose</h2>", *all_choices, table(rows), said]
