"""1-bit Adam (Tang et al., arXiv:2102.02888) with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.feedback import Memory
from commpress.comm.plan import Override
from commpress.comm.prologue import Prologue
from commpress.comm.segments import Segments, sizes
from commpress.optim import loops
from commpress.optim.adam import FrozenAdamW
from commpress.optim.adam_state import AdamState
from commpress.optim.base import Parameters

KEPT = ("inverse", "exp_avg")
"""The keys of the state that is combined with every gradient."""


class OneBitAdamW(FrozenAdamW):
    """AdamW whose momentum is sent compressed, by the spec of `attach`: `sign`, `topk(0.1)|sign`, `int4`, ...

    The first `warmup_steps` are AdamW's on mean gradients (None: until the variance has settled, by the paper's test every 1 /
    (1 - beta2) steps). Their means are exact unless `warmup_spec` is `int8` or `int4`. `variance_from` replaces the warm-up by
    the state of torch's Adam or AdamW: that optimizer with the same parameters, or its `state_dict()` (read by name if both
    have names, else by order); then all steps are compressed. After the warm-up the variance is frozen. Each rank sends its
    momentum divided by the root of the variance, with error feedback, and all ranks apply the mean. Replicas hold the same
    bits.

    `max_norm` clips the norm of the mean gradient in the warm-up. After the warm-up no mean gradient exists: each rank clips
    its own gradient to max_norm sqrt(W) before it is sent, and no bucket is sent before backward is over.

    Differences from the paper: the momentum is coded after the division by the root of the variance, not before it; Adam's
    bias is corrected; a single gradient is bounded (`commpress/optim/adam.py` says why). Raises ValueError for a setting out of
    range, and for a `variance_from` that does not fit (`commpress/optim/adam_state.py` says when).
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        warmup_steps: int | None = None,
        warmup_spec: str = "none",
        max_norm: float | None = None,
        variance_from: AdamState | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, warmup_steps, warmup_spec, max_norm, variance_from)

    def _forget(self) -> None:
        super()._forget()
        self._flat_states: dict[Segments, tuple[Tensor, Tensor]] = {}
        """`inverse` and `exp_avg` of each bucket, float32 [n] each; the tensors in the state are views of them."""

    def override_frozen(self, segments: Segments, codec: Codec) -> Override:
        """Return an override that sends beta1 n + (1 - beta1) g / d, multiplied by the loss scale as the gradients are."""
        held = [(self.state[p], group) for p, group in (self._places[segment.name] for segment in segments)]
        first, alike = held[0][1], len({group["betas"][0] for _, group in held}) == 1
        if alike and all(state["inverse"].dtype == torch.float32 for state, _ in held):
            prologue = self._prologue(*self._flat_state(segments), first)  # in the pass that encodes
        else:
            prologue = None

        def prepare(bucket: Tensor, memory: Memory) -> Prologue | None:
            self.convert_feedback(memory, segments)
            self.clip(bucket)
            if prologue is None:
                for (state, group), part in zip(held, bucket.split(sizes(segments)), strict=True):
                    inverse, average = loops.flat(state["inverse"], state["exp_avg"])
                    self._prologue(inverse, average, group).apply(part)
            return prologue

        return Override(codec, prepare=prepare)

    def _prologue(self, inverse: Tensor, average: Tensor, group: dict[str, Any]) -> Prologue:
        beta1 = group["betas"][0]
        return Prologue(inverse, average, self.limit(group) * self._scale, 1 - beta1, beta1 * self._scale)

    def _flat_state(self, segments: Segments) -> tuple[Tensor, Tensor]:
        """Return the state of a bucket's parameters, moved to contiguous memory, in the order of their gradients."""
        parts, total = [], 0
        for segment in segments:
            parts.append((self._places[segment.name][0], total))
            total += segment.n
        found = self._flat_states.get(segments)
        if found is None or any(
            p.numel() and self.state[p][key].data_ptr() != whole[at:].data_ptr()
            for key, whole in zip(KEPT, found, strict=True)
            for p, at in parts
        ):
            names = {segment.name for segment in segments}
            self._flat_states = {
                of: kept for of, kept in self._flat_states.items() if names.isdisjoint(segment.name for segment in of)
            }
            inverse, average = (torch.empty(total, dtype=torch.float32, device=parts[0][0].device) for _ in KEPT)
            found = self._flat_states[segments] = inverse, average
            for key, whole in zip(KEPT, found, strict=True):
                for p, at in parts:
                    place = whole.as_strided(p.shape, p.stride(), at)
                    self.state[p][key] = place.copy_(self.state[p][key])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._flat_states = {}

    def apply_frozen(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        for p, group, update in updates.values():
            if update is None:
                continue
            state, lr = self.state[p], float(group["lr"])
            loops.apply_update(p, update, state["exp_avg"], 1 - lr * group["weight_decay"], lr / group["unit"])

    def frozen_state(self, name: str) -> None:
        del self.state[self._places[name][0]]["exp_avg_sq"]  # has become `inverse`
