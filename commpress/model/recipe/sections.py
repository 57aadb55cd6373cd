"""The sections of a recipe: a class for each table of the file, its keys, and what goes together in it.

A new section is a class here, a line in SECTIONS and a field of `Recipe`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from commpress.model.recipe.words import shown

LAST = sys.maxsize
"""A phase without an end."""

Step = Annotated[int, Field(ge=0, le=10**12)]  # no run has more
Globs = Annotated[tuple[str, ...], Field(min_length=1)]
Format = Literal["safetensors", "onnx", "pt2e", "executorch", "litert", "integer", "torchao"]
Share = Annotated[float, Field(gt=0, le=1)]


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
            raise ValueError(
                f"pattern: expected fewer kept weights than the group has, as in '2:4', got {self.pattern!r}"
            )
        if self.how != "one-shot" and self.amount is None:
            key = "schedule" if self.schedule else "end"
            got = repr(self.how) if self.schedule else self.end
            raise ValueError(f"{key}: expected none, a {given[0]} is applied at once, only an amount grows; got {got}")
        if self.how != "one-shot" and self.last == self.start:
            raise ValueError(f"schedule: expected an end after start, {self.start}, for {self.how!r}, got {self.end}")
        if self.criterion != "magnitude" and self.start == 0:
            raise ValueError(
                f"criterion: {self.criterion!r} has no data before step 1, expected a start above 0, got 0"
            )
        if self.schedule == "one-shot" and self.last > self.start:
            raise ValueError(
                f"end: one-shot changes weights only at start, {self.start}, expected no end, got {self.end}"
            )
        if self.how != "regrow" and self._says("regrow"):
            raise ValueError(
                f"regrow: has an effect only with schedule 'regrow', which this entry does not have, got {self.regrow}"
            )
        if self.amount is None and self._says("scope"):
            raise ValueError(
                f"scope: says what an amount is a share of, expected none with {given[0]}, got {self.scope!r}"
            )
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
                    raise ValueError(f"{key}: expected {kind} with it, which says what to match")
        for key in ("temperature", "soft"):
            if not self.weight and self._says(key):
                raise ValueError(
                    f"{key}: has an effect only on soft labels, expected a weight above 0, got {self.weight}"
                )
        if not (self.weight or (self.hidden and self.hidden_weight) or (self.attention and self.attention_weight)):
            raise ValueError(f"weight: {self.weight}, and nothing else uses the teacher: expected a weight above 0")
        return self

    @property
    def last(self) -> int:
        return LAST if self.end is None else self.end


class Budget(Part):
    """A budget: what the exported file may take, from which the scheduler finds [[prune]] and [[quantize]] entries. Beside
    entries of one's own it is held in the end alone."""

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
    format: Literal["onnx", "pt2e", "executorch", "safetensors"] = "onnx"
    """Which file is held against it. Pruned weights are left out of onnx and safetensors."""
    structure: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The most of each width, as a share, that may be removed before the run where integers and zeros alone miss a limit."""
    removed: float | dict[str, float] | None = None
    """What was removed, a share of each width or shares by width; `narrow` says so in the recipe that it returns."""
    settled: bool = False
    """Whether the entries were chosen; the scheduler says so in what it saves."""

    @field_validator("removed", mode="plain")
    @classmethod
    def _shares(cls, found: object) -> object:
        if found is None:
            return None
        shares: dict[Any, Any] = {**found} if isinstance(found, Mapping) else {"": found}
        fits = all(isinstance(name, str) and type(x) in (int, float) and 0 <= x < 1 for name, x in shares.items())
        if not shares or not fits:
            raise ValueError(
                f"expected a share in [0, 1), or a table of them by layers, whose names are in quotes, got {shown(found)}"
            )
        return {name: float(x) for name, x in shares.items()} if isinstance(found, Mapping) else float(shares[""])

    @model_validator(mode="after")
    def _consistent(self) -> "Budget":
        if self.last < self.start:
            raise ValueError(f"end: expected at least start, {self.start}, got {self.end}")
        if self.max_mb is None and self.max_ms is None and self.max_loss is None:
            raise ValueError("expected some of max_mb, max_ms, max_loss, got none")
        if self.structure and self.max_mb is None and self.max_ms is None:
            raise ValueError("structure: is removed for max_mb or max_ms, expected one of them beside it")
        most = max(self.removed.values()) if isinstance(self.removed, dict) else self.removed or 0.0
        if most > self.structure:
            raise ValueError(f"removed: expected at most structure, {self.structure:g}, got {most:g}")
        return self

    def require_beside(self, first: int) -> None:
        """Raise ValueError for what makes no sense beside entries of one's own, the first of which begins at step `first`."""
        for key in ("end", "every", "structure"):
            if self._says(key):
                raise ValueError(
                    f"budget.{key}: is of what a budget chooses, expected none beside [[prune]] and [[quantize]]"
                )
        if self.start > first:
            raise ValueError(
                f"budget.start: limits are held against the model of that step, expected at most {first}, where it is pruned "
                f"or rounded first, got {self.start}"
            )

    @property
    def last(self) -> int:
        return self.start if self.end is None else self.end


class Search(Part):
    """Search: before the run begins, which of a model's choices it is trained with, or which settings compress it."""

    trials: Annotated[int, Field(ge=1)] = 20
    steps: Step = 500
    """Steps of training on all ranks before the trials, which are judged with its weights: of a supernet along random paths,
    with `layers` of the dense model. 0 for a model that is trained already."""
    strategy: Literal["random", "tpe", "nsga2"] = "tpe"
    together: Annotated[int, Field(ge=1)] = 4
    """Trials that are proposed from the same results, and may run at once."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of size in h = -loss - beta size: millions of parameters, with `layers` megabytes of model.safetensors."""
    layers: dict[str, dict[str, tuple[int | float | None, ...]]] = {}
    """Options by globs of layers, as `commpress.model.search.Compression` takes them. Default: the choices in the model."""
    start: Step = 0
    end: Step | None = None
    """With `layers`: the last change of pruning; from there on forward computes with the integers. Default: `start`."""
    every: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _consistent(self) -> "Search":
        if self.last < self.start:
            raise ValueError(f"end: expected at least start, {self.start}, got {self.end}")
        if self.strategy == "nsga2" and self.together < 2:
            raise ValueError(
                f"together: a generation of nsga2 has two parents, expected 2 at least, got {self.together}"
            )
        for key in ("start", "end", "every"):
            if not self.layers and self._says(key):
                raise ValueError(f"{key}: says when layers are compressed, expected layers with it")
        return self

    @property
    def last(self) -> int:
        return self.start if self.end is None else self.end


class Export(Part):
    """Export: the forms that are written when the run is over, and where."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1)]
    """Those of `commpress.model.export`."""
    folder: Annotated[str, Field(min_length=1)] = "exported"
    """A folder inside of that of the run."""

    @field_validator("folder")
    @classmethod
    def _inside(cls, found: str) -> str:
        if Path(found).is_absolute() or ".." in Path(found).parts or Path(found) == Path():
            raise ValueError(f"expected a folder inside the run's, such as 'exported', got {found!r}")
        return found


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
        raise ValueError(f"expected text in quotes, or a table of texts by patterns of names, got {shown(found)}")


SECTIONS: dict[str, type[Part]] = {
    "search": Search,
    "prune": Prune,
    "quantize": Quantize,
    "distil": Distil,
    "budget": Budget,
    "export": Export,
    "traffic": Traffic,
}
"""By the names of the tables."""
