"""The page of a report, and its parts: tables, figures, numbers folded away."""

from collections.abc import Sequence
from html import escape
from typing import Any

from commpress.launch import figures

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>commpress report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1e293b; margin: 0 auto; padding: 1rem; max-width: 62rem; }}
h2 {{ margin: 2.5rem 0 .5rem; border-top: 1px solid #cbd5e1; padding-top: 1rem; }}
h3 {{ margin: 1.5rem 0 0; }}
p {{ margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: .5rem 0; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #cbd5e1; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.text th, .text td {{ text-align: left; }}
.text td {{ white-space: normal; min-width: 4rem; vertical-align: top; overflow-wrap: anywhere; }}
.text td:first-child {{ overflow-wrap: normal; }}
.text td:nth-child(2) {{ min-width: 8rem; }}
.text td:last-child {{ min-width: 12rem; }}
summary {{ cursor: pointer; padding: .3rem 0; }}
.figure {{ margin: .5rem 0 1rem; }}
</style>
<script>{script}</script>
</head>
<body>
<h1>commpress report</h1>
{body}
</body>
</html>
"""


def megabytes(count: float | None) -> str:
    """Bytes as MB; nothing for what was not measured."""
    return "" if count is None else f"{count / 1e6:,.3f}"


def figure(drawn: Any) -> str:
    """A figure in the page."""
    return f'<div class="figure">{figures.as_html(drawn)}</div>'


def numbers(table: str) -> str:
    """The table behind a figure, folded away."""
    return f"<details><summary>Numbers</summary>{table}</details>"


def table(rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """An HTML table, its first row the head, which scrolls by itself; `text` for words. Cells are escaped."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide{" text" if text else ""}"><table>\n' + "\n".join(lines) + "\n</table></div>"
