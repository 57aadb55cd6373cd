"""The return value of a collective: a `Work`, as c10d's do, and a future that raises what the exchange raised."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Future = torch.futures.Future


def make_future(device: torch.device) -> "Future[Any]":
    """Return a future for the end of a job; on an accelerator it knows the streams of `device`."""
    return Future(devices=None if device.type == "cpu" else [device])


class Work(dist.Work):
    """An operation under way. Its result will be in `out`. `waited` gets the seconds that `wait` took."""

    def __init__(self, out: Tensor, waited: Callable[[float], None]) -> None:
        super().__init__()
        self.submitted = time.perf_counter()
        self.out, self._waited = out, waited
        self._future = make_future(out.device)
        self._raising: Future[Tensor] | None = None
        """The future that `future` returns, once it is made."""

    def wait(self, timeout: Any = None) -> bool:
        """Return when the result is there; on an accelerator the current stream waits for it instead.

        Raises RuntimeError if the operation failed on any rank.
        """
        start = time.perf_counter()
        value = self._future.wait()
        self._waited(time.perf_counter() - start)
        if isinstance(value, BaseException):
            raise value
        return True

    def future(self) -> "Future[Tensor]":
        """Return the future of `out` that raises the error of the exchange. It does not keep a collective alive."""
        if self._raising is None:
            self._raising = self._future.then(partial(_result, self.out))
        return self._raising

    def finish(self, error: BaseException | None) -> None:
        """Note that the result has arrived, or the error that prevents it."""
        _resolve(self._future, self.out, error)


def _resolve(future: "Future[Any]", out: Tensor, error: BaseException | None) -> None:
    future.set_result(error or out)


def _result(out: Tensor, future: "Future[Any]") -> Tensor:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return out


def not_counted(seconds: float) -> None:
    """Note nothing. For a `Work` whose wait the sequencer counts, as the seconds that training waits after a backward."""
