"""Specs by parameter in the training program: `--compress FILE.toml`, a .json file, or a recipe's `[traffic.spec]`.

    "blocks.0.*" = "int8"
    "*.bias" = "none"
    "*" = "auto"

The settings hold them as the JSON of that table, so ranks, records and resumed runs compare the content of the file.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from commpress.comm.rules import rules_for
from commpress.launch.model import GPT, Shape

ENDINGS = (".toml", ".json")


def text_of(spec: str | Mapping[str, str]) -> str:
    """Return the text of a spec in the settings: JSON for a table of patterns, or for a file with one; else the spec itself.

    Raises ValueError for a file that has no such table, OSError if it cannot be read.
    """
    if isinstance(spec, Mapping):
        return json.dumps(dict(spec))
    if not spec.lower().endswith(ENDINGS):
        return spec
    try:
        found = _read(Path(spec))
    except RecursionError:
        raise ValueError("its tables are nested too deep") from None
    if not isinstance(found, dict) or not found:
        raise ValueError('expected patterns and their specs, such as "*" = "auto", found none')
    for pattern, of in found.items():
        if not isinstance(of, str):
            kind = "a table: write the pattern in quotes" if isinstance(of, dict) else repr(of)
            raise ValueError(f'{pattern!r}: expected a spec in quotes, as in "*.bias" = "none", got {kind}')
    return json.dumps(found)


def table_of(text: str | None) -> dict[str, str] | None:
    """Return the table of patterns from `text_of`'s JSON; None for a spec. Raises ValueError for other JSON."""
    if text is None or not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a spec, or JSON with patterns, got {text!r}: {error}") from None
    if not found or not all(isinstance(of, str) for of in found.values()):
        raise ValueError(f'expected patterns and their specs, such as {{"*": "auto"}}, got {text!r}')
    return dict(found)


def require_fit(table: Mapping[str, str], shape: Shape) -> None:
    """Raise ValueError, with the pattern, if specs by pattern do not fit the parameters of a model of this shape."""
    with torch.device("meta"):
        names = [name for name, _ in GPT(shape).named_parameters()]
    try:
        rules_for(table, names)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("gradients").lstrip(":, ")) from None


def _read(path: Path) -> Any:
    if path.exists() and not path.is_file():  # a device or pipe may have no end
        raise ValueError("expected a file")
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() == ".json":
        return json.loads(text, object_pairs_hook=_once)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise ValueError("found no tomli, expected it for TOML; pip install tomli, or write it in JSON") from None
    return tomllib.loads(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(other == key for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r}: the pattern appears twice")
    return found
