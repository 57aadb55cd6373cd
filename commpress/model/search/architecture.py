"""The choices of a model: list them, set them, and make the plain model in the end."""

import copy
from collections.abc import Iterator, Mapping

from torch import nn

from commpress.model.layers import plain, uncompiled
from commpress.model.search.choices import ChoiceModule
from commpress.model.search.spaces import Choice, Option, Space

ROOT = "model"
"""The name of a choice that is the model itself."""


def space(model: nn.Module) -> Space:
    """Return what can be chosen, by the names of the modules. A choice inside of an option counts where that is chosen.

    Raises ValueError for a model without choices.
    """
    modules = _modules(model)
    if not modules:
        raise ValueError(
            f"space: a {type(model).__name__} without a OneOf, Depth, Width or Heads, expected a choice in it"
        )
    conditions: dict[str, dict[str, tuple[Option, ...]]] = {name: {} for name in modules}
    for name, module in modules.items():
        prefix = "" if name == ROOT and module is uncompiled(model) else f"{name}."
        for path, options in module.inside().items():
            for other in modules:
                if f"{other}.".startswith(f"{prefix}{path}."):
                    conditions[other][name] = options
    return Space({name: module.options for name, module in modules.items()}, conditions)


def choose(model: nn.Module, choice: Mapping[str, Option]) -> None:
    """Set choices by name; what is not named stays. Raises ValueError, with nothing changed, for a wrong name or option."""
    modules = _modules(model)
    space(model).check(choice, whole=False)
    for name, option in choice.items():
        modules[name].choose(option)


def chosen(model: nn.Module) -> Choice:
    """Return what is chosen now."""
    return {name: module.choice for name, module in _modules(model).items()}


def fixed(model: nn.Module, choice: Mapping[str, Option] | None = None) -> nn.Module:
    """Return a copy with weights of its own that has no choices: what `choice` (None: what is chosen now) leaves of it.

    It computes what the model does under that choice. Raises ValueError as `choose` does.
    """
    found = copy.deepcopy(uncompiled(model))
    if choice is not None:
        choose(found, choice)
    return _without_choices(found)


def left_out(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that the chosen path does not use."""
    model = uncompiled(model)
    used = {id(p) for p in _used(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in used]


def _modules(model: nn.Module) -> dict[str, ChoiceModule]:
    """The choices, those in which others are first."""
    named = uncompiled(model).named_modules()
    return {plain(name) or ROOT: module for name, module in named if isinstance(module, ChoiceModule)}


def _without_choices(module: nn.Module) -> nn.Module:
    while isinstance(module, ChoiceModule):
        module = module.fixed()
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _without_choices(child)
    return module


def _used(module: nn.Module, without: frozenset[str] = frozenset()) -> Iterator[nn.Parameter]:
    """Parameters of a module, but for those below the paths in `without`."""
    if isinstance(module, ChoiceModule):
        without |= {path for path, options in module.inside().items() if module.choice not in options}
    yield from module.parameters(recurse=False)
    for name, child in module._modules.items():  # named_children gives a module once that stands at two places
        if child is not None and name not in without:
            below = frozenset(path.removeprefix(f"{name}.") for path in without if path.startswith(f"{name}."))
            yield from _used(child, below)
