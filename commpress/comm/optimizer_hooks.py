"""The protocol of a compressed optimizer: its calls in the order of a backward."""

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
    """The methods of an optimizer of `commpress.optim` that `comm` calls; it knows no others."""

    may_be_masked: bool
    """Whether a part of a parameter may be left out of the exchange."""
    masks_momentum: bool
    """Whether it clears a rank's momentum where that rank has sent (momentum factor masking)."""

    needs_feedback: bool
    """Whether what a lossy codec withholds must be remembered: it sums up what arrives."""

    @property
    def awaits_step(self) -> bool:
        """Whether what was exchanged last has not been used."""

    def begin_backward(self, scale: float) -> bool:
        """Backward starts, its gradients multiplied by `scale`. Returns whether the exchange before this one was used."""

    def must_verify(self) -> bool:
        """Whether `replicated_state` is new since the ranks compared it."""

    def replicated_state(self) -> dict[str, object]:
        """Return what all ranks must agree on now, as JSON values."""

    def frozen_parameters(self) -> list[str] | None:
        """Return what does not require a gradient in this step, if the ranks must compare that in every step."""

    def on_bucket(self, bucket: Tensor, segments: Segments) -> None:
        """A bucket is there. It will hold what was exchanged when backward is over."""

    def needs_all_buckets(self) -> bool:
        """Whether no bucket of this step may be sent before `on_all_buckets` has seen them all."""

    def on_all_buckets(self, gradients: list[Tensor]) -> None:
        """All buckets of this step are there."""

    def split(self, segments: Segments) -> list[Segments]:
        """The parts of a bucket that travel in this step, each with an override of its own; the same on every rank."""

    def override(self, segments: Segments, codec: Codec) -> Override:
        """Return what to do with a part of a bucket in this step; the same on every rank."""

    def candidates(self) -> Sequence[Candidate]:
        """Return what `auto` may choose from now on, the gentlest first, which is `none`; the same on every rank.

        Raises TypeError, with the specs that may be given, if `auto` cannot choose.
        """

    def take(self, candidate: Candidate) -> None:
        """Go on as `auto` has chosen. The spec is the session's to use."""

    def own_spec(self) -> str | None:
        """Return the spec by which all goes in the step that begins, whatever `auto` has chosen, as in a warm-up; None if there
        is none."""

    def state_dict(self) -> dict[str, Any]:
        """Return what of its state all ranks have alike, as of any optimizer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def own_state(self) -> dict[str, Any]:
        """Return what of its state is this rank's own."""

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""
