"""The user's `module:function`: importing it, calling it, and counting the parameters that its model trains."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def trained_parameters(text: str) -> int:
    """Return the number of trained parameters of the model that a factory makes, such as `my_project.models:build`.

    The factory is called without arguments, first on torch's meta device, where tensors have no memory, and if that fails, on
    the usual device. Raises ValueError that names the text.
    """
    factory = imported(text)
    try:
        with torch.device("meta"):
            model = factory()
    except Exception:  # it reads weights, say, or asks for values
        try:
            model = factory()
        except (Exception, SystemExit) as error:
            raise ValueError(f"--model {text}: the call fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {text}: returns a {type(model).__name__}, expected a torch.nn.Module")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == 0:
        raise ValueError(f"--model {text}: the model has no parameter to train")
    return trained


def parts(text: str, flag: str = "--model") -> tuple[str, str]:
    """Return the module and the factory of `module:factory`. Raises ValueError, with the flag, if it is not of that form."""
    module, _, name = text.partition(":")
    if not (module and name):
        raise ValueError(f"{flag} {text}: expected module:factory, such as my_project.models:build")
    return module, name


def imported(text: str, flag: str = "--model") -> Callable[[], object]:
    """Return the factory that `module:factory` names. Raises ValueError, with the flag, if there is none."""
    module, name = parts(text, flag)
    if os.getcwd() not in sys.path:  # `python -m` has it there, the console script has not
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{flag} {text}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{flag} {text}: {module} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{flag} {text}: {name} is a {type(found).__name__}, expected a function or class")
    return found


def called(text: str, flag: str) -> Any:
    """Return what the function that `module:function` names returns. Raises ValueError that names the flag."""
    function = imported(text, flag)
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{flag} {text}: the call fails: {type(error).__name__}: {error}") from error
