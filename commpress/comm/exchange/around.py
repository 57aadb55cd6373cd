"""Work around an exchange, in the threads that encode and decode: generators that run another one inside."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from commpress.comm.encoder import Encoder
from commpress.comm.exchange.wire import Transfer
from commpress.comm.prologue import Prologue


def prepared(
    exchange: Iterator[Transfer],
    x: Tensor,
    before: list[Callable[[], None]],
    prologue: Prologue | None = None,
    fused: Encoder | None = None,
    finish: Callable[[Tensor], None] | None = None,
) -> Iterator[Transfer]:
    """Make of the gradient in `x` what is sent, send it, and make of the mean what `x` shall hold.

    The `prologue` is left to `fused`, which encodes what `exchange` sends, if there is one: one pass less.
    """
    for call in before:
        call()
    if fused is not None:
        fused.prologue = prologue
    elif prologue is not None:
        prologue.apply(x)
    yield from exchange
    if finish is not None:
        finish(x)


def scaled(exchange: Iterator[Transfer], x: Tensor, times: float) -> Iterator[Transfer]:
    """Multiply what an exchange leaves in `x`, which was to be more than a mean."""
    yield from exchange
    if times != 1:
        x.mul_(times)


def in_inference_mode(exchange: Iterator[Transfer]) -> Iterator[Transfer]:
    """Run an exchange on tensors made under inference mode: they are written to under it alone, a mode of each thread."""
    while True:
        with torch.inference_mode():
            transfer = next(exchange, None)
        if transfer is None:
            return
        yield transfer
        del transfer
