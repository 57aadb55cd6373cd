"""Modules with a choice: which layer, how many blocks, how wide, how many heads.

    OneOf({"3x3": nn.Conv2d(8, 8, 3, padding=1), "5x5": nn.Conv2d(8, 8, 5, padding=2)})
    Depth([2, 4, 6], [block() for _ in range(6)])
    Width([16, 32, 64], nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    Heads([1, 2, 4], attention, output="out")

A model with them is a supernet: it holds all weights, and computes with those of the chosen options. Smaller options use the
first of a larger one's blocks, units or heads (slimmable networks, arXiv:1812.08928; Once-for-all, arXiv:1908.09791).
`architecture.py` lists and sets choices, and makes the plain model at the end.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from commpress.model.heads import KNOWN
from commpress.model.search import cuts
from commpress.model.search.spaces import Option


class ChoiceModule(nn.Module, ABC):
    """A module with options, one of which is chosen."""

    def __init__(self, options: Sequence[Option], choice: Option) -> None:
        super().__init__()
        self.options = tuple(options)
        self.choice = choice

    def choose(self, option: Option) -> None:
        """Take one of the options."""
        self.choice = option

    def inside(self) -> dict[str, tuple[Option, ...]]:
        """Return the paths of modules that only some options use, and these options."""
        return {}

    @abstractmethod
    def fixed(self) -> nn.Module:
        """Return a module that computes the same, without a choice of its own. It may be part of this one."""

    def extra_repr(self) -> str:
        """Return the chosen option and all options, for `print(model)`."""
        return f"{self.choice!r} of {', '.join(map(repr, self.options))}"


class OneOf(ChoiceModule):
    """One of several modules; the first until another is chosen.

    Give them one after another (their names are then "0", "1", ...) or as a mapping by name. Raises ValueError for fewer
    than two, or a name with a dot or of a method of `nn.ModuleDict`.
    """

    def __init__(self, *candidates: nn.Module | Mapping[str, nn.Module]) -> None:
        if len(candidates) == 1 and isinstance(candidates[0], Mapping):
            named = dict(candidates[0])
        else:
            named = {str(i): module for i, module in enumerate(candidates)}  # type: ignore[misc]
        if len(named) < 2 or not all(isinstance(module, nn.Module) for module in named.values()):
            raise ValueError(
                f"OneOf: expected at least two modules, or a mapping of modules by name, got {candidates!r}"
            )
        taken = {"", *dir(nn.ModuleDict())}  # "keys", "type"
        if bad := [name for name in named if not isinstance(name, str) or "." in name or name in taken]:
            raise ValueError(
                f"OneOf: a candidate's name is {bad[0]!r}, expected text without a dot that is no attribute of nn.ModuleDict"
            )
        super().__init__(tuple(named), next(iter(named)))
        self.candidates = nn.ModuleDict(named)

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the output of the chosen candidate."""
        return self.candidates[str(self.choice)](*args, **named)

    def inside(self) -> dict[str, tuple[Option, ...]]:
        """Return each candidate with its own option."""
        return {f"candidates.{name}": (name,) for name in self.candidates}

    def fixed(self) -> nn.Module:
        """Return the chosen candidate."""
        return self.candidates[str(self.choice)]


class Depth(ChoiceModule):
    """The first k of some blocks, one after the other; the largest k until another is chosen. 0 returns x unchanged.

    Raises ValueError for choices that are not rising whole numbers, or whose largest is not the number of blocks.
    """

    def __init__(self, choices: Sequence[int], blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
        _require_rising("Depth", choices, 0, len(blocks), "blocks")
        super().__init__(choices, choices[-1])
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Any) -> Any:
        """Return x after the first k blocks, one after the other."""
        for block in self._chosen():
            x = block(x)
        return x

    def inside(self) -> dict[str, tuple[Option, ...]]:
        """Return each block with the options that use it."""
        return {f"blocks.{i}": tuple(k for k in self._depths() if k > i) for i in range(len(self.blocks))}

    def fixed(self) -> nn.Module:
        """Return an `nn.Sequential` of the first k blocks."""
        return nn.Sequential(*self._chosen())

    def _chosen(self) -> list[nn.Module]:
        assert isinstance(self.choice, int)
        return list(self.blocks)[: self.choice]

    def _depths(self) -> list[int]:
        return [k for k in self.options if isinstance(k, int)]


