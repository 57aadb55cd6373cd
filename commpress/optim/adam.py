"""AdamW that freezes its variance after a warm-up: what 1-bit Adam and 0/1 Adam have in common.

While it warms up it is AdamW on mean gradients. Then d = sqrt(v) + eps stands, and with it Adam is linear:

    n <- beta1 n + (1 - beta1) g / d        p <- p - lr n

The ranks send n, not the momentum m = n d of the papers: coded in blocks, coordinates of any variance are then of one size,
feedback stays exact when d changes, and a coordinate that never had a gradient cannot be thrown out by its neighbours' noise.

No gradient g / d counts for more than 2 sqrt(W): Adam's own variance holds the gradient itself and so bounds it, a frozen one
does not; the gradient of one of W ranks is up to sqrt(W) times as noisy as their mean. (A GPT of 0.9 M parameters, two ranks,
`sign`, 500 steps of which 75 warm up; held-out loss of dense AdamW 2.052, with bounds of 1.0 to 1000 times the root:
1.0 2.127, 1.4 2.089, 2.0 2.079, 3.0 2.077, 6.3 2.096, 1000 2.122; between seeds about 0.02.)
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from commpress.comm.codecs import Codec, parse
from commpress.comm.codecs.base import warm_up
from commpress.comm.feedback import Memory, Segments
from commpress.comm.plan import Treatment
from commpress.optim import loops
from commpress.optim.base import CompressedOptimizer, Parameters, within

SETTLED = 0.96
"""The variance has settled when its sum changes by less than this ratio in 1 / (1 - beta2) steps (1-bit Adam, section 7.1)."""


class FrozenAdamW(CompressedOptimizer):
    """`warmup_steps` of AdamW, or as many as it takes until the variance has settled (None).

    State of a parameter: as AdamW's `step`, `exp_avg`, `exp_avg_sq` in the warm-up; then `exp_avg` is n in units of `unit`, a
    power of two that gives it about the size of the momentum, and `inverse` is unit / d.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        warmup_steps: int | None,
        warmup_spec: str,
        max_norm: float | None,
    ) -> None:
        within("lr", float(lr), 0)
        within("betas[0]", betas[0], 0, 1)
        within("betas[1]", betas[1], 0, 1)
        within("eps", eps, 0)
        within("weight_decay", weight_decay, 0)
        if warmup_steps is not None:
            within("warmup_steps", warmup_steps, 1)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"warmup_steps": warmup_steps, "warmup_spec": str(parse(warmup_spec))}
        # these four are the optimizer's, not a group's; here they are saved with the groups
        super().__init__(params, {**defaults, "steps": 0, "frozen_at": 0, "unit": 1.0, "variance": 0.0}, max_norm)

        self._settling: list[dict[str, Any]] = []
        self.add_up: Callable[[Tensor], None] = lambda total: None
        """Makes the sum over this rank's state that over all, in place, where the ranks hold partitions of it."""

    def bind(self, parameters: dict[str, Tensor], world_size: int, may_be_unused: bool) -> None:
        super().bind(parameters, world_size, may_be_unused)
        warm_up(parse(self.param_groups[0]["warmup_spec"]), next(iter(parameters.values())).device)

    def start(self, scale: float) -> bool:
        self._settling = []
        return super().start(scale)

    @property
    def takes_means(self) -> bool:
        return not self.frozen

    @property
    def frozen(self) -> bool:
        """Whether the warm-up is over."""
        return bool(self.param_groups[0]["frozen_at"])

    def waits(self) -> bool:
        return self.frozen and self.param_groups[0]["max_norm"] is not None

    def phase(self) -> object:
        return self.param_groups[0]["frozen_at"]

    def standing(self) -> dict[str, object]:
        total = 0
        for p, _ in self._places.values():
            if (kept := self.state.get(p, {}).get("inverse")) is not None:
                total += int(loops.flat(kept)[0].view(torch.uint8).sum(dtype=torch.int64))
        return {**super().standing(), "frozen variance (sum of its bytes)": total}

    def treat(self, segments: Segments, codec: Codec) -> Treatment:
        if not self.frozen:
            codec = parse(self.param_groups[0]["warmup_spec"])
            return Treatment(codec, "" if codec.lossy else "the variance warms up")
        return self.treat_frozen(segments, codec)

    @abstractmethod
    def treat_frozen(self, segments: Segments, codec: Codec) -> Treatment:
        """What to do with a bucket after the warm-up."""

    def apply(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        if self.frozen:
            self.apply_frozen(updates)
            for state in self._settling:
                state["settled"] = True
        else:
            self._apply_warm_up(updates)
        for group in self.param_groups:
            group["steps"] += 1
        if not self.frozen and self._is_settled():
            self._freeze()

    @abstractmethod
    def apply_frozen(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        """A step after the warm-up."""

    def limit(self, group: dict[str, Any]) -> float:
        """The most that one gradient counts for, in units of n."""
        unit: float = group["unit"]
        return 2 * unit * math.sqrt(self._world_size)

    def _apply_warm_up(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        if (most := self.param_groups[0]["max_norm"]) is not None:
            torch.nn.utils.clip_grad_norm_([p for p, _, _ in updates.values()], most)
        for group in self.param_groups:
            mine = [(p, p.grad) for p, of, _ in updates.values() if of is group and p.grad is not None]
            if not mine:
                continue
            parameters, gradients = [p for p, _ in mine], [g for _, g in mine]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            kept = [[self.state[p][k] for p in parameters] for k in ("exp_avg", "exp_avg_sq", "step")]
            beta1, beta2 = group["betas"]
            settings = {k: group[k] for k in ("lr", "weight_decay", "eps")}
            adamw(
                parameters,
                gradients,
                kept[0],
                kept[1],
                [],
                kept[2],
                fused=parameters[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                **settings,
            )

    def _is_settled(self) -> bool:
        first = self.param_groups[0]
        if first["warmup_steps"] is not None:
            return bool(first["steps"] >= first["warmup_steps"])
        if first["steps"] % max(1, round(1 / (1 - first["betas"][1]))):
            return False
        sums = [loops.total(s["exp_avg_sq"]) for s in self.state.values() if s]
        total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device="cpu")
        self.add_up(total)
        now = float(total)
        least, most = sorted((float(first["variance"]), now))
        for group in self.param_groups:
            group["variance"] = now
        return least > 0 and least >= SETTLED * most

    def _freeze(self) -> None:
        """d from now on, n from the momentum so far, both without Adam's bias."""
        squares = [0.0, 0.0]
        for p, group in self._places.values():
            state = self.state[p]
            if not state:  # had no gradient yet
                state |= {"step": torch.zeros((), dtype=torch.float32, device=p.device), "exp_avg": torch.zeros_like(p)}
                state["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            steps = max(1.0, float(state["step"]))
            mean = state["exp_avg"] / (1 - beta1**steps)
            state["inverse"] = self.inverse(state["exp_avg_sq"] / (1 - beta2**steps), group)
            state["exp_avg"] = mean * state["inverse"]
            state["settled"] = False
            squares[0] += float(loops.total(mean.square()))
            squares[1] += float(loops.total(state["exp_avg"].square()))
        unit = 2.0 ** round(0.5 * math.log2(squares[0] / squares[1])) if min(squares) > 0 else 1.0
        for p, _ in self._places.values():
            self.state[p]["inverse"] *= unit
            self.state[p]["exp_avg"] *= unit
        for group in self.param_groups:
            group["unit"], group["frozen_at"] = unit, group["steps"]

    def inverse(self, variance: Tensor, group: dict[str, Any]) -> Tensor:
        """1 / d of a variance without bias. Where there has been no gradient, d is the tensor's own mean size."""
        root = variance.sqrt()
        mean = math.sqrt(loops.total(variance) / variance.numel())
        scaled: Tensor = 1 / (torch.where(root > 0, root, mean) + group["eps"])
        return scaled

    def settle(self, memory: Memory, segments: Segments) -> None:
        """At its first exchange after the warm-up: what feedback kept of a parameter's gradients becomes what it keeps of n."""
        states = [self.state[self._places[name][0]] for name, _ in segments]
        if all(state["settled"] for state in states):
            return
        if memory.residual is not None:
            memory.fold(self._world_size)
            factors = torch.cat(
                [
                    torch.ones(n, dtype=torch.float32, device=memory.residual.device)
                    if state["settled"]
                    else loops.flat(state["inverse"])[0] * (1 - self._places[name][1]["betas"][0])
                    for (name, n), state in zip(segments, states, strict=True)
                ]
            )
            memory.residual.mul_(factors if memory.places is None else factors[memory.places])
        self.settles(states)

    def settles(self, states: list[dict[str, Any]]) -> None:
        """Feedback of these parameters is of n from now on, once the step is applied; one that is skipped changes nothing."""
        self._settling += states
