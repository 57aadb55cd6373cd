"""Plans: which codec and exchange each tensor gets. Everything uncompressed has a reason, which is in the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from commpress.comm.codecs import AUTO, Codec, parse
from commpress.comm.codecs.base import padded
from commpress.comm.coding import FLOAT_DTYPES
from commpress.comm.exchange import EXCHANGES, NO_EXCHANGE, Exchange, Wire, named
from commpress.comm.feedback import Memory, NodeSlice
from commpress.comm.meter import SPEC_IS_NONE, dtype_name
from commpress.comm.prologue import Ahead, Prologue
from commpress.comm.segments import Segments

FEWEST_VALUES = 256
"""A bucket with fewer values is sent dense: it is one small message either way."""

DENSE = parse("none")
SHARDED = "a sharded model's ranks hold parts of them"
NOTHING_LEFT = "nothing is left of it"
DELTA = "delta"
"""The word before the codec of changes: `delta|int4`."""
ALL_REDUCE = EXCHANGES["all_reduce"]


@dataclass(frozen=True)
class BucketPlan:
    """The codec and exchange of one bucket. `reason` says why it is not compressed, and is empty if it is."""

    codec: Codec
    exchange: Exchange
    feedback: bool
    reason: str = ""

    def parts(self, n: int, rank: int, world_size: int) -> tuple[tuple[int, int] | None, NodeSlice | None]:
        """Return the chunk of n values that a rank encodes a second time, and the slice that it encodes for its node; None for
        one that does not exist."""
        of = (n, self.codec, rank, world_size)
        return self.exchange.chunk(*of), self.exchange.node_slice(*of)


@dataclass(frozen=True)
class Override:
    """An optimizer's wishes for a bucket in this step: `codec` codes it.

    With a `reason` it is not compressed: the mean is exact, or, without a codec, the bucket stays on its rank. `prepare` turns
    the bucket's gradient, in place, into the values to send, or returns the prologue that does the rest; `momentum` keeps this
    rank's own momentum, and `masks_momentum` clears it where values were sent.
    `finish` turns the mean, in place, into the final values of the bucket. `bypass_feedback`: the residual is of another
    kind, and is not added.
    """

    codec: Codec | None
    reason: str = ""
    prepare: Callable[[Tensor, Memory], Prologue | Ahead | None] | None = None
    finish: Callable[[Tensor], None] | None = None
    momentum: bool = False
    masks_momentum: bool = False
    bypass_feedback: bool = False


@dataclass(frozen=True)
class Plan:
    """One spec for all buckets, its exchange, and whether lossy codecs get error feedback.

    Without an exchange the codec's own is taken, or its replacement among few ranks: see its file. Raises ValueError if
    the exchange is unknown or does not fit the codec.
    """

    codec: Codec
    exchange: Exchange | None = None
    error_feedback: bool = True
    delta: bool = False
    """Whether the codec codes changes since the last gather; only for gathered parameters."""

    @property
    def spec(self) -> str:
        """Return the spec as text, for `of_parameters`."""
        return f"{DELTA}|{self.codec}" if self.delta else str(self.codec)

    @classmethod
    def of_parameters(cls, spec: str | Codec) -> "Plan":
        """Return the plan for gathered parameters: their values by a codec, or their changes by `delta|codec`.

        Raises ValueError for a wrong spec, TypeError if it is not a string.
        """
        word, bar, rest = spec.partition("|") if isinstance(spec, str) else ("", "", "")
        delta = word.strip() == DELTA
        plan = replace(cls.of(rest if delta and bar else spec, None, False), delta=delta) if bar or not delta else None
        if plan is None or (delta and not plan.codec.lossy):
            raise ValueError(f"spec {spec!r}: delta needs the codec of the changes after it, as in delta|int4")
        return plan

    @classmethod
    def of(cls, spec: str | Codec, exchange: str | None = None, error_feedback: bool = True) -> "Plan":
        """Return the plan for a spec; `exchange=None` takes the one that suits its codec."""
        codec = parse(spec)
        if exchange is None:
            return cls(codec, None, error_feedback)
        chosen = named(exchange)
        if codec.flat != chosen.flat:
            raise ValueError(
                f"exchange={exchange!r}: {codec} needs {codec.exchange}; leave exchange out"
                + ("" if chosen.flat else f", or take a codec of matrices for {chosen.name}, as powersgd(4)")
            )
        if not fits(chosen, codec):
            raise ValueError(
                f"payloads of {codec} cannot be summed, so it cannot use {chosen.name}; leave exchange out"
            )
        return cls(codec, chosen, error_feedback)

    def on(self, ranks: Sequence[int]) -> "Plan":
        """Return the plan for a group of these ranks of the default group. Raises ValueError if its exchange does not fit."""
        return self if self.exchange is None else replace(self, exchange=self.exchange.on(ranks))

    def join(self, wire: Wire) -> None:
        """Make the process groups that the plan's exchange needs. Collective."""
        if self.exchange is not None:
            self.exchange.join(wire)

    def choose(
        self, n: int, itemsize: int, world_size: int, override: Override | None = None, segments: Segments = ()
    ) -> BucketPlan:
        """Return the plan of one bucket of n values of `itemsize` bytes; an optimizer may override it.

        A codec of matrices finds them by the shapes of the `segments`.
        """
        if world_size == 1:
            return BucketPlan(DENSE, ALL_REDUCE, False, "one rank: nothing to send")
        if override is not None:
            if override.reason:
                return BucketPlan(DENSE, NO_EXCHANGE if override.codec is None else ALL_REDUCE, False, override.reason)
            assert override.codec is not None
            # the codec's own exchange, if its payloads cannot be summed
            exchange = self.exchange if self.exchange is None or fits(self.exchange, override.codec) else None
            feedback = self.error_feedback and not override.bypass_feedback
            plan = replace(self, codec=override.codec, exchange=exchange, error_feedback=feedback)
            return plan.choose(n, itemsize, world_size, segments=segments)
        if self.exchange is not None and (reason := self.exchange.idle(world_size)):
            return BucketPlan(DENSE, ALL_REDUCE, False, reason)
        if not self.codec.lossy:
            return BucketPlan(self.codec, self._exchange(world_size), False, SPEC_IS_NONE)
        if n < FEWEST_VALUES:
            return BucketPlan(DENSE, ALL_REDUCE, False, f"fewer than {FEWEST_VALUES} values")
        exchange = self._exchange(world_size).laid_out(n, segments, self.codec)
        least = n * itemsize
        if self.exchange is not None and not exchange.linear:
            least = (
                padded(least) + 1
            )  # 16 bits of bfloat16 gradients save no bytes, but this exchange sums them in float32
        if exchange.nbytes(n, self.codec) >= least:
            return BucketPlan(DENSE, ALL_REDUCE, False, f"payload would be no smaller than {itemsize} bytes a value")
        return BucketPlan(self.codec, exchange, self.error_feedback)

    def _exchange(self, world_size: int) -> Exchange:
        return self.exchange or EXCHANGES[self.codec.exchange].among(world_size)

    def settings(self) -> dict[str, object]:
        """Return the settings that a saved state must share."""
        exchange = None if self.exchange is None else self.exchange.name
        return {"codec": self.spec, "exchange": exchange, "error_feedback": self.error_feedback}


