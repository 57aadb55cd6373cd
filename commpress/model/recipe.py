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

import difflib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from commpress.model import recipe_file

LAST = sys.maxsize
"""A phase without an end."""

Step = Annotated[int, Field(ge=0, le=10**12)]  # no run has more
Globs = Annotated[tuple[str, ...], Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=1)]


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


class Part(BaseModel):
    """A table of a recipe: no unknown keys, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def _says(self, key: str) -> bool:
        """Whether a key was given, and is not what it is without."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)


class Prune(Part):
    """Pruning: which weights go, and when. `amount` (a share), `threshold` (of scores) or `pattern` ("2:4") says how many."""

    start: Step
    end: Step | None = None
    """The last change; `start` for one-shot. Default: `start`."""
    every: Annotated[int, Field(ge=1)] = 100
    """Steps between changes."""
    amount: Share | None = None
    threshold: Annotated[float, Field(ge=0)] | None = None
    pattern: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}:[1-9][0-9]{0,8}$")] | None = None
    schedule: Literal["one-shot", "cubic", "regrow"] | None = None
    """Default: cubic if it ends later than it starts, else one-shot. `regrow` prunes at the start, then exchanges weights."""
    criterion: Literal["magnitude", "taylor", "movement", "wanda"] = "magnitude"
    scope: Literal["global", "local", "row"] = "global"
    """Over what `amount` is counted: all parameters together, each by itself, each of their rows."""
    regrow: Share = 0.3
    """The share of the kept weights that is exchanged at the first change; it falls to 0 along a cosine."""
    parameters: Globs = ()
    """Globs of names, as `blocks.*.weight`. Default: the weights of all Linear layers."""

    @model_validator(mode="after")
    def _consistent(self) -> "Prune":
        given = [name for name in ("amount", "threshold", "pattern") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of amount, threshold, pattern, got {' and '.join(given) or 'none'}")
        if self.last < self.start:
            raise ValueError(f"end: expected at least start, {self.start}, got {self.end}")
        if self.pattern is not None and self.n_of_m[0] >= self.n_of_m[1]:
            raise ValueError(f"pattern: expected fewer kept than there are, as in '2:4', got {self.pattern!r}")
        if self.how != "one-shot" and self.amount is None:
            key = "schedule" if self.schedule else "end"
            got = repr(self.how) if self.schedule else self.end
            raise ValueError(f"{key}: expected none, a {given[0]} is taken at once, only an amount grows; got {got}")
        if self.how != "one-shot" and self.last == self.start:
            raise ValueError(f"schedule: expected an end after start, {self.start}, for {self.how!r}, got {self.end}")
        if self.criterion != "magnitude" and self.start == 0:
            raise ValueError(
                f"criterion: {self.criterion!r} has seen nothing before step 1, expected a start above 0, got 0"
            )
        if self.schedule == "one-shot" and self.last > self.start:
            raise ValueError(f"end: one-shot changes at start, {self.start}, alone, expected no end, got {self.end}")
        if self.how != "regrow" and self._says("regrow"):
            raise ValueError(f"regrow: counts for schedule 'regrow' alone, which this entry has not, got {self.regrow}")
        if self.amount is None and self._says("scope"):
            raise ValueError(f"scope: says what an amount is of, expected none beside {given[0]}, got {self.scope!r}")
        return self

    @property
    def last(self) -> int:
        return self.start if self.end is None else self.end

    @property
    def how(self) -> str:
        return self.schedule or ("cubic" if self.last > self.start else "one-shot")

    @property
    def n_of_m(self) -> tuple[int, int]:
        """How many of how many `pattern` keeps."""
        n, m = (self.pattern or "0:0").split(":")
        return int(n), int(m)

    def due(self, step: int) -> bool:
        """Whether masks change at this step."""
        return step == self.last or (self.start <= step <= self.last and (step - self.start) % self.every == 0)


class Quantize(Part):
    """Quantisation-aware training from a step on: weights as int8 or int4 would have them, gradients straight through."""

    start: Step = 0
    bits: Literal[4, 8] = 8
    group: Annotated[int, Field(ge=2)] | None = None
    """How many weights of a row share a scale. Default: the whole row."""
    activations: Literal["dynamic", "static"] | None = None
    """Whether inputs of Linear layers (static: of convolutions, too) are rounded to int8: with a scale a token, or one for all
    that follows from a learned range."""
    layers: Globs = ("*",)
    """Globs of the names of layers, as `quantization.Quantization` takes them; what an entry before took is left to it."""


class Distil(Part):
    """Distillation: the loss also asks the model to be like a teacher."""

    start: Step = 0
    end: Step | None = None
    teacher: str | None = None
    """Where the training program finds it: the folder of a run. A loop of one's own hands it to the scheduler."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    soft: Literal["kl", "cross_entropy"] = "kl"
    hidden: dict[str, str] = {}
    """Modules whose outputs shall be alike: the student's to the teacher's."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    hidden_weight: Annotated[float, Field(ge=0)] = 1.0
    attention: dict[str, str] = {}
    """Modules that return attention probabilities, likewise."""
    attention_loss: Literal["mse", "kl"] = "mse"
    attention_weight: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> "Distil":
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end: expected more than start, {self.start}, got {self.end}")
        for kind in ("hidden", "attention"):
            for key in (f"{kind}_loss", f"{kind}_weight"):
                if not getattr(self, kind) and self._says(key):
                    raise ValueError(f"{key}: expected {kind} beside it, which says what shall be alike")
        for key in ("temperature", "soft"):
            if not self.weight and self._says(key):
                raise ValueError(f"{key}: counts for soft labels alone, expected a weight above 0, got {self.weight}")
        if not (self.weight or (self.hidden and self.hidden_weight) or (self.attention and self.attention_weight)):
            raise ValueError(
                f"weight: {self.weight}, and nothing else is asked of the teacher: expected a weight above 0"
            )
        return self

    @property
    def last(self) -> int:
        return LAST if self.end is None else self.end


class Budget(Part):
    """A budget: what the exported file may take, from which the scheduler finds [[prune]] and [[quantize]] entries."""

    start: Step = 0
    """When the layers are measured and the settings chosen; pruning begins there."""
    end: Step | None = None
    """The last change of pruning; from there on forward computes with the integers. Default: `start`."""
    every: Annotated[int, Field(ge=1)] = 100
    max_mb: Annotated[float, Field(gt=0)] | None = None
    """The most that the file may have, 10^6 bytes each."""
    max_ms: Annotated[float, Field(gt=0)] | None = None
    """The most that a call may take in the file's runtime on one thread, the median."""
    max_loss: Annotated[float, Field(ge=0)] | None = None
    """What the held-out loss may rise by against the dense model's, as a share of that: 0.01 for 1 %."""
    format: Literal["onnx", "pt2e", "safetensors"] = "onnx"
    """Which file is held against it. Pruned weights are left out of safetensors alone."""
    settled: bool = False
    """Whether the entries were chosen; the scheduler says so in what it saves."""

    @model_validator(mode="after")
    def _consistent(self) -> "Budget":
        if self.last < self.start:
            raise ValueError(f"end: expected at least start, {self.start}, got {self.end}")
        if self.max_mb is None and self.max_ms is None and self.max_loss is None:
            raise ValueError("expected some of max_mb, max_ms, max_loss, got none")
        return self

    @property
    def last(self) -> int:
        return self.start if self.end is None else self.end


class Traffic(Part):
    """Traffic, for the training program: specs of gradients, and of parameters that FSDP2 gathers."""

    spec: str | dict[str, str] | None = None
    """One spec, or specs by patterns of parameters' names."""
    parameters: str | None = None

    @field_validator("spec", mode="plain")
    @classmethod
    def _spec(cls, found: object) -> object:
        if found is None or isinstance(found, str):
            return found
        if isinstance(found, Mapping) and found and all(isinstance(part, str) for part in (*found, *found.values())):
            return dict(found)
        raise ValueError(f"expected text in quotes, or a table of such by patterns of names, got {_shown(found)}")


class Recipe(Part):
    """All of it. `Recipe.load("recipe.toml")`, or `Recipe.of({"prune": [...]})`."""

    prune: tuple[Prune, ...] = ()
    quantize: tuple[Quantize, ...] = ()
    distil: Distil | None = None
    budget: Budget | None = None
    traffic: Traffic = Traffic()
    _source: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _one_of_both(self) -> "Recipe":
        if self.budget is not None and not self.budget.settled and (self.prune or self.quantize):
            raise ValueError("budget: chooses what [[prune]] and [[quantize]] say, expected neither beside it")
        return self

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
            found = recipe_file.read(path)
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
            raise RecipeError("\n".join(f"{source}: {_sentence(each)}" for each in wrong)) from None

    @naming_the_file
    def require_within(self, steps: int) -> None:
        """Raises RecipeError for a phase that would not be over in a run of `steps`: nothing is left out in silence."""
        for i, prune in enumerate(self.prune):
            if prune.last > steps:
                raise RecipeError(f"prune[{i}].end: {prune.last}, but the run has {steps} steps")
        if self.budget is not None and self.budget.last >= steps:
            raise RecipeError(f"budget.end: {self.budget.last}, but the run has {steps} steps")
        starts = [(f"quantize[{i}]", part.start) for i, part in enumerate(self.quantize)]
        for key, start in [*starts, *([("distil", self.distil.start)] if self.distil else [])]:
            if start >= steps:
                raise RecipeError(f"{key}.start: {start}, but the run has {steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """Return what a file of it would say, without what was left to its default."""
        return self.model_dump(mode="json", exclude_defaults=True)


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


EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "string_pattern_mismatch": "text such as '2:4'",
    "too_short": "at least one, or without this key",
    "invalid_key": "a word as key",
}
"""In the place of what pydantic says, which speaks of Python's types."""


def _sentence(error: Any) -> str:
    """One of pydantic's findings, the key in front."""
    key = ""
    for place in error["loc"]:
        key += f"[{place}]" if isinstance(place, int) else f".{place}"
    key, kind, got = key.lstrip("."), error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key, {_known(error['loc'])}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":  # of a table's own check, which may say the key within
        told = str(error["ctx"]["error"])
        within = told.partition(":")[0] in Prune.model_fields | Distil.model_fields
        return f"{key}.{told}" if within else f"{key}: {told}" if key else told
    expected = EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"{key}: expected {expected}, got {_shown(got)}{_advice(key, kind, got)}"


def _known(place: tuple[int | str, ...]) -> str:
    """Return which key may be meant, or which there are."""
    tables: dict[Any, type[Part]] = {"prune": Prune, "quantize": Quantize, "distil": Distil, "traffic": Traffic}
    tables |= {"budget": Budget}
    known = list((tables[place[0]] if len(place) > 1 else Recipe).model_fields)
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"


def _shown(got: Any) -> str:
    text = "nothing" if got is None else repr(list(got) if isinstance(got, tuple) else got)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _advice(key: str, kind: str, got: Any) -> str:
    if kind == "tuple_type" and isinstance(got, str) and key.endswith(("parameters", "layers")):
        return f": write [{got!r}]"
    if kind == "float_type" and isinstance(got, str) and got.endswith("%"):
        return ": write a share, 0.8 for 80%"
    if kind in ("int_type", "float_type") and isinstance(got, str):
        return ": write it as a number, without quotes"
    return ""
