"""A recipe: what happens to a model at which step of its training. One TOML or YAML file, every key checked.

    [[prune]]                       # 80 % of all Linear weights by step 3000, along a cubic curve
    start = 500
    end = 3000
    amount = 0.8

    [[quantize]]                    # from step 3500 on with the errors of int8
    start = 3500
    bits = 8

    [distil]                        # all along
    teacher = "runs/teacher"
    weight = 0.5

    [traffic]
    spec = "topk(0.01)|int4"

Steps are those of the optimizer; what starts at step n is in force from the n-th update on.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import PrivateAttr, ValidationError, model_validator

from commpress.model.recipe import file
from commpress.model.recipe.sections import SECTIONS, Budget, Distil, Export, Part, Prune, Quantize, Search, Traffic
from commpress.model.recipe.words import sentence

__all__ = [
    "Budget",
    "Distil",
    "Export",
    "Prune",
    "Quantize",
    "Recipe",
    "RecipeError",
    "Search",
    "Traffic",
    "matching",
    "naming_the_file",
]


class RecipeError(ValueError):
    """A recipe that no run can follow; the text names the file and the key."""


P = ParamSpec("P")
R = TypeVar("R")


def naming_the_file(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what takes a recipe, or is a method of what has one: its RecipeErrors name the file that was read."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **named: P.kwargs) -> R:
        try:
            return function(*args, **named)
        except RecipeError as error:
            given = (*args, *named.values())
            recipes = [x for each in given for x in (each, getattr(each, "recipe", None)) if isinstance(x, Recipe)]
            source = recipes[0]._source if recipes else None
            if source is None or str(error).startswith(source):
                raise
            raise RecipeError(f"{source}: {error}") from None

    return wrapped


class Recipe(Part):
    """All of it. `Recipe.load("recipe.toml")`, or `Recipe.of({"prune": [...]})`."""

    search: Search | None = None
    prune: tuple[Prune, ...] = ()
    quantize: tuple[Quantize, ...] = ()
    distil: Distil | None = None
    budget: Budget | None = None
    export: Export | None = None
    traffic: Traffic = Traffic()
    _source: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _one_of_both(self) -> "Recipe":
        if self.search is not None and self.search.layers and (self.prune or self.quantize):
            raise ValueError(
                "search.layers: chooses the pruning and rounding, expected no [[prune]] or [[quantize]] with it"
            )
        if self.budget is not None and not self.budget.settled and (self.prune or self.quantize):
            starts = [entry.start for entry in self.prune] + [entry.start for entry in self.quantize]
            self.budget.require_beside(min(starts))
        elif self.budget is not None and not self.budget.settled and self.search is not None and self.search.layers:
            self.budget.require_beside(self.search.start)  # the entries that it finds begin there
        return self

    @property
    def chooses(self) -> bool:
        """Whether its budget is to choose entries. One beside entries of one's own is held against the file in the end."""
        return self.budget is not None and not self.budget.settled and not (self.prune or self.quantize)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()  # wherever they were read

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a .toml, .yaml or .yml file in UTF-8.

        Raises RecipeError that names file and key, also for an empty file and a key that is there twice; OSError if the file
        cannot be read, ImportError for YAML without PyYAML.
        """
        path = Path(path)
        try:
            found = file.read(path)
        except ValueError as error:
            raise RecipeError(f"{path}: {error}") from None
        if found is None or found == {}:
            raise RecipeError(
                f"{path}: is empty, expected tables such as [[prune]]; a run without a recipe needs no file"
            )
        recipe = cls.of(found, str(path))
        recipe._source = str(path)
        return recipe

    @classmethod
    def of(cls, found: object, source: str = "recipe") -> "Recipe":
        """Check what a file said: a dict of tables. Raises RecipeError."""
        if not isinstance(found, Mapping):
            raise RecipeError(f"{source}: expected tables such as [[prune]], got {found!r}")
        try:
            return cls.model_validate(_tables(found))
        except ValidationError as error:
            # a list with something wrong in it counts as too short, too
            wrong = [each for each in error.errors() if each["type"] != "too_short" or not each["input"]]
            raise RecipeError("\n".join(f"{source}: {sentence(each, KEYS)}" for each in wrong)) from None

    @naming_the_file
    def require_within(self, steps: int) -> None:
        """Raises RecipeError for a phase that would not be over in a run of `steps`: nothing is left out in silence."""
        for i, prune in enumerate(self.prune):
            if prune.last > steps:
                raise RecipeError(f"prune[{i}].end: {prune.last}, but the run has {steps} steps")
        if self.budget is not None and self.budget.last >= steps:
            raise RecipeError(f"budget.end: {self.budget.last}, but the run has {steps} steps")
        if self.search is not None and self.search.last >= steps:
            raise RecipeError(f"search.end: {self.search.last}, but the run has {steps} steps")
        starts = [(f"quantize[{i}]", part.start) for i, part in enumerate(self.quantize)]
        for key, start in [*starts, *([("distil", self.distil.start)] if self.distil else [])]:
            if start >= steps:
                raise RecipeError(f"{key}.start: {start}, but the run has {steps} steps")

    def after_search(self, entries: "Recipe | None" = None) -> "Recipe":
        """The recipe that the run follows behind its search; `entries` are the [[prune]] and [[quantize]] that it found.

        If it found none, a [budget] chooses as it does without a search.
        """
        found = self.to_dict()
        found.pop("search", None)
        if entries is not None:
            found |= {key: value for key, value in entries.to_dict().items() if key in ("prune", "quantize")}
        made = Recipe.of(found, self._source or "recipe")
        made._source = self._source
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return what a file of it would say, without what was left to its default."""
        return self.model_dump(mode="json", exclude_defaults=True)


KEYS = {"": list(Recipe.model_fields), **{name: list(section.model_fields) for name, section in SECTIONS.items()}}


def matching(key: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that a glob matches, in their order. Raises RecipeError, naming the key, for a glob that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise RecipeError(f"{key}: {pattern!r} matches nothing, known: {some}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _tables(found: Mapping[Any, Any]) -> dict[Any, Any]:
    """A file's tables as strict checking wants them: lists as tuples, a single [prune] or [quantize] as a list of one."""
    tables = {key: _as_tuples(value) for key, value in found.items()}
    return {
        key: (value,) if key in ("prune", "quantize") and isinstance(value, Mapping) else value
        for key, value in tables.items()
    }


def _as_tuples(found: Any) -> Any:
    if isinstance(found, list):
        return tuple(_as_tuples(each) for each in found)
    if isinstance(found, Mapping):
        return {key: _as_tuples(value) for key, value in found.items()}
    return found
