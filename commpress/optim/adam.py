"""AdamW that freezes its variance after a warm-up: the common part of 1-bit Adam and 0/1 Adam.

During the warm-up it is AdamW on mean gradients. Then d = sqrt(v) + eps is frozen, and Adam is linear:

    n <- beta1 n + (1 - beta1) g / d        p <- p - lr n

The ranks send n, not the momentum m = n d of the papers. In n, coordinates of any variance have about one size, which suits a
code with one scale a block. Feedback stays exact when d changes. And the noise of a block cannot throw out a coordinate that
never had a gradient.

A gradient g / d is clipped to 2 sqrt(W). Adam's own variance contains the gradient and so bounds it, a frozen variance does
not, and the gradient of one of W ranks is up to sqrt(W) times as noisy as their mean. (A GPT of 0.9 M parameters, two ranks,
`sign`, 500 steps with a warm-up of 75. Held-out loss of dense AdamW: 2.052. With a bound of 1.0 times sqrt(W): 2.127; 1.4:
2.089; 2.0: 2.079; 3.0: 2.077; 6.3: 2.096; 1000: 2.122. Seeds differ by about 0.02.)

A run that AdamW has trained so far already has a variance: `variance_from` freezes that one, and there is no warm-up.

A parameter that joins later, or had few gradients during the warm-up, has a warm-up of its own: AdamW on exact means, for as
many steps in which it has a gradient. So a layer that is unfrozen in the middle of a training learns its variance first.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec, parse
from commpress.comm.coding import warm_up
from commpress.comm.feedback import Memory
from commpress.comm.optimizer_hooks import Candidate
from commpress.comm.plan import Override, require_flat
from commpress.comm.segments import Segments
from commpress.optim import loops
from commpress.optim.adam_state import AdamState, adam_states
from commpress.optim.base import CompressedOptimizer, Parameters
from commpress.optim.settings import require_in_range
from commpress.optim.uncompressed import step_adamw

SETTLED = 0.96
"""The variance has settled when its sum changes by less than this ratio in 1 / (1 - beta2) steps (1-bit Adam, section 7.1)."""
SPECS = ("none", "int4", "sign", "topk(0.1)|sign")
"""The specs that `auto` may choose, the gentlest first. With `sign` and `topk(0.1)|sign` a GPT of 0.9 M parameters ended 0.7
and 1.0 % above AdamW's loss after 1,500 steps (benchmarks/convergence.py, three seeds); `int4` is finer than `sign`. Sparser
specs are left out: `topk(0.03)|sign` every 8 steps ended 3 % above it, and `topk(0.01)` higher."""


class FrozenAdamW(CompressedOptimizer):
    """AdamW for `warmup_steps` steps (None: until the variance has settled), then with a frozen variance.

    State of a parameter in the warm-up: AdamW's `step`, `exp_avg`, `exp_avg_sq`. After it `exp_avg` is n in units of `unit`, a
    power of two that gives it about the size of the momentum, and `inverse` is unit / d. `warmed` counts the steps of a
    parameter's own warm-up, `variance` is the sum of its variance at the last check, and `idle` says that no rank had a
    gradient of it. `given` marks a state from `variance_from`, until the first backward that exchanges the parameter.
    """

    shared: tuple[str, ...] = ("max_norm", "warmup_spec", "steps", "frozen_at", "unit", "variance")

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
        variance_from: AdamState | None,
    ) -> None:
        require_in_range("lr", float(lr), 0)
        require_in_range("betas[0]", betas[0], 0, 1)
        require_in_range("betas[1]", betas[1], 0, 1)
        require_in_range("eps", eps, 0)
        require_in_range("weight_decay", weight_decay, 0)
        if warmup_steps is not None:
            require_in_range("warmup_steps", warmup_steps, 1)
            if variance_from is not None:
                raise ValueError(
                    f"warmup_steps {warmup_steps} and variance_from: expected one of them; with a variance nothing warms up"
                )
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        require_flat(parse(warmup_spec), f"warmup_spec of {type(self).__name__} is for flat gradients")
        defaults |= {"warmup_steps": warmup_steps, "warmup_spec": str(parse(warmup_spec))}
        super().__init__(params, {**defaults, "steps": 0, "frozen_at": 0, "unit": 1.0, "variance": 0.0}, max_norm)
        if variance_from is not None:
            self._take(adam_states(variance_from, self.param_groups))

    def _take(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Start from AdamW's states, whose steps count as the warm-up. The parameters may still change before a backward."""
        steps = max(int(state["step"]) for state in states.values())
        for p, state in states.items():
            self.state[p] = {**state, "given": True}
        for group in [self.defaults, *self.param_groups]:
            group |= {"steps": steps, "frozen_at": steps}

    def _forget(self) -> None:
        super()._forget()
        self._settling: list[dict[str, Any]] = []
        self.add_up: Callable[[Tensor], None] = lambda total: None
        """Adds up a sum over all ranks, in place, if each rank holds a partition of the state."""
        self.ends_at_once = False
        """Whether the warm-up ends for all parameters at once, however few gradients they had."""

    def bind(self, parameters: dict[str, Tensor], world_size: int, may_be_unused: bool, **more: bool) -> None:
        super().bind(parameters, world_size, may_be_unused, **more)
        warm_up(parse(self.param_groups[0]["warmup_spec"]), next(iter(parameters.values())).device)

    def begin_backward(self, scale: float) -> bool:
        self._settling = []
        used = super().begin_backward(scale)
        if given := [name for name, (p, _) in self._places.items() if self.state.get(p, {}).pop("given", False)]:
            self._freeze(given, first=not any("inverse" in state for state in self.state.values()))
        return used

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.came_with_session(state_dict):
            super().load_state_dict(state_dict)

    @property
    def takes_means(self) -> bool:
        return not self.frozen

    @property
    def frozen(self) -> bool:
        """Whether the warm-up is over."""
        return bool(self.param_groups[0]["frozen_at"])

    def awaits_freezing(self) -> bool:
        """Return whether it has a state from `variance_from` and no backward has exchanged the parameters since."""
        return any("given" in state for state in self.state.values())

    def needs_all_buckets(self) -> bool:
        return self.frozen and self.param_groups[0]["max_norm"] is not None

    def candidates(self) -> Sequence[Candidate]:
        """Return `SPECS`."""
        return [Candidate(spec) for spec in SPECS]

    def own_spec(self) -> str | None:
        return str(self.param_groups[0]["warmup_spec"]) if self.takes_means else None

    def phase(self) -> object:
        return self.param_groups[0]["frozen_at"], self._warming()

    def replicated_state(self) -> dict[str, object]:
        total = 0
        for p, _ in self._places.values():
            if (kept := self.state.get(p, {}).get("inverse")) is not None:
                total += int(loops.flat(kept)[0].view(torch.uint8).sum(dtype=torch.int64))
        warming = {"parameters that warm up": sorted(self._warming())} if self.frozen else {}
        return {"frozen variance (sum of its bytes)": total, **super().replicated_state(), **warming}

    def kind(self, name: str) -> object:
        state = self.state.get(self._places[name][0], {})
        if "inverse" in state:
            return "frozen"
        return "idle" if state.get("idle") else "warms up"

    def override_held(self, segments: Segments, codec: Codec) -> Override:
        kind = FrozenAdamW.kind(self, segments[0].name)
        if kind == "frozen":
            return self.override_frozen(segments, codec)
        if kind == "idle":  # its first gradients are coded coarsely; feedback sends the rest later
            return Override(codec)
        codec = parse(self.param_groups[0]["warmup_spec"])
        return Override(codec, "" if codec.lossy else "the variance warms up")

    @abstractmethod
    def override_frozen(self, segments: Segments, codec: Codec) -> Override:
        """Return what to do with parameters whose warm-up is over."""

    def apply(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        frozen = {name: update for name, update in updates.items() if "inverse" in self.state.get(update[0], {})}
        warming = {name: update for name, update in updates.items() if name not in frozen}
        if frozen:
            self.apply_frozen(frozen)
            for state in self._settling:
                state["feedback_converted"] = True
        self._apply_warm_up(warming)
        for group in self.param_groups:
            group["steps"] += 1
        if self.frozen:
            self._freeze(self._are_ready(warming))
        elif self._is_settled():
            self._end_warm_up()

    def step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if "inverse" in self.state[p]:  # was exchanged before
                self.state[p] = self._thawed(self.state[p], group)
            if p.grad is not None and p.grad.is_sparse:
                raise TypeError(
                    f"{type(self).__name__}: a gradient of shape {tuple(p.shape)} is sparse, expected a dense one"
                )
        step_adamw(parameters, group, self.state)

    @abstractmethod
    def apply_frozen(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        """Take a step after the warm-up; `updates` are as in `apply`."""

    def limit(self, group: dict[str, Any]) -> float:
        """Return the bound to which one gradient is clipped, in units of n."""
        unit: float = group["unit"]
        return 2 * unit * math.sqrt(self._world_size)

    def _warming(self) -> frozenset[str]:
        """Return the names of the exchanged parameters whose variance is not frozen yet."""
        return frozenset(name for name, (p, _) in self._places.items() if "inverse" not in self.state.get(p, {}))

    def _apply_warm_up(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        used = {name: (p, group) for name, (p, group, _) in updates.items() if p.grad is not None}
        if (most := self.param_groups[0]["max_norm"]) is not None and used:
            torch.nn.utils.clip_grad_norm_([p for p, _ in used.values()], most)
        for group in self.param_groups:
            if mine := [p for p, of in used.values() if of is group]:
                step_adamw(mine, group, self.state, fused=True)
        if self.frozen and updates:
            silent = self._without_gradient([p for p, _, _ in updates.values()])
            for (p, _, _), idle in zip(updates.values(), silent, strict=True):
                self.state[p]["idle"] = idle
                self.state[p]["warmed"] = self.state[p].get("warmed", 0) + (not idle)

    @staticmethod
    def _without_gradient(parameters: list[Tensor]) -> list[bool]:
        """Return for each parameter whether no rank had a gradient of it in this step: `grad` is None or 0."""
        found = [
            torch.zeros((), dtype=torch.bool, device=p.device) if p.grad is None else p.grad.any() for p in parameters
        ]
        silent: list[bool] = torch.stack(found).logical_not().tolist()
        return silent

    def _is_settled(self) -> bool:
        first = self.param_groups[0]
        if first["warmup_steps"] is not None:
            return bool(first["steps"] >= first["warmup_steps"])
        if first["steps"] % self._period(first):
            return False
        total = self._sum_of_variances([p for p, _ in self._places.values()])
        self.add_up(total)
        now = float(total)
        before = float(first["variance"])
        for group in self.param_groups:
            group["variance"] = now
        return variance_is_stable(before, now)

    def _are_ready(self, warming: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> list[str]:
        """Return the names whose own warm-up is over. Parameters that began it together end it together."""
        ready: list[str] = []
        cohorts: dict[int, list[str]] = {}
        for name, (p, group, _) in warming.items():
            state = self.state[p]
            if state["idle"]:
                continue
            if group["warmup_steps"] is None:
                if state["warmed"] % self._period(group) == 0:
                    cohorts.setdefault(state["warmed"], []).append(name)
            elif state["warmed"] >= group["warmup_steps"]:
                ready.append(name)
        for names in cohorts.values():
            states = [self.state[self._places[name][0]] for name in names]
            before = sum(state.get("variance", 0.0) for state in states)
            now = [float(loops.total(state["exp_avg_sq"])) for state in states]
            if variance_is_stable(before, sum(now)):
                ready += names
            for state, value in zip(states, now, strict=True):
                state["variance"] = value
        return ready

    @staticmethod
    def _period(group: dict[str, Any]) -> int:
        """Return the number of steps between two checks of the variance."""
        return max(1, round(1 / (1 - float(group["betas"][1]))))

    def _sum_of_variances(self, parameters: list[Tensor]) -> Tensor:
        sums = [loops.total(self.state[p]["exp_avg_sq"]) for p in parameters if "exp_avg_sq" in self.state.get(p, {})]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device="cpu")

    def _end_warm_up(self) -> None:
        """Freeze the variance of all parameters that had a gradient in half of the steps; the others go on warming up."""
        steps = self.param_groups[0]["steps"]
        for group in self.param_groups:
            group["frozen_at"] = steps
        ready = []
        for name, (p, _) in self._places.items():
            state = self.state[p]
            if "step" not in state and self.ends_at_once:
                state |= {"step": torch.zeros((), dtype=torch.float32, device=p.device), "exp_avg": torch.zeros_like(p)}
                state["exp_avg_sq"] = torch.zeros_like(p)
            count = int(state["step"]) if "step" in state else 0
            learnt = p.requires_grad and 2 * count >= steps and bool(state["exp_avg_sq"].any())
            if self.ends_at_once or learnt:
                ready.append(name)
            else:
                state["warmed"], state["idle"] = count, p.requires_grad and self._without_gradient([p])[0]
        self._freeze(ready, first=True)

    def _freeze(self, names: list[str], first: bool = False) -> None:
        """Freeze d, and turn the momentum into n, both without Adam's bias. The first call chooses the unit."""
        squares = [0.0, 0.0]
        for name in names:
            p, group = self._places[name]
            state, (beta1, beta2) = self.state[p], group["betas"]
            steps = max(1.0, float(state["step"]))
            mean = state["exp_avg"] / (1 - beta1**steps)
            state["inverse"] = self.inverse(state["exp_avg_sq"] / (1 - beta2**steps), group)
            state["exp_avg"] = mean * state["inverse"]
            state["feedback_converted"] = False
            if first:
                squares[0] += float(loops.total(mean.square()))
                squares[1] += float(loops.total(state["exp_avg"].square()))
        if first:
            unit = 2.0 ** round(0.5 * math.log2(squares[0] / squares[1])) if min(squares) > 0 else 1.0
            for group in self.param_groups:
                group["unit"] = unit
        for name in names:
            p, group = self._places[name]
            state = self.state[p]
            state["inverse"] *= group["unit"]
            state["exp_avg"] *= group["unit"]
            for key in ("idle", "warmed", "variance"):
                state.pop(key, None)
            self.frozen_state(name)

    @abstractmethod
    def frozen_state(self, name: str) -> None:
        """Change the state of a parameter whose variance has just been frozen, as the optimizer needs it."""

    def _thawed(self, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """Return AdamW's state, made from one with a frozen variance."""
        steps, (beta1, beta2) = max(1.0, float(state["step"])), group["betas"]
        root = (group["unit"] / state["inverse"] - group["eps"]).clamp_(min=0)
        return {
            "step": state["step"].cpu(),
            "exp_avg": state["exp_avg"] / state["inverse"] * (1 - beta1**steps),
            "exp_avg_sq": root.square() * (1 - beta2**steps),
        }

    def inverse(self, variance: Tensor, group: dict[str, Any]) -> Tensor:
        """Return 1 / d of a variance without bias. Where there has been no gradient, d is the tensor's mean of d."""
        root = variance.sqrt()
        mean = math.sqrt(loops.total(variance) / variance.numel())
        scaled: Tensor = 1 / (torch.where(root > 0, root, mean) + group["eps"])
        return scaled

    def convert_feedback(self, memory: Memory, segments: Segments) -> None:
        """Convert a parameter's residual, which is of gradients, into one of n, at its first exchange after its warm-up."""
        states = [self.state[self._places[segment.name][0]] for segment in segments]
        if all(state["feedback_converted"] for state in states):
            return
        factors = [
            1.0
            if state["feedback_converted"]
            else loops.flat(state["inverse"])[0] * (1 - self._places[segment.name][1]["betas"][0])
            for segment, state in zip(segments, states, strict=True)
        ]
        self.scale_feedback(memory, segments, factors)
        self.mark_converted(states)

    def scale_feedback(self, memory: Memory, segments: Segments, factors: Sequence[Tensor | float]) -> None:
        """Multiply the residual of each parameter by a number, or value by value by a float32 [n]."""
        memory.fold(self._world_size)
        if memory.residual is None:
            return
        device = memory.residual.device
        parts = [
            factor if isinstance(factor, Tensor) else torch.full((part.n,), factor, dtype=torch.float32, device=device)
            for part, factor in zip(segments, factors, strict=True)
        ]
        whole = torch.cat(parts)
        memory.residual.mul_(whole if memory.kept_index is None else whole[memory.kept_index])

    def mark_converted(self, states: list[dict[str, Any]]) -> None:
        """Note that the residuals of these parameters are of n now. It holds once the step is applied, not if it is skipped."""
        self._settling += states


def variance_is_stable(before: float, now: float) -> bool:
    """Whether the sum of a variance has changed little from one check to the next."""
    least, most = sorted((before, now))
    return least > 0 and least >= SETTLED * most
