"""The error of a step's means: what looking costs."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from commpress.comm.codecs import parse
from commpress.comm.error import SAMPLE, ErrorWatch
from commpress.comm.feedback import Memory


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes; views of what there is are none."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.own, self.values = x.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple) else (made,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() != self.own:
                self.values = max(self.values, one.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_looking_makes_no_copy_of_the_bucket(dtype: torch.dtype) -> None:
    # a copy of 25 MB is fresh memory in each step that is looked into, and its page faults take longer than the codec
    x, codec = torch.ones(100 * SAMPLE, dtype=dtype), parse("int8")
    wire: Any = SimpleNamespace(world_size=1, all_gather=mock.Mock())
    watch = ErrorWatch(codec)
    with Largest(x) as largest:
        list(watch.watch(iter(()), x, codec, Memory(), wire, mock.Mock()))
    assert watch.error() == 0
    assert largest.values < x.numel() // 10
