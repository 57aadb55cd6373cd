"""The page of a report, and its parts: tables, figures, numbers folded away."""

from collections.abc import Mapping, Sequence
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
<meta name="color-scheme" content="light">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 62rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.3; margin: .5rem 0; overflow-wrap: anywhere; }}
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
.about {{ color: #475569; font-size: 14px; margin: .2rem 0; max-width: none; }}
.own {{ border-left: .6em solid; padding-left: .4em; }}
@media (max-width: 600px) {{
  h1 {{ font-size: 1.25rem; }}
  h2 {{ margin-top: 1.5rem; font-size: 1.25rem; }}
  th, td {{ padding: .3rem .35rem; }}
  th, td:first-child {{ white-space: normal; }}
  th {{ vertical-align: bottom; }}
  .text td, .text td:nth-child(2) {{ min-width: 3rem; }}
  .text td:last-child {{ min-width: 10rem; }}
  .text table:has(th:nth-child(6)) {{ min-width: 48rem; }}
}}
</style>
<script>{script}</script>
</head>
<body>
{body}
</body>
</html>
"""


def megabytes(count: float | None) -> str:
    """Bytes as MB, with three digits if they are few; nothing for what was not measured."""
    if count is None:
        return ""
    return f"{count / 1e6:,.3f}" if count >= 1e5 or not count else f"{count / 1e6:.3g}"


def figure(drawn: Any) -> str:
    """A figure in the page."""
    return f'<div class="figure">{figures.as_html(drawn)}</div>'


def numbers(table: str) -> str:
    """The table behind a figure, folded away."""
    return folded("Numbers", table)


def folded(title: str, body: str) -> str:
    """A part that opens where it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(rows: Sequence[Sequence[str]], text: bool = False, look: Mapping[str, figures.Look] | None = None) -> str:
    """An HTML table, its first row the head, which scrolls by itself; `text` for words. Cells are escaped.

    A name of `look` in the head or in the first column has the colour that it has in the figures.
    """
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{_cell(cell, look)}</th>" for cell in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{escape(cell) if i else _cell(cell, look)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in body
    ]
    return f'<div class="wide{" text" if text else ""}"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(cell: str, look: Mapping[str, figures.Look] | None) -> str:
    if not look or cell not in look:
        return escape(cell)
    return f'<span class="own" style="border-color: {look[cell].colour}">{escape(cell)}</span>'
