"""1-bit Adam (Tang et al., arXiv:2102.02888) with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

from typing import Any

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.feedback import Memory, Segments
from commpress.comm.plan import Treatment
from commpress.optim import loops
from commpress.optim.adam import FrozenAdamW
from commpress.optim.base import Parameters


class OneBitAdamW(FrozenAdamW):
    """AdamW whose momentum is what travels, coded by the spec of `attach`: `sign`, `topk(0.1)|sign`, `int4`, ...

    `warmup_steps` of AdamW on mean gradients come first, or as many as it takes until the variance has settled (None: the
    paper's test, every 1 / (1 - beta2) steps). They are exact, unless `warmup_spec` says `int8` or `int4`.
    Then the variance is frozen; each rank sends, with error feedback, what its momentum over the root of the variance would
    be, and all apply the mean. Replicas hold the same bits.

    `max_norm` clips the mean gradient's norm in the warm-up. After it there is no mean gradient: each rank clips its own, to
    max_norm sqrt(W), before it is sent, and no bucket is sent before backward is over.

    Differs from the paper: what is coded is the momentum over the root of the variance, not the momentum before it; Adam's
    bias is corrected; a single gradient is bounded (`commpress/optim/adam.py` says why). Raises ValueError for a setting
    out of range.
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
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, warmup_steps, warmup_spec, max_norm)

    def treat_frozen(self, segments: Segments, codec: Codec) -> Treatment:
        def prepare(bucket: Tensor, memory: Memory) -> None:
            self.settle(memory, segments)
            self.blend(bucket, segments)

        return Treatment(codec, prepare=prepare)

    def apply_frozen(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        for p, group, update in updates.values():
            if update is None:
                continue
            state, lr = self.state[p], float(group["lr"])
            loops.advance(p, update, state["exp_avg"], 1 - lr * group["weight_decay"], lr / group["unit"])

    def _freeze(self) -> None:
        super()._freeze()
        for p, _ in self._places.values():
            del self.state[p]["exp_avg_sq"]  # has become `inverse`
