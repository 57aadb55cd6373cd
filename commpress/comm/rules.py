"""Specs by parameter: `{"*embed*": "int8", "*.bias": "none", "*": "auto"}`. The first pattern that fits a name decides.

    bucket [a.weight a.bias b.weight b.bias]  -->  int4 [a.weight b.weight], none [a.bias b.bias]

Patterns are shell globs (`fnmatch`) on the names of `model.named_parameters()`. Norms, biases and small tensors are sent
exactly where `*` would give them a spec of fewer than four bits a value.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from commpress.comm.auto import budget
from commpress.comm.codecs import AUTO, Codec, parse
from commpress.comm.plan import DENSE, FEWEST_VALUES
from commpress.comm.ratio_warmup import RatioWarmup, ratio_warmup
from commpress.comm.segments import Segment, Segments

ALL = "*"
SMALL = "norms, biases and small tensors"
"""The rule of those that `*` would code coarsely, in the place of a pattern."""
MANY = 1 << 20
Spec = str | Codec | Mapping[str, str | Codec]
"""A spec or a codec, `auto`, a spec whose ratio warms up, or a dict of specs by patterns of parameters' names."""


@dataclass(frozen=True)
class Rules:
    """The specs of all parameters of a model. `codecs` has the codec of each by name; None where `auto` decides."""

    specs: tuple[tuple[str, str], ...]
    """Patterns and specs, in the order in which they were given."""
    codecs: Mapping[str, Codec | RatioWarmup | None]
    patterns: Mapping[str, str]
    """The pattern that decides for each parameter, by name."""
    budget: float | None = None
    """The error that `auto` allows; None if no pattern names it."""

    def __str__(self) -> str:
        return ", ".join(f"{pattern}: {spec}" for pattern, spec in self.specs)

    @property
    def lossy(self) -> set[Codec]:
        """Return the named lossy codecs; of those that warm up, the last ones."""
        return {codec for name in self.codecs if (codec := self.last(name)) is not None and codec.lossy}

    def last(self, name: str) -> Codec | None:
        """Return the codec of a parameter once all warm-ups are over; None where `auto` decides."""
        codec = self.codecs[name]
        return codec.codec if isinstance(codec, RatioWarmup) else codec

    def parts(self, segments: Segments, step: int) -> list[tuple[Segments, Codec | None]]:
        """Return the parts of a bucket that have one spec each, in the order of their first parameters, with the codecs of a
        step of the run."""
        found: dict[str, tuple[list[Segment], Codec | RatioWarmup | None]] = {}
        for segment in segments:
            codec = self.codecs[segment.name]
            found.setdefault(str(codec), ([], codec))[0].append(segment)
        return [
            (tuple(part), codec.at(step) if isinstance(codec, RatioWarmup) else codec) for part, codec in found.values()
        ]

    def shares(self, segments: Segments) -> dict[str, int]:
        """Return how many values of these parameters each rule decides for, by its text; all rules in their order."""
        texts = {pattern: f"{pattern}: {spec}" for pattern, spec in self.specs}
        values = dict.fromkeys(texts.values(), 0)
        for segment in segments:
            values[texts[self.patterns[segment.name]]] += segment.n
        return values


def small_tensors(parameters: Segments) -> set[str]:
    """Return the names of norms, biases and other tensors with one dimension, and of those with few values."""
    return {part.name for part in parameters if len(part.shape) == 1 or part.n < FEWEST_VALUES}


def is_coarse(codec: Codec | RatioWarmup | None) -> bool:
    """Return whether a codec has fewer than four bits a value; `auto`, None, has not."""
    last = codec.codec if isinstance(codec, RatioWarmup) else codec
    return last is not None and last.lossy and last.flat and last.nbytes(MANY) < MANY / 2


