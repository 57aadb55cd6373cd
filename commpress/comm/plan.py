"""Which codec and exchange for which tensor. What is not compressed has a reason, which stands in the report."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from commpress.comm.codecs import Codec, parse
from commpress.comm.exchange import EXCHANGES
from commpress.comm.feedback import Memory
from commpress.comm.prologue import Prologue

FEWEST_VALUES = 256
"""A bucket below this travels dense: one small message either way."""

DENSE = parse("none")


@dataclass(frozen=True)
class Choice:
    """What happens to one bucket. `reason` says why it is not compressed, and is empty if it is."""

    codec: Codec
    exchange: str
    feedback: bool
    reason: str = ""


@dataclass(frozen=True)
class Treatment:
    """What an optimizer wants done with a bucket in this step: `codec` codes it.

    With a `reason` it is not compressed: the mean is exact, or, without a codec, the bucket stays on its rank. `prepare`, then
    `blend`, make of the bucket's gradient, in place, what is to be sent; `momentum` keeps one of this rank's own. `apart`: what
    feedback remembers is of another kind, and has no part in it.
    """

    codec: Codec | None
    reason: str = ""
    prepare: Callable[[Tensor, Memory], None] | None = None
    blend: Prologue | None = None
    momentum: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Plan:
    """One spec for all buckets, its exchange, and whether lossy codecs get error feedback.

    Without an exchange the codec's own is taken, except that between two ranks `all_gather` stands in for `two_shot`: it
    sends as many bytes, in one step, and encodes once. Raises ValueError if the exchange is unknown or does not fit the codec.
    """

    codec: Codec
    exchange: str | None = None
    error_feedback: bool = True

    @classmethod
    def of(cls, spec: str | Codec, exchange: str | None = None, error_feedback: bool = True) -> "Plan":
        """The plan for a spec; `exchange=None` takes the one that suits its codec."""
        codec = parse(spec)
        if exchange is not None and exchange not in EXCHANGES:
            raise ValueError(f"unknown exchange {exchange!r}, known: {', '.join(EXCHANGES)}")
        if exchange == "all_reduce" and codec.sum_dtype is None:
            raise ValueError(f"payloads of {codec} cannot be summed, so it cannot use all_reduce; leave exchange out")
        return cls(codec, exchange, error_feedback)

    def choose(self, n: int, itemsize: int, world_size: int, treatment: Treatment | None = None) -> Choice:
        """What to do with a bucket of n values of `itemsize` bytes; an optimizer may want its own treatment."""
        if world_size == 1:
            return Choice(DENSE, "all_reduce", False, "one rank: nothing to send")
        if treatment is not None:
            if treatment.reason:
                return Choice(DENSE, "none" if treatment.codec is None else "all_reduce", False, treatment.reason)
            assert treatment.codec is not None
            fits = self.exchange != "all_reduce" or treatment.codec.sum_dtype is not None
            exchange = self.exchange if fits else None  # its own, for a codec whose payloads cannot be summed
            feedback = self.error_feedback and not treatment.apart
            plan = replace(self, codec=treatment.codec, exchange=exchange, error_feedback=feedback)
            return plan.choose(n, itemsize, world_size)
        if not self.codec.lossy:
            return Choice(self.codec, self._exchange(world_size), False, "spec is none")
        if n < FEWEST_VALUES:
            return Choice(DENSE, "all_reduce", False, f"fewer than {FEWEST_VALUES} values")
        if self.codec.nbytes(n) >= n * itemsize:
            return Choice(DENSE, "all_reduce", False, f"payload would be no smaller than {itemsize} bytes a value")
        return Choice(self.codec, self._exchange(world_size), self.error_feedback)

    def _exchange(self, world_size: int) -> str:
        if self.exchange is None and self.codec.exchange == "two_shot" and world_size == 2:
            return "all_gather"
        return self.exchange or self.codec.exchange

    def settings(self) -> dict[str, object]:
        """What all ranks must agree on."""
        return {"codec": str(self.codec), "exchange": self.exchange, "error_feedback": self.error_feedback}
