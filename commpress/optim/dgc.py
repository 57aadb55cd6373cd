"""Deep Gradient Compression (Lin et al., arXiv:1712.01887): SGD with momentum under a sparse codec.

If momentum were applied after a sparse exchange, a delayed gradient would count as a new one. So each rank keeps the momentum
of its own gradients and sends that, with error feedback (momentum correction):

    u <- momentum u + g + wd p        sent: Q(u + residual)        p <- p - lr mean of what was sent

Where a rank has sent, its u starts again at 0 (momentum factor masking), so that an old momentum does not push the wrong way.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.feedback import Memory
from commpress.comm.optimizer_hooks import Candidate
from commpress.comm.plan import DENSE, Override
from commpress.comm.ratio_warmup import stage
from commpress.comm.segments import Segments, sizes
from commpress.optim import loops
from commpress.optim.base import CompressedOptimizer, Parameters
from commpress.optim.settings import require_in_range
from commpress.optim.uncompressed import step_sgd

SPECS = ("none", "int4", "topk(0.01)", "topk(0.001)")
"""The specs that `auto` may choose, the gentlest first. With `topk(0.01)` and `topk(0.001)` the net of
benchmarks/convergence.py ended within the spread of SGD's seeds; `int4` gradients keep the loss under any optimizer."""


class DGC(CompressedOptimizer):
    """SGD with momentum for sparse specs: `commpress.attach(ddp_model, "topk(0.001)", optimizer=DGC(...))`.

    During `warmup_steps` a `topk(r)` keeps 1/4, 1/16, ... of the values down to r, each for a fifth of these steps, as in
    section 3.3; any other codec sends exact means there. Codecs that send every value have no factor masking. `weight_decay`
    is SGD's, added to the gradient. `max_norm` clips each rank's gradient to max_norm sqrt(W) before it is sent; then no
    bucket is sent before backward is over. Raises ValueError for a setting out of range.
    """

    masks_momentum = True
    may_be_masked = False  # masks would not fit the places at which factor masking clears momenta
    shared = ("max_norm", "warmup_steps", "steps")

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        warmup_steps: int = 0,
        max_norm: float | None = None,
    ) -> None:
        require_in_range("lr", float(lr), 0)
        require_in_range("momentum", momentum, 0, 1)
        require_in_range("weight_decay", weight_decay, 0)
        require_in_range("warmup_steps", warmup_steps, 0)
        settings = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, **settings, "warmup_steps": warmup_steps, "steps": 0}, max_norm)

    def needs_all_buckets(self) -> bool:
        return self.param_groups[0]["max_norm"] is not None

    def candidates(self) -> Sequence[Candidate]:
        """Return `SPECS`."""
        return [Candidate(spec) for spec in SPECS]

    def own_spec(self) -> str | None:
        """Return `none` in the warm-up: `auto` has no ratio yet."""
        return "none" if self.param_groups[0]["steps"] < self.param_groups[0]["warmup_steps"] else None

    def override_held(self, segments: Segments, codec: Codec) -> Override:
        def prepare(bucket: Tensor, memory: Memory) -> None:
            assert memory.momentum is not None
            self.clip(bucket)
            split = sizes(segments)
            parts = zip(segments, bucket.split(split), memory.momentum.split(split), strict=True)
            for segment, part, momentum in parts:
                p, group = self._places[segment.name]
                decay = group["weight_decay"] * self._scale
                loops.momentum_correction(part, momentum, p, group["momentum"], decay, group["nesterov"])

        steps, warm_up = (self.param_groups[0][k] for k in ("steps", "warmup_steps"))
        if steps >= warm_up or not codec.lossy:
            return Override(codec, prepare=prepare, momentum=True, masks_momentum=True)
        if not codec.sparse:
            return Override(DENSE, "momentum warms up", prepare, momentum=True, masks_momentum=True)
        ratio = 0.25 ** (1 + stage(steps, warm_up))
        return Override(codec.keeping(ratio), prepare=prepare, momentum=True, masks_momentum=True)

    def apply(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        for p, group, update in updates.values():
            if update is not None:
                p.add_(update, alpha=-float(group["lr"]))
        for group in self.param_groups:
            group["steps"] += 1

    def step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        step_sgd(parameters, group, self.state)
