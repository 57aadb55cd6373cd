"""The texts of errors and warnings in the sources, for docs/errors.py: what the calls that tell them are given.

A name or a call in such a text is followed to the texts that it may stand for, through assignments, loops and the values that
functions return, also those of other files of ours:

    found = {"ZenFlow": ..., "pipeline parallelism": ...}
    for what in found:                             raise ValueError(f"{what} is not supported")
                                        gives      ZenFlow is not supported, pipeline parallelism is not supported

`…` stands for what is filled in: values, and single words.
"""

import ast
import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"commpress.hooks": "hooks", "commpress.launch": "launch"}
"""Packages whose folder is not named after them."""
ERRORS = re.compile(r"\w*Error|kind|require|type|exit")
"""Names of what is called with an error's text; `type` is of `type(error)(...)`."""
WARNINGS = re.compile("_?warn")
FILLED = "…"
MANY = 24
"""The most texts of one call; the parts of more are `FILLED`."""
SCOPES = ast.FunctionDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class Source:
    """A file, and what its names may stand for."""

    def __init__(self, file: Path) -> None:
        self.tree = ast.parse(file.read_text())
        self.scopes: dict[ast.AST, ast.AST] = {}
        """The function, or the whole file, in which a node stands."""
        self.values: dict[tuple[ast.AST, str], list[ast.AST]] = defaultdict(list)
        """Expressions, or a function, by scope and name. A function's parameter has none."""
        self.imported: dict[str, tuple[str, str]] = {}
        """Module and name there, by the name here."""
        self._read(self.tree, self.tree)

    def _read(self, node: ast.AST, scope: ast.AST) -> None:
        self.scopes[node] = scope
        match node:
            case ast.FunctionDef():
                self.values[scope, node.name].append(node)
            case ast.arg():
                self.values[scope, node.arg]
            case ast.Assign():
                for target in node.targets:
                    self._bind(target, node.value, scope)
            case ast.AnnAssign(value=ast.expr()) | ast.AugAssign() | ast.NamedExpr():
                self._bind(node.target, node.value, scope)
            case ast.For() | ast.comprehension():
                self._bind(node.target, node.iter, scope, each=True)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append" | "extend"), args=[value]):
                self.values[scope, name].append(value)
            case ast.ImportFrom(module=str(module)):
                self.imported.update({name.asname or name.name: (module, name.name) for name in node.names})
        for child in ast.iter_child_nodes(node):
            self._read(child, node if isinstance(node, SCOPES) else scope)

    def _bind(self, target: ast.AST, value: ast.AST, scope: ast.AST, each: bool = False) -> None:
        """Note that `target` is `value`, or each of its elements."""
        match target, value:
            case ast.Name(), _:
                self.values[scope, target.id].append(value)
            case ast.Tuple(elts=[key, _]), ast.Call(func=ast.Attribute(value=table, attr="items")) if each:
                self._bind(key, table, scope)
            case ast.Tuple(), ast.Tuple() | ast.List() if each:
                for element in value.elts:
                    self._bind(target, element, scope)
            case ast.Tuple(), ast.Tuple():
                for each_target, each_value in zip(target.elts, value.elts, strict=False):
                    self._bind(each_target, each_value, scope)
            case ast.Tuple(), _:
                for each_target in target.elts:
                    self._bind(each_target, value, scope)

    def lookup(self, name: str, node: ast.AST | None = None) -> list[tuple["Source", ast.AST]]:
        """Return what a name stands for at a node, or at the end of the file; empty if that is unknown."""
        scope = self.tree if node is None else self.scopes[node]
        while scope is not self.tree and (scope, name) not in self.values:
            scope = self.scopes[scope]
        if (scope, name) in self.values:
            return [(self, value) for value in self.values[scope, name]]
        module, there = self.imported.get(name, ("", ""))
        other = source_of(module)
        return [] if other is None else other.lookup(there)

    def lookup_attribute(self, node: ast.Attribute) -> list[tuple["Source", ast.AST]]:
        """Return the method of `self.name`, or what `module.name` stands for; empty if that is unknown."""
        if not isinstance(node.value, ast.Name):
            return []
        if node.value.id == "self":
            return [place for place in self.lookup(node.attr) if isinstance(place[1], ast.FunctionDef)]
        other = source_of(".".join(self.imported.get(node.value.id, ())))
        return [] if other is None else other.lookup(node.attr)

    def passes_on(self, function: ast.expr) -> bool:
        """Whether what is called may return its argument, or what that returns: `", ".join`, `sorted`, `by_first_rank`."""
        match function:
            case ast.Name() | ast.Attribute(attr="join"):
                return True
            case ast.Attribute(value=ast.Name(id=name)):
                return name in self.imported
        return False


