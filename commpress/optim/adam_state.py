"""The state of torch's Adam or AdamW, read so that another optimizer of the same parameters can continue from it.

    exp_avg_sq / (1 - beta2^step)   the variance        exp_avg / (1 - beta1^step)   the momentum

The betas and steps are those of the run that made the state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from commpress.comm.parameters import bare_name

AdamState = torch.optim.Optimizer | Mapping[str, Any]
"""A torch.optim.Adam or AdamW, or its `state_dict()`."""
Found = tuple[Mapping[str, Any], Mapping[str, Any]]
"""A parameter's state, and the settings of its group."""


def adam_states(source: AdamState, groups: Sequence[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """Return `step`, `exp_avg` and `exp_avg_sq` of each parameter that these groups train, copied and checked.

    In an optimizer the states are found by tensor. In a `state_dict()` they are found by name if both have names (torch keeps
    them for `AdamW(model.named_parameters())`), else by the order of the groups, which must then have the same sizes as ours.
    `exp_avg` and `exp_avg_sq` are scaled so that the betas of our groups remove the bias of the source's betas.

    Raises TypeError if `source` is neither; ValueError for a parameter without state or step, for other shapes or groups, for a
    state without `exp_avg_sq`, for a variance that is not finite, negative or all zeros, for amsgrad and for maximize.
    """
    find = _finder(source, groups)
    states: dict[Tensor, dict[str, Any]] = {}
    for at, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            if p.requires_grad:
                states[p] = _taken(p, find(at, index), group, _title(groups, at, index))
    if not states:
        raise ValueError("variance_from: none of the optimizer's parameters requires a gradient, expected some that do")
    return states


def _title(groups: Sequence[Mapping[str, Any]], at: int, index: int) -> str:
    names = groups[at].get("param_names")
    return f"parameter {index} of group {at}" if names is None else f"parameter {names[index]!r}"


def _finder(source: AdamState, groups: Sequence[Mapping[str, Any]]) -> Callable[[int, int], Found]:
    """Return a function that finds a parameter's state by its group and its place in it; a missing state is an empty dict."""
    if isinstance(source, torch.optim.Optimizer):
        state, holders = source.state, {p: group for group in source.param_groups for p in group["params"]}

        def by_tensor(at: int, index: int) -> Found:
            p = groups[at]["params"][index]
            if p not in holders:
                raise ValueError(
                    f"variance_from: {_title(groups, at, index)} is not held by the {type(source).__name__} given; expected "
                    "one of the same parameters, or its state_dict()"
                )
            return state.get(p, {}), holders[p]

        return by_tensor
    if not isinstance(source, Mapping) or not {"state", "param_groups"} <= source.keys():
        found = sorted(map(str, source)) if isinstance(source, Mapping) else type(source).__name__
        raise TypeError(f"variance_from: expected a torch.optim.AdamW or its state_dict(), got {found}")
    theirs = source["param_groups"]
    places = {name: (key, group) for group in theirs for name, key in zip(_names(group), group["params"], strict=False)}
    if places and all("param_names" in group for group in groups):

        def by_name(at: int, index: int) -> Found:
            name = _bare(groups[at]["param_names"][index])
            if name not in places:
                raise ValueError(f"variance_from: its state has no parameter {name!r}, but {sorted(places)}")
            key, group = places[name]
            return source["state"].get(key, {}), group

        return by_name
    sizes = [[len(group["params"]) for group in all_of] for all_of in (groups, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"variance_from: its groups have {sizes[1]} parameters, the optimizer's {sizes[0]}; expected the same groups, or "
            "both optimizers made of model.named_parameters()"
        )
    return lambda at, index: (source["state"].get(theirs[at]["params"][index], {}), theirs[at])


def _names(group: Mapping[str, Any]) -> list[str]:
    """Return the names of a saved group's parameters; empty if it has none. In a distributed checkpoint they are the keys."""
    names = group.get("param_names") or [key for key in group["params"] if isinstance(key, str)]
    return [_bare(name) for name in names]


def _bare(name: str) -> str:
    """Return a name as the bare model has it, without the `module.` that DistributedDataParallel puts in front."""
    return bare_name(name).removeprefix("module.")


def _taken(p: Tensor, found: Found, group: Mapping[str, Any], title: str) -> dict[str, Any]:
    state, theirs = found
    for key in ("amsgrad", "maximize"):
        if theirs.get(key):
            raise ValueError(f"variance_from: the state of {title} was made with {key}=True; expected AdamW without it")
    if not state:
        raise ValueError(
            f"variance_from: no state of {title}, which requires a gradient; expected one that has stepped"
        )
    if not {"exp_avg", "exp_avg_sq"} <= state.keys() or "inverse" in state:  # 0/1 Adam keeps both
        raise ValueError(
            f"variance_from: the state of {title} has {sorted(state)}; expected exp_avg, exp_avg_sq and step, as AdamW's"
        )
    steps = float(state.get("step", 0))
    if not steps >= 1 or math.isinf(steps):
        raise ValueError(f"variance_from: the state of {title} is of step {steps:g}, expected 1 or more")
    taken: dict[str, Any] = {"step": torch.tensor(steps, dtype=torch.float32, device="cpu")}
    for key, beta, own in zip(("exp_avg", "exp_avg_sq"), theirs["betas"], group["betas"], strict=True):
        value = state[key]
        if value.shape != p.shape:
            raise ValueError(
                f"variance_from: {key} of {title} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"variance_from: {key} of {title} has values that are not finite")
        taken[key] = torch.empty_like(p, requires_grad=False).copy_(value)  # in the order of p's memory
        if own != beta:
            taken[key].mul_((1 - own**steps) / (1 - beta**steps))
    if p.numel() and not (bool((taken["exp_avg_sq"] >= 0).all()) and bool(taken["exp_avg_sq"].any())):
        least, most = (float(x) for x in taken["exp_avg_sq"].aminmax())
        raise ValueError(
            f"variance_from: exp_avg_sq of {title} goes from {least:g} to {most:g}; expected none below 0, and some above"
        )
    return taken
