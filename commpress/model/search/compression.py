"""Compression settings as a search space: bits, groups and sparsity by layers, and the recipe that a choice makes.

settings = Compression({"blocks.*": {"bits": (None, 8, 4), "group": (None, 32), "sparsity": (0.0, 0.5, 0.8)}})
settings.space                                   # "blocks.* bits", "blocks.* group", "blocks.* sparsity"
recipe = settings.recipe(trial.choice)           # for commpress.model.Scheduler
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from commpress.model import layers, pruning, quantization
from commpress.model.recipe import Recipe, RecipeError
from commpress.model.search.sizes import stored_bytes
from commpress.model.search.spaces import Option, Space

KINDS = ("bits", "group", "sparsity")


@dataclass(frozen=True)
class Compression:
    """Options by globs of layers' names. `prune` and `quantize` set the steps, as in a recipe: `{"start": 100, "end": 500}`.

    A layer belongs to one glob. Other layers are not changed. Raises ValueError for an unknown kind, an option that no
    recipe can have, or groups without bits.
    """

    layers: Mapping[str, Mapping[str, Sequence[Option]]]
    prune: Mapping[str, Any] | None = None
    """Keys of `[[prune]]` except amount and parameters. None: at once, before the first step."""
    quantize: Mapping[str, Any] | None = None
    """Keys of `[[quantize]]` except bits, group and layers. None: from the first step on."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("Compression: expected options by globs of layers, got none")
        for glob, kinds in self.layers.items():
            for kind, options in kinds.items():
                if kind not in KINDS:
                    raise ValueError(f"Compression {glob!r}: {kind!r} is unknown, expected some of {', '.join(KINDS)}")
                if kind == "group" and not any(kinds.get("bits", ())):
                    raise ValueError(f"Compression {glob!r}: a group needs bits, expected bits of 8 or 4")
                for option in options:
                    self._require_possible(glob, kind, option)

    @property
    def space(self) -> Space:
        """Return the space; a group counts only with bits."""
        options, conditions = dict[str, Sequence[Option]](), dict[str, dict[str, Sequence[Option]]]()
        for glob, kinds in self.layers.items():
            for kind in (kind for kind in KINDS if kind in kinds):
                options[f"{glob} {kind}"] = kinds[kind]
                if kind == "group":
                    conditions[f"{glob} group"] = {f"{glob} bits": [bits for bits in kinds["bits"] if bits is not None]}
        return Space(options, conditions)

    def recipe(self, choice: Mapping[str, Option]) -> Recipe:
        """Return the recipe of a choice, which may have other names, too. Raises ValueError for a name that is missing."""
        own = {name: choice[name] for name in self.space if name in choice}
        self.space.check(own)
        prunes, quantizes = [], []
        for glob, kinds in self.layers.items():
            of = {kind: own[f"{glob} {kind}"] for kind in kinds}
            if of.get("sparsity"):
                prunes.append(self._prune(glob, of["sparsity"]))
            if of.get("bits"):
                quantizes.append(self._quantize(glob, of["bits"], of.get("group")))
        return Recipe.of({"prune": prunes, "quantize": quantizes}, "the recipe of a choice")

    def stored_bytes(self, model: nn.Module, choice: Mapping[str, Option]) -> int:
        """Return the bytes of the stored model, if it were pruned by magnitude now.

        The trained model's file differs by a few bytes, since its layers have other shares of pruned weights.
        """
        return stored_bytes(*self.applied(model, choice))

    def applied(self, model: nn.Module, choice: Mapping[str, Option]) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a copy of the model with a choice applied at once, pruned by magnitude and prepared, and its masks by name."""
        made, recipe = copy.deepcopy(layers.uncompiled(model)), self.recipe(choice)
        masks: dict[str, Tensor] = {}
        for entry in recipe.prune:
            weights = {name: p for name, p in layers.named_parameters(made).items() if _matches(name, entry.parameters)}
            scores = {name: p.detach().abs() for name, p in weights.items()}
            for name, mask in pruning.by_amount(scores, entry.amount or 0.0).items():
                weights[name].data.masked_fill_(~mask, 0.0)
                masks[name] = mask
        for each in recipe.quantize:
            quantization.prepare(made, quantization.Quantization(each.bits, each.group, layers=each.layers))
        return made, masks

    def _prune(self, glob: str, sparsity: Any) -> dict[str, Any]:
        return {**(self.prune or {"start": 0}), "amount": sparsity, "parameters": [f"{glob}.weight"]}

    def _quantize(self, glob: str, bits: Any, group: Any) -> dict[str, Any]:
        grouped = {} if group is None else {"group": group}
        return {**(self.quantize or {"start": 0}), "bits": bits, **grouped, "layers": [glob]}

    def _require_possible(self, glob: str, kind: str, option: Option) -> None:
        """Raise the recipe's error for an option that it cannot have."""
        part: dict[str, Any] = {}
        if kind == "sparsity" and not (type(option) is float and option == 0.0):
            part = {"prune": [self._prune(glob, option)]}
        elif kind != "sparsity" and option is not None:
            part = {
                "quantize": [self._quantize(glob, option if kind == "bits" else 8, option if kind == "group" else None)]
            }
        try:
            Recipe.of(part, f"Compression {glob!r} {kind} {option!r}")
        except RecipeError as error:
            raise ValueError(str(error)) from None


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
