"""The codecs' speed on this machine: seconds a value, as the exchanges use them."""

import time
from collections.abc import Callable
from functools import partial

import torch

from commpress.comm import coding
from commpress.comm.codecs import Codec
from commpress.comm.cost import Speed
from commpress.comm.exchange import EXCHANGES

VALUES = 2**22
"""Length of the gradient with which codecs are timed: it is larger than a core's cache."""
REPEATS = 5


def measure(codec: Codec, device: torch.device, n: int | None = None) -> Speed:
    """Time a codec on `n` values (default: VALUES), on one core of this machine or on its accelerator."""
    n = VALUES if n is None else n
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(device)
    if not codec.lossy:  # dense: values are divided by the number of ranks, and the group sums them
        return Speed(_seconds(lambda: x.mul_(1.0), device) / n, (0.0, 0.0), (0.0, 0.0), _adding(x, x.clone(), device))
    coding.warm_up(codec, device)
    residual, out = torch.zeros_like(x), torch.empty_like(x)
    payload = codec.encode(x)
    four = payload.repeat(4)
    encode = _seconds(lambda: coding.encode(codec, x, residual, out=payload), device)
    counts = [four[: k * payload.numel()] for k in (1, 4)]
    mean = [_seconds(partial(codec.mean, p, n, k, out), device) for p, k in zip(counts, (1, 4), strict=True)]
    recode = [0.0, 0.0]
    add = 0.0
    if EXCHANGES[codec.exchange].chunk(n, codec, 0, 2) is not None:
        calls = [partial(coding.recode, codec, p, n, k, residual, payload) for p, k in zip(counts, (1, 4), strict=True)]
        recode = [_seconds(call, device) for call in calls]
    if codec.sum_dtype is not None:
        values = payload[codec.summed(n)].view(codec.sum_dtype)
        encode += _seconds(lambda: values.mul_(1.0), device)
        add = _adding(values, values.clone(), device)
    each = [(first / n, max(0.0, fourth - first) / 3 / n) for first, fourth in (mean, recode)]
    return Speed(encode / n, each[0], each[1], add)


def _adding(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    return _seconds(lambda: a.add_(b), device) / a.numel()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few calls after a first one, in seconds. On CPU it is the thread's own time, so that other
    programs do not count."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(REPEATS + 1):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = clock()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(clock() - start)
    return min(times[1:])
