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

import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

LAST = sys.maxsize
"""A phase without an end."""

Step = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class RecipeError(ValueError):
    """A recipe that no run can follow; the text names the file and the key."""


class Part(BaseModel):
    """A table of a recipe: no unknown keys, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Prune(Part):
    """Which weights go, and when. `amount` (their share), `threshold` (of the score) or `pattern` ("2:4") says how many."""

    start: Step
    end: Step | None = None
    """The last change; `start` for one-shot. Default: `start`."""
    every: Annotated[int, Field(ge=1)] = 100
    """Steps between changes."""
    amount: Share | None = None
    threshold: Annotated[float, Field(ge=0)] | None = None
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = None
    schedule: Literal["one-shot", "cubic", "regrow"] | None = None
    """Default: cubic if it ends later than it starts, else one-shot. `regrow` prunes at the start, then exchanges weights."""
    criterion: Literal["magnitude", "taylor", "movement", "wanda"] = "magnitude"
    scope: Literal["global", "local", "row"] = "global"
    """Over what `amount` is counted: all parameters together, each by itself, each of their rows."""
    regrow: Share = 0.3
    """The share of the kept weights that is exchanged at the first change; it falls to 0 along a cosine."""
    parameters: tuple[str, ...] = ()
    """Globs of names, as `blocks.*.weight`. Default: the weights of all Linear layers."""

    @model_validator(mode="after")
    def _consistent(self) -> "Prune":
        given = [name for name in ("amount", "threshold", "pattern") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of amount, threshold, pattern, got {' and '.join(given) or 'none'}")
        if self.last < self.start:
            raise ValueError(f"end {self.end}: expected at least start, {self.start}")
        if self.pattern is not None and self.n_of_m[0] >= self.n_of_m[1]:
            raise ValueError(f"pattern {self.pattern!r}: expected fewer kept than there are, as in '2:4'")
        if self.how != "one-shot" and self.amount is None:
            raise ValueError(f"schedule {self.how!r}: expected an amount; {given[0]} is taken at once, without an end")
        if self.how != "one-shot" and self.last == self.start:
            raise ValueError(f"schedule {self.how!r}: expected an end after start, {self.start}")
        if self.criterion != "magnitude" and self.start == 0:
            raise ValueError(
                f"criterion {self.criterion!r}: expected a start above 0, there is nothing to see before step 1"
            )
        if self.schedule == "one-shot" and self.last > self.start:
            raise ValueError(f"end {self.end}: one-shot changes at start, {self.start}, alone")
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
    activations: bool = False
    """Whether inputs are rounded to int8, too, with a scale a token."""
    layers: tuple[str, ...] = ("*",)
    """Globs of the names of Linear and Embedding layers; what an entry before took is left to it."""


class Distil(Part):
    """What else the loss asks for: to be like a teacher."""

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
            raise ValueError(f"end {self.end}: expected more than start, {self.start}")
        return self

    @property
    def last(self) -> int:
        return LAST if self.end is None else self.end


class Traffic(Part):
    """What travels, for the training program: specs of gradients, and of parameters that FSDP2 gathers."""

    spec: str | None = None
    parameters: str | None = None


class Recipe(Part):
    """All of it. `Recipe.load("recipe.toml")`, or `Recipe.of({"prune": [...]})`."""

    prune: tuple[Prune, ...] = ()
    quantize: tuple[Quantize, ...] = ()
    distil: Distil | None = None
    traffic: Traffic = Traffic()

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a .toml, .yaml or .yml file. Raises RecipeError that names file and key, OSError if it cannot be read."""
        path = Path(path)
        text = path.read_text()
        try:
            if path.suffix == ".toml":
                if sys.version_info >= (3, 11):
                    import tomllib
                else:
                    import tomli as tomllib
                found = tomllib.loads(text)
            elif path.suffix in (".yaml", ".yml"):
                import yaml

                found = yaml.safe_load(text)
            else:
                raise RecipeError(f"{path}: expected a name that ends in .toml, .yaml or .yml")
        except RecipeError:
            raise
        except Exception as error:  # of two libraries, each with its own
            raise RecipeError(f"{path}: {error}") from None
        return cls.of(found, str(path))

    @classmethod
    def of(cls, found: object, source: str = "recipe") -> "Recipe":
        """Check what a file said: a dict of tables. Raises RecipeError."""
        if not isinstance(found, Mapping):
            raise RecipeError(f"{source}: expected tables such as [[prune]], got {found!r}")
        try:
            return cls.model_validate(_as_tuples(found))
        except ValidationError as error:
            raise RecipeError("\n".join(f"{source}: {_sentence(each)}" for each in error.errors())) from None

    def require_within(self, steps: int) -> None:
        """Raises RecipeError for a phase that would not be over in a run of `steps`: nothing is left out in silence."""
        for i, prune in enumerate(self.prune):
            if prune.last > steps:
                raise RecipeError(f"prune[{i}].end: {prune.last}, but the run has {steps} steps")
        starts = [(f"quantize[{i}]", part.start) for i, part in enumerate(self.quantize)]
        for key, start in [*starts, *([("distil", self.distil.start)] if self.distil else [])]:
            if start >= steps:
                raise RecipeError(f"{key}.start: {start}, but the run has {steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """What a file of it would say, without what was left to its default."""
        return self.model_dump(mode="json", exclude_defaults=True)


def matching(key: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that a glob matches, in their order. Raises RecipeError, naming the key, for a glob that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise RecipeError(f"{key}: {pattern!r} matches nothing, known: {some}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _as_tuples(found: Any) -> Any:
    """Lists as tuples, as strict checking wants them; a single [prune] or [quantize] as a list of one."""
    if isinstance(found, list):
        return tuple(_as_tuples(each) for each in found)
    if isinstance(found, Mapping):
        made = {key: _as_tuples(value) for key, value in found.items()}
        for key in ("prune", "quantize"):
            if isinstance(made.get(key), Mapping):
                made[key] = (made[key],)
        return made
    return found


def _sentence(error: Any) -> str:
    """One of pydantic's findings, the key in front."""
    key = ""
    for place in error["loc"]:
        key += f"[{place}]" if isinstance(place, int) else f".{place}"
    key = key.lstrip(".")
    told = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if error["type"] == "value_error":
        return f"{key}: {told}"
    if error["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {told[0].lower()}{told[1:]}, got {error['input']!r}"