class Width(ChoiceModule):
    """Two layers and the modules between, with the first k inner units; the largest k until another is chosen.

    The first and last of `layers` are two Linear or two convolutions without groups. Modules between do not mix
    units: batch norms, and modules without parameters, such as activations and dropout. Raises ValueError for other layers, and
    for choices that are not rising or whose largest is not the number of inner units.
    """

    def __init__(self, choices: Sequence[int], *layers: nn.Module) -> None:
        kinds = [nn.Linear if isinstance(layer, nn.Linear) else _ConvNd for layer in (*layers[:1], *layers[-1:])]
        if len(layers) < 2 or kinds[0] is not kinds[1] or not all(map(cuts.can_be_cut, (layers[0], layers[-1]))):
            raise ValueError(
                f"Width: expected two Linear layers or two convolutions without groups, and what is between, got {layers!r}"
            )
        for layer in layers[1:-1]:
            if not isinstance(layer, _BatchNorm) and any(
                True for tensors in (layer.parameters(), layer.buffers()) for _ in tensors
            ):
                raise ValueError(f"Width: expected batch norms and modules without parameters between, got {layer!r}")
        inner, taken = cuts.sizes(layers[0])[1], cuts.sizes(layers[-1])[0]
        if inner != taken:
            raise ValueError(f"Width: the first layer has {inner} outputs, the last {taken} inputs, expected as many")
        _require_rising("Width", choices, 1, inner, "inner units")
        super().__init__(choices, choices[-1])
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        """Return x after all layers."""
        for layer, cut in zip(self.layers, self._cuts(), strict=True):
            x = cuts.call_cut(layer, cut, x) if cut else layer(x)
        return x

    def fixed(self) -> nn.Module:
        """Return an `nn.Sequential` of the layers, of the chosen width."""
        layers = [copy.deepcopy(layer) for layer in self.layers]
        for layer, cut in zip(layers, self._cuts(), strict=True):
            cuts.cut_(layer, cut)
        return nn.Sequential(*layers)

    def _cuts(self) -> list[dict[str, cuts.Cut]]:
        assert isinstance(self.choice, int)
        if self.choice == self.options[-1]:
            return [{} for _ in self.layers]
        keep = cuts.first(self.choice)
        between = [
            cuts.of_outputs(layer, keep) if isinstance(layer, _BatchNorm) else {} for layer in list(self.layers)[1:-1]
        ]
        return [cuts.of_outputs(self.layers[0], keep), *between, cuts.of_inputs(keep)]


class Heads(ChoiceModule):
    """An attention module with its first k heads; all heads until another number is chosen.

    `attention` has its number of heads and the layers of queries, keys and values under names of `commpress.model.heads.KNOWN`,
    and must find the size of a head from their outputs, not from its own attribute; `output` is the name of the Linear that
    takes the heads. Raises ValueError for another module, and for choices that are not rising or whose largest is not its
    number of heads.
    """

    def __init__(self, choices: Sequence[int], attention: nn.Module, output: str) -> None:
        known = [
            how
            for how in KNOWN
            if isinstance(getattr(attention, how.count, None), int)
            and all(isinstance(getattr(attention, layer, None), nn.Linear) for layer in how.layers)
        ]
        if not known:
            names = "; ".join(f"{how.count} and {', '.join(how.layers)}" for how in KNOWN)
            raise ValueError(f"Heads: a {type(attention).__name__} has none of {names} (Linear), expected one of these")
        how = known[0]
        count = getattr(attention, how.count)
        _require_rising("Heads", choices, 1, count, "heads")
        outputs = getattr(attention, how.layers[0]).out_features
        size, rest = divmod(outputs, count * how.parts)
        last = getattr(attention, output, None)
        if rest or not isinstance(last, nn.Linear) or last.in_features != count * size:
            raise ValueError(
                f"Heads: {output!r} is {last!r}, expected a Linear that takes {count} heads of {outputs / count / how.parts:g}"
            )
        super().__init__(choices, choices[-1])
        self.attention = attention
        self._how, self._size, self._output, self._count = how, size, output, count

    def choose(self, option: Option) -> None:
        """Take a number of heads, and tell the attention module."""
        assert isinstance(option, int)
        super().choose(option)
        setattr(self.attention, self._how.count, option)
        if self._how.width is not None:
            setattr(self.attention, self._how.width, option * self._size)

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the output of the attention module with the first k heads."""
        return cuts.call_cut(self.attention, self._cuts(), *args, **named)

    def fixed(self) -> nn.Module:
        """Return an attention module with only the chosen heads."""
        attention = copy.deepcopy(self.attention)
        cuts.cut_(attention, self._cuts())
        return attention

    def _cuts(self) -> dict[str, cuts.Cut]:
        assert isinstance(self.choice, int)
        k, parts, count = self.choice, self._how.parts, self._count

        def heads(x: Tensor) -> Tensor:  # [parts * count * size, ...]
            left: Tensor = x.unflatten(0, (parts, count, -1))[:, :k]
            return left.flatten(0, 2)

        found: dict[str, cuts.Cut] = {}
        if k < count:
            for layer in self._how.layers:
                of = cuts.of_outputs(self.attention.get_submodule(layer), heads)
                found |= {f"{layer}.{name}": cut for name, cut in of.items()}
            found |= {f"{self._output}.{name}": cut for name, cut in cuts.of_inputs(cuts.first(k * self._size)).items()}
        return found


def _require_rising(what: str, choices: Sequence[int], least: int, most: int, of: str) -> None:
    whole = all(type(k) is int for k in choices)
    if len(choices) < 2 or not whole or sorted(set(choices)) != list(choices) or choices[0] < least:
        raise ValueError(
            f"{what}: expected at least two rising whole numbers from {least} on, got {choices if whole else list(choices)}"
        )
    if choices[-1] != most:
        raise ValueError(f"{what}: the largest choice is {choices[-1]}, expected {most}, the number of {of}")
