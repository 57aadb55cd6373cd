"""The section about searches: quality over size of each trial, and the front as a table."""

from collections.abc import Sequence
from html import escape
from typing import Any

from commpress.launch import figures
from commpress.launch.records import Record
from commpress.launch.sections.html import figure, table

COLUMNS = ("trial", "choice", "quality", "size")
STATES = {"done": "judged to the end", "pruned": "given up early", "failed": "without a finite quality"}
"""What a trial's state is called."""


def searches(found: Sequence[Record]) -> list[str]:
    """A figure and a table for each search."""
    parts = []
    for record in found:
        parts += [f"<h2>Search: {escape(str(record['problem']))}</h2>", f"<p>{escape(sentence(record))}</p>"]
        if record["front"]:
            parts += [figure(figures.front(points(record))), table(front_rows(record), text=True)]
    return parts


def sentence(record: Record) -> str:
    """Return how many trials there were, of which strategy, and what was looked for."""
    states = [row["state"] for row in record["rows"]]
    told = ", ".join(f"{states.count(state)} {called}" for state, called in STATES.items() if states.count(state))
    weights = record["weights"]
    sought = (
        "the front of quality and size" if weights is None else f"h = {weights['alpha']:g} f - {weights['beta']:g} g"
    )
    return f"{record['strategy']} looked for {sought}: {len(states)} trials, {told or 'none'}."


def front_rows(record: Record) -> list[list[str]]:
    """The table of the front, its head first; h where there are weights, and what finalists came to on their own."""
    weights, finals, rows = record["weights"], record["finals"], {row["number"]: row for row in record["rows"]}
    head = [*COLUMNS, *(["h"] if weights else []), *(["trained on its own"] if finals else [])]
    lines = [head]
    for number in record["front"]:
        row = rows[number]
        best = " (best)" if number == record["best"] and weights else ""
        line = [f"{number}{best}", choice_text(row["choice"]), f"{row['quality']:.4g}", f"{row['size']:,.6g}"]
        if weights:
            line.append(f"{weights['alpha'] * row['quality'] - weights['beta'] * row['size']:.4g}")
        if finals:
            line.append(f"{finals[str(number)]:.4g}" if str(number) in finals else "")
        lines.append(line)
    return lines


def points(record: Record) -> dict[str, list[tuple[float, float, str]]]:
    """Size, quality and a text of the trials of the front, and of the others that are done, by name."""
    rows = {row["number"]: row for row in record["rows"] if row["quality"] is not None}
    front = [number for number in record["front"] if number in rows]
    names = {"front": front, "other trials": [number for number in rows if number not in front]}
    return {name: [_point(rows[number]) for number in numbers] for name, numbers in names.items() if numbers}


def choice_text(choice: dict[str, Any]) -> str:
    """A choice in one line."""
    return ", ".join(f"{name} = {option}" for name, option in choice.items())


def _point(row: Record) -> tuple[float, float, str]:
    return row["size"], row["quality"], f"trial {row['number']}: {choice_text(row['choice'])}"