@functools.cache
def read(file: Path) -> Source:
    return Source(file)


def source_of(module: str) -> Source | None:
    """Return the file of a module of ours."""
    for package, folder in FOLDERS.items():
        module = re.sub(rf"^{re.escape(package)}(?=\.|$)", folder, module)
    place = ROOT / module.replace(".", "/")
    if place == ROOT or module.split(".")[0] not in ("commpress", *FOLDERS.values()):
        return None
    return next((read(file) for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)


def texts_of(source: Source, node: ast.AST, seen: frozenset[ast.AST] = frozenset()) -> list[str]:
    """Return the texts that an expression may have, or what a function may return; only `FILLED` if there are none."""
    if node in seen:
        return [FILLED]
    seen |= {node}

    def one_of(nodes: Iterable[ast.AST | None]) -> list[str]:
        return any_of([(source, each) for each in nodes if each is not None])

    def any_of(places: list[tuple[Source, ast.AST]]) -> list[str]:
        return list(dict.fromkeys(text for place in places for text in texts_of(*place, seen))) or [FILLED]

    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            return in_a_row([one_of([part]) for part in node.values])
        case ast.FormattedValue():
            return filling(one_of([node.value]))
        case ast.BinOp(op=ast.Add()):
            return in_a_row([one_of([node.left]), one_of([node.right])])
        case ast.IfExp():
            return one_of([node.body, node.orelse])
        case ast.BoolOp(values=nodes) | ast.Tuple(elts=nodes) | ast.List(elts=nodes) | ast.Set(elts=nodes):
            return one_of(nodes)
        case ast.Dict():
            return one_of(key or table for key, table in zip(node.keys, node.values, strict=True))
        case ast.DictComp():
            return one_of([node.key])
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            return one_of([node.elt])
        case ast.NamedExpr() | ast.Starred():
            return one_of([node.value])
        case ast.FunctionDef():
            inside = (each for each in ast.walk(node) if source.scopes[each] is node)
            return said(one_of(each.value for each in inside if isinstance(each, ast.Return)))
        case ast.Name():
            return said(any_of(source.lookup(node.id, node)))
        case ast.Attribute():
            return any_of(source.lookup_attribute(node))
        case ast.Call():
            called = one_of([node.func])
            return one_of(node.args[:1]) if called == [FILLED] and source.passes_on(node.func) else called
    return [FILLED]


def in_a_row(parts: list[list[str]]) -> list[str]:
    """Return the texts of parts one after another, each part one of several."""
    if math.prod(map(len, parts)) > MANY:
        parts = [part if len(part) == 1 else [FILLED] for part in parts]
    return ["".join(row) for row in itertools.product(*parts)]


def said(texts: list[str]) -> list[str]:
    """Return texts without the empty one, which stands for no error, if there are others."""
    return [text for text in texts if text] or texts


def filling(texts: list[str]) -> list[str]:
    """Return what is filled in, if half of it or more are phrases (two words of four letters); else `FILLED`."""

    def is_phrase(text: str) -> bool:
        return sum(bool(re.fullmatch("[a-z']{4,}[,:;]?", word)) for word in fixed(text).split()) >= 2

    if 2 * sum(map(is_phrase, texts)) < len(texts):
        return [FILLED]
    return [text if fixed(text) or not text else FILLED for text in texts]


def fixed(text: str) -> str:
    """Return the longest fixed part of a text."""
    return max((part.strip() for part in text.split(FILLED)), key=len)


def tells(text: str) -> bool:
    """Whether a text says something by itself: two words, one of them or more with six letters without a gap."""
    words = [word for word in text.split() if re.search("[a-z]{2}", word)]
    return len(words) >= 2 and len(re.findall("[a-z]", fixed(text))) >= 6


def name_of(function: ast.expr) -> str:
    """Return the last name of what is called; `type` for `type(error)(...)`."""
    if isinstance(function, ast.Call):
        return name_of(function.func)
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def texts_in(file: Path, called: re.Pattern[str]) -> Iterator[str]:
    """Return the texts in a file's calls of what has such a name, if they say something by themselves."""
    source = read(file)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and called.fullmatch(name_of(node.func)):
            for argument in node.args:
                for text in texts_of(source, argument):
                    told = re.sub(f"{FILLED}+", FILLED, " ".join(text.split()))
                    if tells(told):
                        yield told
