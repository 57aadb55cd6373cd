"""Work before and after an exchange, in the threads that encode and decode: generators that run another one inside."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from commpress.comm.encoder import Encoder
from commpress.comm.exchange.wire import Transfer
from commpress.comm.prologue import Ahead, Prologue


def prepared(
    exchange: Iterator[Transfer],
    x: Tensor,
    before: list[Callable[[], None]],
    prepare: Callable[[], Prologue | Ahead | None] | None = None,
    fused: Encoder | None = None,
    finish: Callable[[Tensor], None] | None = None,
) -> Iterator[Transfer]:
    """Turn the gradient in `x` into the values to send, run the exchange, and turn the mean into the final values of `x`.

    If there is a `fused` encoder, which encodes for `exchange`, it runs the prologue that `prepare` returns, if it can: this
    saves a pass over memory.
    """
    for call in before:
        call()
    prologue = None if prepare is None else prepare()
    if prologue is not None and fused is not None and prologue.fits(fused.codec, x):
        fused.prologue = prologue
    elif prologue is not None:
        prologue.apply(x)
    yield from exchange
    if finish is not None:
        finish(x)


def scaled(exchange: Iterator[Transfer], x: Tensor, times: float) -> Iterator[Transfer]:
    """Multiply the mean that an exchange leaves in `x`, as for a sum."""
    yield from exchange
    if times != 1:
        x.mul_(times)


def in_inference_mode(exchange: Iterator[Transfer]) -> Iterator[Transfer]:
    """Run an exchange on tensors made under inference mode. Only that mode may write to them, and each thread has its own."""
    while True:
        with torch.inference_mode():
            transfer = next(exchange, None)
        if transfer is None:
            return
        yield transfer
        del transfer
