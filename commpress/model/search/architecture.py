"""The choices of a model: list them, set them, and make the plain model at the end."""

import copy
from collections.abc import Iterator, Mapping

from torch import nn

from commpress.model.layers import plain, uncompiled
from commpress.model.search.choices import ChoiceModule
from commpress.model.search.spaces import Choice, Option, Space

ROOT = "model"
"""The name of a choice that is the model itself."""


def space(model: nn.Module) -> Space:
    """Return the choices of a model, by the names of the modules. A choice inside an option counts only if that option is
    chosen; a choice at several places counts if one of them is used.

    Raises ValueError for a model without choices.
    """
    modules = _some_modules(model)
    conditions: dict[str, dict[str, tuple[Option, ...]]] = {name: {} for name in modules}
    places = _places(model)
    for name, module in modules.items():
        paths = {f"{place}{path}.": of for place in places[module] for path, of in module.inside().items()}
        for other, inner in modules.items():
            under = [{o for path, of in paths.items() if place.startswith(path) for o in of} for place in places[inner]]
            if all(under):  # no place of it is elsewhere
                conditions[other][name] = tuple(option for option in module.options if option in set().union(*under))
    return Space({name: module.options for name, module in modules.items()}, conditions)


def choose(model: nn.Module, choice: Mapping[str, Option]) -> None:
    """Set choices by name; other choices stay. Raises ValueError, with nothing changed, for a wrong name or option."""
    modules = _some_modules(model)
    Space({name: module.options for name, module in modules.items()}).check(choice, whole=False)
    for name, option in choice.items():
        modules[name].choose(option)


def chosen(model: nn.Module) -> Choice:
    """Return the present choice."""
    return {name: module.choice for name, module in _modules(model).items()}


def fixed(model: nn.Module, choice: Mapping[str, Option] | None = None) -> nn.Module:
    """Return a plain copy without choices, with its own weights, for `choice` (None: the present choice).

    It computes the same as the model under that choice. Raises ValueError as `choose` does.
    """
    found = copy.deepcopy(uncompiled(model))
    if choice is not None:
        choose(found, choice)
    return _without_choices(found, {})


def left_out(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters that the chosen path does not use."""
    model = uncompiled(model)
    used = {id(p) for p in _used(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in used]


def _modules(model: nn.Module) -> dict[str, ChoiceModule]:
    """Return the choices, outer ones first."""
    named = uncompiled(model).named_modules()
    return {plain(name) or ROOT: module for name, module in named if isinstance(module, ChoiceModule)}


def _some_modules(model: nn.Module) -> dict[str, ChoiceModule]:
    if modules := _modules(model):
        return modules
    raise ValueError(f"space: a {type(model).__name__} without a OneOf, Depth, Width or Heads, expected a choice in it")


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return for each choice the prefixes of its parts' names, at all of its places."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in uncompiled(model).named_modules(remove_duplicate=False):
        if isinstance(module, ChoiceModule):
            found.setdefault(module, []).append(f"{plain(name)}." if name else "")
    return found


def _without_choices(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a module with each choice in it fixed. `done` maps modules to fixed ones, so that shared ones stay shared."""
    if module not in done:
        left = module
        while isinstance(left, ChoiceModule):
            left = left.fixed()
        done[module] = left
        for name, child in list(left._modules.items()):
            if child is not None:
                left._modules[name] = _without_choices(child, done)
    return done[module]


def _used(module: nn.Module, without: frozenset[str] = frozenset()) -> Iterator[nn.Parameter]:
    """Return the parameters of a module, except those below the paths in `without`."""
    if isinstance(module, ChoiceModule):
        without |= {path for path, options in module.inside().items() if module.choice not in options}
    yield from module.parameters(recurse=False)
    for name, child in module._modules.items():  # named_children gives a module once that stands at two places
        if child is not None and name not in without:
            below = frozenset(path.removeprefix(f"{name}.") for path in without if path.startswith(f"{name}."))
            yield from _used(child, below)
