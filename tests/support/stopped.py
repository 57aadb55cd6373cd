"""A training that is asked to stop on one rank, as by Ctrl-C."""

import signal
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from commpress.launch import data


def stop_at(draws: int, training: Callable[[], bool]) -> None:
    """Run `training()`, which has to return False: rank 1 is interrupted when it draws its batch for the `draws`-th time."""
    sample, drawn = data.sample, 0

    def counting(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == draws and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)
        return sample(*arguments)

    data.sample = counting
    try:
        assert not training()
    finally:
        data.sample = sample
    dist.barrier()  # rank 0 writes the marker
