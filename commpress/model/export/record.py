"""export.json: what was exported into a folder, with a SHA-256 of each file, by which damage is noticed.

    {"what": "export", "of": "runs/small", "rows": [{"format": "onnx", "path": "model.onnx", "bytes": 1580123,
     "difference": 1e-06, "sha256": {"model.onnx": "9f86d0..."}}]}

A hash protects from damage and mix-ups, not from malice: who can change a file can change export.json, too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commpress.files import AT_ONCE, DamagedFileError, write_atomically

RECORD = "export.json"
SHOWN = 16
"""Digits of a hash that an error shows."""


@dataclass(frozen=True)
class Exported:
    """A file, or a folder of files, that was written."""

    format: str
    path: Path
    bytes: int
    difference: float
    """The largest difference between the outputs of the model, its quantisers on, and of the file, for the example inputs."""
    sha256: dict[str, str]
    """By file, its path in the folder of the export."""


def sums(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of all files in a folder, by their paths from the folder that `path` is in."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return {each.relative_to(path.parent).as_posix(): _sum(each) for each in files}


def forget(folder: Path, name: str) -> None:
    """Remove a format from a folder's record, before its file is written anew. Raises OSError if that cannot be."""
    found = _read(folder / RECORD)
    rows = [row for row in found["rows"] if row["format"] != name]
    if len(rows) < len(found["rows"]):
        _write(folder, {**found, "rows": rows})


def keep(folder: Path, of: str, files: Sequence[Exported], **more: Any) -> None:
    """Put files into a folder's record, beside other formats that are there. `of` says whose they are. Raises OSError."""
    rows = {row["format"]: row for row in _read(folder / RECORD)["rows"] if (folder / str(row.get("path"))).exists()}
    rows |= {each.format: {**vars(each), "path": each.path.name, "of": of} for each in files}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"what": "export", "of": of, **more, "rows": list(rows.values())})


def check(path: Path) -> None:
    """Compare a file, or a folder of files, with the record beside it; without a record there is nothing to compare.

    Raises DamagedFileError that names the file if it is not the one that was exported, or the record if that is damaged.
    """
    record = path.parent / RECORD
    if not record.exists():
        return
    try:
        rows = json.loads(record.read_text())["rows"]
        expected = next((dict(row.get("sha256", {})) for row in rows if row["path"] == path.name), {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{record}: damaged, expected the record of an export: {error}") from error
    found = sums(path) if expected else {}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            one, other = (f"{its.get(name, 'missing')!s:.{SHOWN}}" for its in (found, expected))
            raise DamagedFileError(
                f"{path.parent / name}: damaged, or not the file that was exported: its SHA-256 is {one}, in {record} {other}"
            )


def _sum(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(AT_ONCE):
            made.update(part)
    return made.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A record; one without rows if there is none, or another file."""
    try:
        found = json.loads(path.read_text())
        known = found["what"] == "export" and all(isinstance(row["format"], str) for row in found["rows"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known = False
    return found if known else {"rows": []}


def _write(folder: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / RECORD, lambda file: file.write(text.encode()))
