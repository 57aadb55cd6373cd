"""One HTML file from any number of JSON files: runs of the training program, reports of sessions, benchmarks of step time and
loss, predictions, timelines, searches, judgements, exports.

A file is recognised by its content. The page needs nothing from the network: plotly's script is in it, once.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated

from commpress import extras
from commpress.launch import records
from commpress.launch.records import (
    CHECKED,
    EXPLAINED,
    EXPORTED,
    GPU_CHECK,
    JUDGED,
    LOSSES,
    PROBED,
    RUN,
    SEARCHED,
    SESSION,
    STEP_TIMES,
    TIMELINE,
    Record,
    files_of,
    link_name,
    ran,
    read,
)

try:
    import plotly.offline
    from tyro.conf import Positional, arg

    from commpress.launch import command_line, figures
    from commpress.launch.sections.benchmarks import loss_against_bytes, loss_against_time, predictions, step_time
    from commpress.launch.sections.choices import choices
    from commpress.launch.sections.exports import exports
    from commpress.launch.sections.gpu import gpu_checks
    from commpress.launch.sections.html import PAGE, table
    from commpress.launch.sections.judgements import judgements
    from commpress.launch.sections.opening import name, opening
    from commpress.launch.sections.runs import (
        alike,
        as_run,
        differences,
        recipes,
        results,
        session_names,
        titles,
        traffic,
        what_was_sent,
    )
    from commpress.launch.sections.searches import searches
    from commpress.launch.sections.timelines import timelines
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.report", error, "launch") from None

PAGE_OF_FOLDER = "report.html"


def page(files: Sequence[Record]) -> str:
    """Return the report as HTML, with the sections that have records. Raises ValueError without records."""
    if not files:
        raise ValueError("a report needs at least one record.json, got none")
    of: dict[str, list[Record]] = {kind: [] for kind in records.NEEDED}
    for record in files:
        of[records.kind(record)].append(record)
    runs = list(zip(titles(of[RUN]), of[RUN], strict=True))
    named = [(name, "torch" if r["settings"]["compress"] == "none" else "commpress") for name, r in runs]
    named += [(row["name"], row["kind"]) for r in (*of[STEP_TIMES], *of[LOSSES]) for row in r["rows"] if ran(row)]
    sessions = [(name, as_run(r)) for name, r in zip(session_names(of[SESSION]), of[SESSION], strict=True)]
    named += [(name, "torch" if r["report"]["spec"] == "none" else "commpress") for name, r in sessions]
    look = figures.looks(named)
    parts = [
        *opening(runs, sessions, of),
        *differences(runs, look),
        *results(runs, look),
        *benchmarks_run(of[STEP_TIMES] + of[LOSSES]),
        *what_was_sent(sessions),
        *choices([*runs, *sessions]),
        *step_time(of[STEP_TIMES], look),
        *loss_against_bytes(runs, of[LOSSES], look),
        *loss_against_time(runs, of[LOSSES], of[STEP_TIMES], look),
        *recipes(runs),
        *traffic([*runs, *sessions], look),
        *predictions([*of[EXPLAINED], *of[PROBED]], of[CHECKED]),
        *exports(of[EXPORTED]),
        *judgements(of[JUDGED]),
        *timelines(of[TIMELINE]),
        *gpu_checks(of[GPU_CHECK]),
        *searches(of[SEARCHED]),
        *alike(runs),
    ]
    title = f"{name(files, runs)}: commpress report"
    return PAGE.format(title=escape(title), body="\n".join(parts), script=plotly.offline.get_plotlyjs())


def benchmarks_run(measured: Sequence[Record]) -> list[str]:
    """The table of benchmarks."""
    if not measured:
        return []
    links: dict[tuple[str, ...], list[str]] = {}
    for r in measured:
        model = f"{r['model']}, {r['parameters'] / 1e6:.1f} M parameters"
        where = (str(r.get(key, "")) for key in ("world_size", "tokens_per_step", "machine", "torch"))
        link = link_name(r["link"], hosts=True) if r["what"] == STEP_TIMES else "any"
        links.setdefault((r["what"], model, *where), []).append(link)
    rows = [["benchmark", "model", "ranks", "tokens a step", "machine", "torch", "links"]]
    rows += [[*key, "; ".join(dict.fromkeys(names))] for key, names in links.items()]
    return [table(rows, text=True)]


@dataclass(frozen=True)
class Report:
    """Write one HTML report from any mix of the JSON files that commpress writes."""

    out: Path
    """The report to write; or the folder of a run, which gets report.html."""
    files: Annotated[Positional[tuple[Path, ...]], arg(help_behavior_hint="(required without a folder)")] = ()
    """Runs' record.json, sessions' reports, benchmarks' records, timelines; a folder stands for all files in it."""

    def run(self) -> None:
        """Write the report. Ends the program with code 1 and a sentence if that fails."""
        try:
            if self.out.suffix == ".json":
                raise ValueError(
                    f"{self.out}: expected the page to write first, such as report.html, got the name of a JSON file"
                )
            alone = not self.files and os.path.isdir(self.out)  # of a name that is too long, too
            out, files = (self.out / PAGE_OF_FOLDER, (self.out,)) if alone else (self.out, self.files)
            if not files:
                raise ValueError(f"{self.out}: expected files of runs after the page to write, or only a run's folder")
            write(out, page_of([read(path) for given in files for path in files_of(given)]))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        print(f"report in {out}")


def page_of(files: Sequence[Record]) -> str:
    """Return the result of `page`. Raises ValueError that names the file if it has a wrong value."""
    try:
        return page(files)
    except NOT_AS_EXPECTED as error:
        for record in files:
            try:
                page([record])
            except NOT_AS_EXPECTED as own:
                raise ValueError(f"{record['file']}: {records.not_one(records.kind(record), own)}") from None
        raise ValueError(f"these files do not go together: {type(error).__name__}: {error}") from None


NOT_AS_EXPECTED = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)


def write(out: Path, html: str) -> None:
    """Write the page, and its folder if there is none. Raises ValueError with the reason if it cannot."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{out}: cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    command_line.read(Report, "python -m commpress.launch.report").run()
