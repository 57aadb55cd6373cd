"""What runs on an accelerator without the host waiting for it, tried on CPU tensors: asking one for a value is refused."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from commpress.kernels import table

ASKING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class SeenError(AssertionError):
    """A value of a tensor was asked for."""


@contextlib.contextmanager
def values_are_unseen() -> Iterator[None]:
    """Run on the definitions in plain torch, whose kernels for the CPU see all, and raise SeenError where a value is wanted."""
    with mock.patch.object(table, "KERNELS", {}), nothing_is_asked():
        yield


@contextlib.contextmanager
def nothing_is_asked() -> Iterator[None]:
    """Raise SeenError where a value of a tensor is wanted."""
    with contextlib.ExitStack() as patched:
        for name in ASKING:

            def refused(*_: Any, name: str = name, **__: Any) -> None:
                raise SeenError(f"Tensor.{name}: the host would wait for the device")

            patched.enter_context(mock.patch.object(torch.Tensor, name, refused))
        yield
