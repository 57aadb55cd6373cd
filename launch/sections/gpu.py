"""The section about a GPU: what `make gpu-check` has found on it."""

from collections.abc import Sequence
from html import escape

from commpress.launch.gpu_record import COLUMNS, LEGEND, answer, lines, title
from commpress.launch.records import Record
from commpress.launch.sections.html import table


def gpu_checks(checked: Sequence[Record]) -> list[str]:
    """A table for each record of `make gpu-check`, a part of it for each kind of thing that was tried."""
    parts = []
    for r in checked:
        name = "Rehearsal of the check of a GPU" if r["rehearsal"] else "Check of a GPU"
        parts += [f"<h2>{name}</h2>", f"<p>{escape(title(r))}.</p>", f"<p>{escape(answer(r))}.</p>"]
        for part, rows in lines(r):
            head = [part, *COLUMNS[1:]]
            used = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
            cells = [[line[i] for i in used] for line in (head, *rows)]
            parts.append(table(cells, text=len(used) == 2))
        parts.append(f"<p>{escape(LEGEND)}.</p>")
    return parts
