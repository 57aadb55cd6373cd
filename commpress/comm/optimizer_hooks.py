"""The protocol of a compressed optimizer: its methods in the order in which a backward calls them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.plan import Override
from commpress.comm.segments import Segments


@dataclass(frozen=True)
class Candidate:
    """A choice of `auto` with an optimizer: the spec of its traffic, and the steps from one sync of a parameter to the
    next. `sync_every` above 1 is an upper bound if the optimizer's own interval grows: `now` is the present interval."""

    spec: str
    sync_every: int = 1
    now: int = 1

    def __str__(self) -> str:
        return self.spec if self.sync_every == 1 else f"{self.spec} every {self.sync_every}"


class OptimizerHooks(Protocol):
    """The methods of an optimizer of `commpress.optim` that `commpress.comm` calls; it calls no others."""

    may_be_masked: bool
    """Whether a part of a parameter may be left out of the exchange."""
    masks_momentum: bool
    """Whether it clears a rank's momentum where that rank has sent (momentum factor masking)."""

    needs_feedback: bool
    """Whether it needs error feedback, because it sums up the values that arrive."""

    @property
    def awaits_step(self) -> bool:
        """Whether no step has used the values of the last exchange."""

    def begin_backward(self, scale: float) -> bool:
        """Note that a backward starts, whose gradients are multiplied by `scale`. Returns whether a step has used the exchange
        before it."""

    def must_verify(self) -> bool:
        """Whether `replicated_state` has changed since the ranks compared it."""

    def replicated_state(self) -> dict[str, object]:
        """Return the state on which all ranks must agree now, as JSON values."""

    def frozen_parameters(self) -> list[str] | None:
        """Return the names of the parameters that are not trained in this step, or None if the ranks need not compare them."""

    def on_bucket(self, bucket: Tensor, segments: Segments) -> None:
        """Note a bucket that has come; it will hold the exchanged values when backward is over."""

    def needs_all_buckets(self) -> bool:
        """Whether no bucket of this step may be sent before `on_all_buckets` has seen them all."""

    def on_all_buckets(self) -> None:
        """Note that all buckets of this step have come, and that none of them has been sent."""

    def split(self, segments: Segments) -> list[Segments]:
        """Return the parts of a bucket that are sent in this step, each with its own override; the same on every rank."""

    def override(self, segments: Segments, codec: Codec) -> Override:
        """Return the override of a part of a bucket in this step; the same on every rank."""

    def candidates(self) -> Sequence[Candidate]:
        """Return the candidates of `auto` from now on, the gentlest first, which is `none`; the same on every rank.

        Raises TypeError, which lists the specs that may be given, if `auto` cannot choose.
        """

    def take(self, candidate: Candidate) -> None:
        """Follow the choice of `auto` from the step that begins. The session uses the spec, the optimizer the interval."""

    def own_spec(self) -> str | None:
        """Return the spec by which everything is sent in the step that begins, whatever `auto` chose, as in a warm-up; None if
        there is none."""

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the state that is equal on all ranks, as any optimizer does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def load_with_session(self, state_dict: dict[str, Any]) -> None:
        """Restore it as a part of the session's state, which stays if the same is loaded again before the next backward."""

    def own_state(self) -> dict[str, Any]:
        """Return the part of the state that is this rank's own."""

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""