def rules_for(given: Mapping[str, str | Codec], names: Iterable[str], small: Collection[str] = ()) -> Rules:
    """Make the rules for parameters of these names, of which the `small` ones have their own rule beside a coarse `*`.

    Raises ValueError for a pattern that decides for no parameter, a parameter that no pattern fits, and an unknown spec, each
    with its name; TypeError for anything but patterns and specs.
    """
    names = list(names)
    codecs: dict[str, Codec | RatioWarmup | None] = {}
    patterns: dict[str, str] = {}
    known: dict[str, Codec | RatioWarmup | None] = {}
    budgets: list[float] = []
    for pattern, spec in given.items():
        if not isinstance(pattern, str):
            raise TypeError(f"gradients: expected patterns of names, such as '*.bias', got {pattern!r}")
        try:
            if (allowed := budget(spec)) is not None:
                budgets.append(allowed)
            known[pattern] = None if allowed is not None else ratio_warmup(spec) or parse(spec)
        except (ValueError, TypeError) as error:
            raise type(error)(f"gradients, {pattern!r}: {error}") from None
        fits = [name for name in names if fnmatchcase(name, pattern)]
        mine = [name for name in fits if name not in codecs]
        if not mine:
            why = (
                "all that it fits are decided by patterns before it"
                if fits
                else f"as {', '.join(map(repr, names[:3]))}"
            )
            raise ValueError(f"gradients, {pattern!r}: decides for none of {len(names)} parameters, {why}")
        codecs.update(dict.fromkeys(mine, known[pattern]))
        patterns.update(dict.fromkeys(mine, pattern))
    if left := [name for name in names if name not in codecs]:
        raise ValueError(f"gradients: no pattern fits parameter {left[0]!r} ({len(left)} in all); end with '*'")
    if len(set(budgets)) > 1:
        raise ValueError(
            f"gradients: error budgets {', '.join(map(str, budgets))}: expected the same wherever the spec is auto"
        )
    if is_coarse(known.get(ALL)) and (exact := [name for name in names if name in small and patterns[name] == ALL]):
        known[SMALL] = DENSE
        codecs.update(dict.fromkeys(exact, DENSE))
        patterns.update(dict.fromkeys(exact, SMALL))
    specs = tuple((pattern, AUTO if codec is None else str(codec)) for pattern, codec in known.items())
    return Rules(specs, codecs, patterns, budgets[0] if budgets else None)


def is_open(gradients: Spec) -> bool:
    """Return whether the codec may differ between steps or parameters: `auto`, patterns, or a ratio that warms up.

    Raises ValueError for an `auto` or a warm-up with a wrong argument.
    """
    return isinstance(gradients, Mapping) or budget(gradients) is not None or ratio_warmup(gradients) is not None


def open_refusal(gradients: Spec, optimizer: object, exchange: str | None, error_feedback: bool) -> Exception | None:
    """Return the error if `auto`, patterns or a warm-up cannot decide here; None if they can, or if one codec is given."""
    try:
        if not is_open(gradients):
            return None
        if (warmup := ratio_warmup(gradients)) is not None:
            return None if optimizer is None else warmup_refusal(warmup, type(optimizer).__name__)
    except ValueError as error:
        return error
    given, name = "patterns" if isinstance(gradients, Mapping) else "auto", type(optimizer).__name__
    if optimizer is not None and isinstance(gradients, Mapping):
        return TypeError(
            f"commpress.attach: {name} needs one spec of the gradients, as in "
            f'attach(model, "sign", optimizer=...), or auto; got {given}'
        )
    if optimizer is not None and gradients != AUTO:
        return ValueError(
            f"{gradients}: {name} sends no gradients, whose error a budget limits; expected auto without a budget"
        )
    if (
        candidates := getattr(optimizer, "candidates", None)
    ) is not None:  # else the optimizer itself is refused elsewhere
        try:
            candidates()
        except TypeError as error:
            return error
    if candidates is not None and not error_feedback:
        return ValueError(
            f"error_feedback=False: the specs that auto chooses for {name} keep its loss only with feedback; leave it out, "
            "or give a spec"
        )
    if exchange is not None:
        return ValueError(
            f"exchange={exchange!r}: with {given} each codec uses its own; leave it out, or give one spec"
        )
    return None


def warmup_refusal(warmup: RatioWarmup, name: str) -> ValueError:
    """Return the error for a ratio that warms up beside the compressed optimizer `name`."""
    return ValueError(
        f"{warmup}: {name} does not send gradients as they are; expected one ratio beside optimizer=, such as {warmup.codec}, "
        "which DGC warms up by its warmup_steps"
    )
