"""Reading a TOML or YAML file into plain dicts, lists and values, so that nothing in it is dropped or guessed.

YAML is read as YAML 1.2 has it, in which `2:4` is text and not 124, and `0500` no octal number. A key that stands twice in a
table, a second document and a tag are errors. All errors are ValueErrors of one line with the line in the file, and the key
where there is one.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".toml", ".yaml", ".yml")
NUMBERS = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9_]{0,99})$"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
MOST_VALUES = 100_000
"""More than any recipe has; a few YAML aliases of aliases would fill the memory."""


def read(path: Path) -> Any:
    """Return what a file says; an empty YAML file says None.

    Raises ValueError for what it cannot mean, OSError if it cannot be read, ImportError for a YAML file without PyYAML.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError("expected a name that ends in .toml, .yaml or .yml")
    text = _decoded(path.read_bytes())
    try:
        return _toml(text) if ending == ".toml" else _yaml(text)
    except RecursionError:
        raise ValueError("tables and lists are nested too deep") from None


def _decoded(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("expected a file in UTF-8, got UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        line = raw.split(b"\n")[number - 1].decode("latin-1").strip()
        raise ValueError(
            f"line {number}, {line!r}: expected a file in UTF-8, got the byte 0x{raw[error.start]:02x}: save it as UTF-8"
        ) from None


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except ValueError as error:
        if long := re.search(r"\d{4301}", text):  # more than Python reads
            *before, line = text[: long.start()].split("\n")
            raise ValueError(f"line {len(before) + 1}, {line.strip()!r}: expected a smaller number") from None
        told = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(error), re.DOTALL)
        if told is None:
            raise ValueError(f"{str(error)[:1].lower()}{str(error)[1:]}") from None
        number = int(told[2])
        lines = text.split("\n")
        before = [line.strip() for line in lines[: number - 1] if line.lstrip().startswith("[")]
        inside = f" of {before[-1]}" if before and not lines[number - 1].lstrip().startswith("[") else ""
        what = "this key or table appears twice" if re.search("overwrite|twice", told[1]) else _lowered(told[1])
        raise ValueError(f"line {number}{inside}, {lines[number - 1].strip()!r}: {what}") from None


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("a YAML recipe needs PyYAML: pip install 'commpress[model]', or write it in TOML") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined, unused-ignore]
        """Plain scalars as YAML 1.2 has them, and dates as text; `yes` and `no` stay booleans."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern in NUMBERS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, list("-+0123456789."))
    try:
        documents = list(yaml.compose_all(text, Loader=Loader))
        if len(documents) > 1:
            line = documents[1].start_mark.line + 1
            raise ValueError(f"line {line}: expected one document, got {len(documents)}: join them, without '---'")
        if not documents or documents[0] is None:
            return None
        for count, _ in enumerate(_checked(documents[0], "")):
            if count == MOST_VALUES:
                raise ValueError(f"expected at most {MOST_VALUES:,} keys and values, its aliases multiply")
        return Loader("").construct_document(documents[0])
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f"line {at.line + 1}, column {at.column + 1}: " if at else ""
        raise ValueError(f"{place}{_lowered(', '.join(filter(None, (error.context, error.problem))))}") from None
    except yaml.YAMLError as error:
        raise ValueError(_lowered(" ".join(str(error).split()))) from None


def _checked(node: Any, key: str) -> Iterator[None]:
    """Walk over a YAML node, once a value; `key` is where it is. Raises ValueError for what must not be there."""
    yield
    line, kind = node.start_mark.line + 1, node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("map", "seq", "str", "int", "float", "bool", "null", "merge"):
        raise ValueError(f"line {line}, {key or 'the file'}: expected a plain value, got one with the tag {node.tag!r}")
    if kind in NUMBERS and not NUMBERS[kind].match(str(node.value)):
        raise ValueError(f"line {line}, {key or 'the file'}: expected a number, got {node.value!r}")
    if node.id == "sequence":
        for index, each in enumerate(node.value):
            yield from _checked(each, f"{key}[{index}]")
    if node.id != "mapping":
        return
    seen: dict[str, int] = {}
    for name, value in node.value:
        at = name.start_mark.line + 1
        if name.id != "scalar" or name.tag.rpartition(":")[2] not in ("str", "merge"):
            raise ValueError(f"line {at}, {key or 'the file'}: expected a word as key, got {name.value!r}")
        path = f"{key}.{name.value}".lstrip(".")
        if name.value in seen:
            raise ValueError(f"{path}: the key appears twice, in line {seen[name.value]} and in line {at}")
        seen[name.value] = at
        yield from _checked(value, path)


def _lowered(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"