def exact_where_needed(override: Override, x: Tensor, n: int) -> Override:
    """Return the override, or one that sends exactly if there are no values, or none of a float dtype."""
    if n == 0:
        return Override(None, NOTHING_LEFT)
    if not override.reason and override.codec is not None and x.dtype not in FLOAT_DTYPES:
        return Override(override.codec, f"{dtype_name(x.dtype)} is no float")
    return override


def fits(exchange: Exchange, codec: Codec) -> bool:
    """Return whether an exchange can carry a codec's payloads."""
    return exchange.flat == codec.flat and (codec.sum_dtype is not None or not exchange.linear)


def require_flat(codec: Codec, what: str) -> None:
    """Raise ValueError for a codec of matrices; `what` is a sentence that says why flat values are sent here."""
    if not codec.flat:
        raise ValueError(f"{codec} sends whole matrices as factors; {what}; expected another spec, such as int4")


def plans(gradients: str | Codec, parameters: str | Codec, error_feedback: bool) -> tuple[Plan, Plan]:
    """Return the plans of gradients and of parameters. Raises ValueError or TypeError for a spec that cannot be used here."""
    made = []
    for name, spec in (("gradients", gradients), ("parameters", parameters)):
        try:
            made.append(Plan.of(spec, None, error_feedback) if name == "gradients" else Plan.of_parameters(spec))
            require_flat(made[-1].codec, SHARDED)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    if made[1].codec.sparse:
        raise ValueError(
            f"parameters: {made[1].spec} would make most of them 0; expected none, or a codec that sends all values"
        )
    return made[0], made[1]


def sharded_settings(
    gradients: Plan,
    parameters: Plan,
    holds: str,
    by_auto: tuple[bool, bool] = (False, False),
    momentum: str | None = None,
) -> dict[str, object]:
    """Return the settings that saved states of a sharded model must share; `holds` describes what the ranks hold, in words.

    `by_auto` says whether `auto` decides for gradients, and for parameters. `momentum` is the spec of an optimizer's traffic.
    """
    settings: dict[str, object] = {
        "kind": "sharded",
        "gradients": gradients.settings(),
        "parameters": parameters.settings(),
        "holds": holds,
    }
    settings |= {} if momentum is None else {"momentum": momentum}
    return settings | ({"auto": "gradients and parameters" if by_auto[1] else True} if by_auto[0] else {})


def sharded_spec(gradients: Plan, parameters: Plan, by_auto: tuple[bool, bool], momentum: str | None = None) -> str:
    """Return the name of a sharded model's traffic in reports; it is `auto` if `auto` decides for everything compressed."""
    if by_auto[0] and (by_auto[1] or not parameters.codec.lossy):
        return AUTO
    spec = f"gradients {AUTO if by_auto[0] else gradients.codec}, parameters {parameters.spec}"
    return spec if momentum is None else f"momentum {momentum}, {spec}"
