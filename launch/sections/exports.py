"""The section about exported files: how large each is, and how far it is from what training computed."""

from collections.abc import Sequence
from html import escape

from commpress.launch.records import Record
from commpress.launch.sections.html import megabytes, table


def exports(found: Sequence[Record]) -> list[str]:
    """A table of all files, and what could not be written."""
    if not found:
        return []
    rows = [["of", "format", "file", "MB", "difference"]]
    rows += [
        [row.get("of", record["of"]), row["format"], row["path"], megabytes(row["bytes"]), f"{row['difference']:.1e}"]
        for record in found
        for row in record["rows"]
    ]
    said = "<p>Difference: the largest of the example's outputs, between training with quantisers on and the file.</p>"
    failed = [f"<p>{escape(record['of'])}: {escape(each)}</p>" for record in found for each in record.get("failed", ())]
    return ["<h2>Exported files</h2>", table(rows), said, *failed]
