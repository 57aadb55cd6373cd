"""0/1 Adam (Lu et al., arXiv:2202.06009) with decoupled weight decay: local steps between syncs.

After the warm-up every rank steps on its own gradients and adds up its updates. `anchor` holds the values of the last sync, the
same on all ranks:

    u <- (1 - lr wd) u + lr n        p = decay anchor - u        decay <- (1 - lr wd) decay, weight likewise as u for n = 1

A sync sends u / weight, the mean n since the last sync. All ranks continue from decay * anchor - weight * (mean over ranks).

In the paper n also becomes that mean over the ranks. It lags behind: the last gradient counts only as one of the interval's
steps. Here each rank adds the difference between its n and its own mean. (A GPT of 0.9 M parameters, two ranks, `sign` every 4
steps, 1,500 steps; held-out loss of three seeds: 1.965 as in the paper, 1.939 here; AdamW 1.929.)
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from commpress.comm.codecs import Codec, parse
from commpress.comm.feedback import Memory
from commpress.comm.masks_index import pack, unpack
from commpress.comm.optimizer_hooks import Candidate
from commpress.comm.plan import Override
from commpress.comm.segments import Segments, sizes
from commpress.notice import warn
from commpress.optim import loops
from commpress.optim.adam import SPECS, FrozenAdamW
from commpress.optim.adam_state import AdamState
from commpress.optim.base import Parameters
from commpress.optim.intervals import Growing, Sync, candidates
from commpress.optim.settings import require_in_range

OWN = ("exp_avg", "total")
"""The keys of the state that differs from rank to rank between two syncs: n and u."""


class ZeroOneAdamW(FrozenAdamW):
    """AdamW with local steps: each bucket is exchanged every `sync_every` steps, and a part of the buckets in every step.

    `sync_every` is a number of steps or a `Growing` one; under `auto` it is the largest that may be chosen. `warmup_steps`,
    `warmup_spec`, `max_norm` and `variance_from` are as in OneBitAdamW. `refresh_every` is the paper's kappa: after the
    warm-up the variance still learns from mean gradients (exact, or by `warmup_spec`), at steps whose distance doubles, 1, 2,
    4, ..., every kappa times; 0 leaves it frozen.

    A parameter holds the same bits on all ranks after each of its syncs, and drifts in between. Inside `with
    optimizer.synced():` each parameter has the value of its last sync, the same on every rank: use it to validate and to save.
    A frozen parameter (`requires_grad_(False)`) keeps its rank's value. Raises ValueError for a setting out of range.
    """

    shared = (*FrozenAdamW.shared, "sync_every", "refresh_every")

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        sync_every: int | Growing = 4,
        warmup_steps: int | None = None,
        warmup_spec: str = "none",
        max_norm: float | None = None,
        refresh_every: int = 0,
        variance_from: AdamState | None = None,
    ) -> None:
        if isinstance(sync_every, int):
            require_in_range("sync_every", sync_every, 1)
            sync_every = Growing(1, sync_every, sync_every)
        require_in_range("refresh_every", refresh_every, 0)
        super().__init__(params, lr, betas, eps, weight_decay, warmup_steps, warmup_spec, max_norm, variance_from)
        for group in [self.defaults, *self.param_groups]:
            group |= {"sync_every": list(vars(sync_every).values()), "refresh_every": refresh_every}

    def _forget(self) -> None:
        super()._forget()
        self._seen = 0  # values in the buckets of this step so far
        self._starts: dict[str, int] = {}  # how many there were before the bucket of a parameter
        self._backwards = 0  # since it was attached; DDP rebuilds its buckets before the second
        self._most: int | None = None  # steps between syncs that `auto` has chosen
        self._turns: dict[str, int] = {}  # `_starts`, fixed when a variance is frozen
        self._syncing: dict[str, Sync] = {}
        self._leads: dict[str, Tensor] = {}
        """n minus the value that a sync sent, times the loss scale, by name: [n], in the bucket's dtype."""
        self._lead_buffers: dict[Segments, Tensor] = {}
        self._own: dict[str, Any] = {}  # the state that `load_own_state` got since the last backward
        self._own_anchors: dict[str, Tensor] = {}  # the anchors to which that state belongs
        self._loaded = False  # whether a state was loaded since the last step

    @property
    def takes_means(self) -> bool:
        return not self.frozen or self._refreshes()

    def needs_all_buckets(self) -> bool:
        return super().needs_all_buckets() and not self._refreshes()

    def begin_backward(self, scale: float) -> bool:
        self._seen, self._starts, self._syncing, self._leads = 0, {}, {}, {}
        self._own, self._own_anchors = {}, {}
        self._backwards += 1
        return super().begin_backward(scale)

    def bind(self, parameters: dict[str, Tensor], world_size: int, may_be_unused: bool, **more: bool) -> None:
        before = set(self._bound.values())
        if before != set(parameters.values()):
            self._turns = {}
        self._backwards, self._most = 0, None
        super().bind(parameters, world_size, may_be_unused, **more)
        if before:  # the model was wrapped again, and DDP gave all ranks the values of the first
            self._stand()

    def split(self, segments: Segments) -> list[Segments]:
        self._starts |= dict.fromkeys((segment.name for segment in segments), self._seen)
        self._seen += sum(sizes(segments))
        return super().split(segments)

    def kind(self, name: str) -> object:
        kind = super().kind(name)
        return (kind, self._is_due(name)) if kind == "frozen" and not self._refreshes() else kind

    def _is_due(self, name: str) -> bool:
        """Whether a parameter syncs in this step. Each counts the steps since its warm-up in which it was not frozen."""
        state = self.state[self._places[name][0]]
        steps = self._steps_of(state)
        interval = Growing(*self.param_groups[0]["sync_every"]).interval(steps)
        interval = interval if self._most is None else min(interval, self._most)
        # the place of its bucket decides in which step of an interval it syncs; a resumed run begins with other buckets
        start = self._turns.get(name, self._starts[name])
        turn = start * interval // sum(p.numel() for p in self._bound.values())
        return (steps + 1 + turn) % interval == 0

    def candidates(self) -> Sequence[Candidate]:
        """Return `SPECS` every 1, 2, 4, ... steps up to `sync_every`. A candidate that sends more is gentler.

        Local steps change the loss by less than seeds do (benchmarks/convergence.py: `sign` 1.939 every 4 steps, 1.943 under
        OneBitAdamW). Every 8 steps the loss is 1.2 % above AdamW's: the user sets the limit by `sync_every`.
        """
        first = self.param_groups[0]
        growing, steps = Growing(*first["sync_every"]), first["steps"] - first["frozen_at"] if self.frozen else 0
        return candidates(SPECS, growing.interval(steps), growing.last)

    def take(self, candidate: Candidate) -> None:
        """Sync at least as often as the candidate says, from the step that begins."""
        self._most = candidate.sync_every

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Load the model before it, and after it the session, which holds each rank's own
        state.

        After another order the next backward raises an error, or warns.
        """
        if self.came_with_session(state_dict):
            self._stand()  # the model was loaded between the two
            return
        super().load_state_dict(state_dict)
        self._turns, self._loaded = {}, True
        anchors = {name: self._anchor(name) for name in self._own}
        if anchors and all(a is not None and torch.equal(a, self._own_anchors[n]) for n, a in anchors.items()):
            self.load_own_state(self._own)  # it is of the same sync: a distributed checkpoint loads the session first

    def replicated_state(self) -> dict[str, object]:
        if not self._loaded:
            return super().replicated_state()
        led = all(self._is_current(name) for name in self._places)
        if not led:
            warn(
                "commpress: ZeroOneAdamW's parameters are not where the local steps of its loaded state have led: each rank "
                "goes on from other values than it was saved with. Load the model, then the optimizer, then the session, "
                "whose state each rank has saved for itself, in this order",
                self._speaks,
            )
        return {**super().replicated_state(), "parameters are where their local steps have led": led}

    def _is_current(self, name: str) -> bool:
        """Whether a parameter has the value that follows from its state."""
        p = self._places[name][0]
        if (anchor := self._anchor(name)) is None:
            return True
        expected, state = p.detach().clone(), self.state[p]
        loops.restore_local(expected, anchor, state["total"], state["decay"])
        return torch.equal(expected, p.detach())

    def _anchor(self, name: str) -> Tensor | None:
        """The value of a parameter's last sync, if it takes local steps."""
        return self.state.get(self._places[name][0], {}).get("anchor") if name in self._places else None

    def _steps_of(self, state: dict[str, Any]) -> int:
        first = self.param_groups[0]
        return int(state.get("local_steps", first["steps"] - first["frozen_at"]))

    def override_frozen(self, segments: Segments, codec: Codec) -> Override:
        if self._refreshes():
            codec = parse(self.param_groups[0]["warmup_spec"])
            return Override(codec, "" if codec.lossy else "the variance is refreshed", bypass_feedback=True)
        if not self._is_due(segments[0].name):
            return Override(None, "a local step")
        self._syncing |= {segment.name: self._sync(segment.name) for segment in segments}

        def prepare(bucket: Tensor, memory: Memory) -> None:
            self.convert_feedback(memory, segments)
            gained = self._follow_interval(memory, segments)
            self.clip(bucket)
            leads, parts = self._lead_buffer(segments, bucket), sizes(segments)
            for segment, part, lead in zip(segments, bucket.split(parts), leads.split(parts), strict=True):
                p, group = self._places[segment.name]
                state, sync, beta1 = self.state[p], self._syncing[segment.name], group["betas"][0]
                self._leads[segment.name] = lead
                inverse, average, total = loops.flat(state["inverse"], state["exp_avg"], state["total"])
                loops.sync_payload(
                    *(part, inverse, average, total, lead),
                    limit=self.limit(group) * self._scale,
                    fresh=1 - beta1,
                    kept=beta1 * self._scale,
                    share=sync.share,
                    carry=sync.keep * group["unit"] / sync.weight * self._scale if sync.share < 1 else 0.0,
                )
            if memory.kept_index is not None:  # pruned values have no momentum
                kept = torch.empty(memory.kept_index.numel(), dtype=leads.dtype, device=leads.device)
                pack(leads, memory.kept_index, kept)
                if gained is not None:
                    kept += gained
                unpack(kept, memory.kept_index, leads)
            elif gained is not None:
                leads += gained

        return Override(codec, prepare=prepare)

    def _follow_interval(self, memory: Memory, segments: Segments) -> Tensor | None:
        """Scale the residual, which is of a mean over the last sync's steps, to a mean over this sync's steps.

        So p gets all that it lacks. n lacks the residual as it was before the scaling: returns the difference, to be added to n
        ([n] of the sent values, times the loss scale); None if there is no residual or no change.
        """
        states = [self.state[self._places[segment.name][0]] for segment in segments]
        factors = [state["covered"] / (state.get("waiting", 0) + 1) if "covered" in state else 1.0 for state in states]
        if all(factor == 1 for factor in factors):
            return None
        memory.fold(self._world_size)
        before = None if memory.residual is None else memory.residual.clone()
        self.scale_feedback(memory, segments, factors)
        return None if before is None or memory.residual is None else before.sub_(memory.residual)

    def _lead_buffer(self, segments: Segments, bucket: Tensor) -> Tensor:
        """Return memory of the bucket's size and dtype that is kept from sync to sync, until DDP rebuilds its buckets."""
        found = self._lead_buffers.get(segments)
        if found is None or found.dtype != bucket.dtype or found.device != bucket.device:
            names = {segment.name for segment in segments}
            kept = {of: lead for of, lead in self._lead_buffers.items() if names.isdisjoint(part.name for part in of)}
            self._lead_buffers = kept | {segments: torch.empty_like(bucket)}
            found = self._lead_buffers[segments]
        return found

    def apply_frozen(self, updates: dict[str, tuple[Tensor, dict[str, Any], Tensor | None]]) -> None:
        self._loaded = False
        refreshes, most = self._refreshes(), self.param_groups[0]["max_norm"]
        if refreshes and most is not None:
            torch.nn.utils.clip_grad_norm_([p for p, _, _ in updates.values()], most)
        for name, (p, group, update) in updates.items():
            state = self.state[p]
            state["local_steps"] = self._steps_of(state) + 1
            if self._backwards > 1:
                self._turns.setdefault(name, self._starts[name])
            if update is None:
                continue
            if (sync := self._syncing.get(name)) is not None:
                state["decay"] *= sync.keep
                if (lead := self._leads.get(name)) is None:  # masks keep none of its values
                    lead = torch.zeros_like(p)
                loops.sync_apply(
                    p,
                    update,
                    state["exp_avg"],
                    state["total"],
                    state["anchor"],
                    lead,
                    state["decay"],
                    sync.weight / group["unit"],
                    self._scale,
                )
                state["decay"], state["weight"] = 1.0, 0.0
                state["covered"], state["waiting"] = state.get("waiting", 0) + 1, 0
                continue
            if not refreshes:
                self.clip(update)
            else:
                self._refresh(state, update, group)
            sync = self._sync(name)
            state["decay"] *= sync.keep
            state["weight"] = sync.weight
            state["waiting"] = state.get("waiting", 0) + 1
            loops.local_step(
                *(update, state["inverse"], state["exp_avg"], state["total"], state["anchor"], p),
                limit=self.limit(group),
                beta=group["betas"][0],
                keep=sync.keep,
                rate=float(group["lr"]) / group["unit"],
                decay=state["decay"],
            )

    @contextlib.contextmanager
    def synced(self) -> Iterator[None]:
        """Give every parameter the value of its last sync while the block runs: the same bits on all ranks."""
        drifted = [state for state in self.state.values() if "anchor" in state]
        parameters = [p for p, state in self.state.items() if "anchor" in state]
        with torch.no_grad():
            for p, state in zip(parameters, drifted, strict=True):
                p.copy_(state["anchor"])
        try:
            yield
        finally:
            self._stand()

    @torch.no_grad()
    def _stand(self) -> None:
        """Set every parameter to the value that this rank's local steps have reached."""
        for p, state in self.state.items():
            if "anchor" in state:
                loops.restore_local(p, state["anchor"], state["total"], state["decay"])

    def replica(self, p: Tensor) -> Tensor:
        anchor: Tensor = self.state.get(p, {}).get("anchor", p)
        return anchor

    def own_state(self) -> dict[str, Any]:
        states = {name: self.state.get(p, {}) for name, (p, _) in self._places.items()}
        return {
            name: {k: state[k].clone() for k in OWN} | self._turn_of(name)
            for name, state in states.items()
            if "anchor" in state
        }

    def _turn_of(self, name: str) -> dict[str, Tensor]:
        turn = self._turns.get(name)
        return {} if turn is None else {"turn": torch.tensor(turn, dtype=torch.float64, device="cpu")}

    @torch.no_grad()
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._own, self._own_anchors, self._loaded, self._proven = dict(state), {}, True, None
        for name, own in state.items():
            p, _ = self._places[name]
            if (anchor := self._anchor(name)) is None:
                raise ValueError(
                    f"cannot restore: the session's state has local steps of {name!r}, the optimizer's none: load the "
                    "optimizer's state before the session's"
                )
            self._own_anchors[name] = anchor
            for k in OWN:
                self.state[p][k].copy_(own[k])
            if "turn" in own:
                self._turns[name] = int(own["turn"])
            loops.restore_local(p, anchor, self.state[p]["total"], self.state[p]["decay"])

    def _sync(self, name: str) -> Sync:
        p, group = self._places[name]
        lr, state = float(group["lr"]), self.state[p]
        keep = 1 - lr * group["weight_decay"]
        weight = keep * state["weight"] + lr
        return Sync(keep, weight, lr / weight if weight else 1.0)

    def frozen_state(self, name: str) -> None:
        p, group = self._places[name]
        state = self.state[p]
        state |= {"anchor": p.detach().clone(), "total": torch.zeros_like(p), "decay": 1.0, "weight": 0.0}
        state["local_steps"] = 0
        if self._backwards > 1:
            self._turns[name] = self._starts[name]
        if not group["refresh_every"]:
            del state["exp_avg_sq"]  # has become `inverse`

    def _refreshes(self) -> bool:
        """Whether this step is one of 0/1 Adam's T_v."""
        kappa, step = self.param_groups[0]["refresh_every"], self.param_groups[0]["steps"]
        if not kappa:
            return False
        power = int(math.log2(step / kappa + 1))
        return bool((step - kappa * (2**power - 1)) % 2**power == 0)

    def _refresh(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
        beta2 = group["betas"][1]
        state["step"] += 1
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        before = state["inverse"]
        state["inverse"] = group["unit"] * self.inverse(
            state["exp_avg_sq"] / (1 - beta2 ** float(state["step"])), group
        )
        state["exp_avg"].mul_(state["inverse"] / before)
