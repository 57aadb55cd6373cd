"""A report as a table, in text and in HTML for notebooks. Both have the same cells: a row per bucket, then the sums."""

from collections.abc import Iterator
from dataclasses import replace
from html import escape as html_escape
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from commpress.comm.choice import history

if TYPE_CHECKING:
    from commpress.comm.meter import Report, Row

HEAD = ("bucket", "values", "dense MB/step", "sent MB/step", "ratio", "encode ms", "wire ms", "decode ms", "how")
PHASES = ("encode", "wire", "decode")
SUMS = ("dense_bytes", "sent_bytes", "received_bytes", "inside_bytes", "backend_bytes")


def text(report: "Report") -> str:
    """Return the table for a terminal, 132 characters wide."""
    table = Table(title=escape(title(report)), caption=beside(report) or None, caption_justify="left")
    for name in HEAD:
        table.add_column(name, justify="left" if name in (HEAD[0], HEAD[-1]) else "right")
    for cells in buckets(report):
        table.add_row(*map(escape, cells))
    table.add_section()
    for cells in sums(report):
        table.add_row(*map(escape, cells))
    out = StringIO()
    Console(file=out, width=132).print(table)
    return out.getvalue()


def html(report: "Report") -> str:
    """Return the table as HTML, without scripts; all text is escaped."""

    def row(cells: tuple[str, ...], tag: str = "td") -> str:
        aligned = ("left" if at in (0, len(cells) - 1) else "right" for at in range(len(cells)))
        return "".join(
            f'<{tag} style="text-align: {side}">{html_escape(cell)}</{tag}>'
            for side, cell in zip(aligned, cells, strict=True)
        )

    def rows(cells: Iterator[tuple[str, ...]]) -> str:
        return "\n".join(f"<tr>{row(each)}</tr>" for each in cells)

    note = f"\n<p>{html_escape(said)}</p>" if (said := beside(report)) else ""
    return (
        f"<table>\n<caption>{html_escape(title(report))}</caption>\n<thead><tr>{row(HEAD, 'th')}</tr></thead>\n"
        f"<tbody>\n{rows(buckets(report))}\n</tbody>\n<tbody>\n{rows(sums(report))}\n</tbody>\n</table>{note}"
    )


def title(report: "Report") -> str:
    """Return the title of a table: its traffic, rank and steps."""
    return f"commpress {report.spec}: rank {report.rank} of {report.world_size}, {report.steps} steps"


def buckets(report: "Report") -> Iterator[tuple[str, ...]]:
    """Return the cells of each bucket, summed over its phases."""
    for row in _all_phases(report.rows):
        ms = (f"{row.seconds[p] * 1e3 / max(row.steps, 1):.2f}" for p in PHASES)
        name = str(row.bucket) if len(report.roles) == 1 else f"{row.role} {row.bucket}"
        name += f" ({row.steps} steps)" if row.steps != report.steps else ""
        yield name, f"{row.values:,}", *_bytes(row.dense_bytes, row.sent_bytes, row.steps), *ms, row.how


def sums(report: "Report") -> Iterator[tuple[str, ...]]:
    """Return the cells of the sums: by role if there are several, by rule, by phase, and in all."""
    each, roles = max(report.steps, 1), report.roles
    for role, of in roles.items() if len(roles) > 1 else ():
        yield f"all {role}", "", *_bytes(of["dense_bytes"], of["sent_bytes"], each), "", "", "", ""
    for rule, by in report.rules.items():
        mb = _bytes(by["dense_bytes"], by["sent_bytes"], each)
        yield rule, f"{by['values']:,}", *mb, "", "", "", "by rule"
    for phase, of in report.phases.items():
        mb = _bytes(of["dense_bytes"], of["sent_bytes"], of["steps"])
        yield phase, "", *mb, "", "", "", f"{of['steps']} steps"
    dense, sent, _ = _bytes(report.dense_bytes, report.sent_bytes, each)
    ms = (f"{report.seconds[p] * 1e3 / each:.2f}" for p in PHASES)
    after, hidden = (report.seconds[k] * 1e3 / each for k in ("exposed", "hidden"))
    yield "all", "", dense, sent, f"{report.ratio:.1f}", *ms, f"{hidden:.2f} ms hidden, {after:.2f} ms exposed"


def beside(report: "Report") -> str:
    """Return sentences about the choices of `auto`, and about bytes that stayed inside the node, or that the backend would
    send in excess."""
    return " ".join(filter(None, (_chosen(report), _inside_and_between(report), _backend_more(report))))


def _bytes(dense: float, sent: float, steps: int) -> tuple[str, str, str]:
    was, now = (f"{b / 1e6 / max(steps, 1):.3f}" for b in (dense, sent))
    return was, now, f"{dense / sent:.1f}" if sent else "-"


def _chosen(report: "Report") -> str:
    if not report.choices:
        return ""
    last = report.choices[-1]
    tried = (f"{spec} {measured} ({predicted})" for spec, predicted, measured, *_ in last.rows() if measured != "-")
    return f"Choices of auto: {history(report.choices)}. Milliseconds a step, measured (predicted): {', '.join(tried)}."


def _inside_and_between(report: "Report") -> str:
    inside = [row for row in report.rows if row.inside_bytes]
    if not inside:
        return ""
    stayed, sent = (sum(getattr(row, key) for row in inside) for key in ("inside_bytes", "sent_bytes"))
    stay, leave = (f"{b / 1e6 / max(report.steps, 1):.3f}" for b in (stayed, sent - stayed))
    of = ", ".join(dict.fromkeys("updates" if row.role == "updates" else "hierarchical" for row in inside))
    return (
        f"Of what was sent ({of}), {stay} MB a step stayed inside the node, as it is; {leave} MB went to other nodes."
    )


def _backend_more(report: "Report") -> str:
    more = [row for row in report.rows if row.backend_bytes > row.dense_bytes]
    if not more:
        return ""
    dense, backend = (sum(getattr(row, key) for row in more) for key in ("dense_bytes", "backend_bytes"))
    megabytes = (f"{b / 1e6 / max(report.steps, 1):.3f}" for b in (backend, dense))
    return (
        "Uncompressed, the backend itself would have sent {} MB a step where a reduce-scatter must send {}: it all-reduces "
        "and keeps a part. Ratios are against the latter."
    ).format(*megabytes)


def _all_phases(rows: "list[Row]") -> "list[Row]":
    """Return one row for each bucket and override, summed over the phases."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.bucket, row.values, row.dtype, row.spec, row.exchange, row.reason, row.role, *row.rules.items())
        if (whole := found.get(key)) is None:
            found[key] = replace(row, seconds=dict(row.seconds))
            continue
        whole.steps += row.steps
        for name in SUMS:
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        whole.seconds = {phase: whole.seconds[phase] + row.seconds[phase] for phase in PHASES}
    return list(found.values())
