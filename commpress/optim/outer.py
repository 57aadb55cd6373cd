"""Local steps under an outer optimizer: local SGD (Stich, arXiv:1805.09767), DiLoCo (Douillard et al., arXiv:2311.08105),
Streaming DiLoCo (Douillard et al., arXiv:2501.18512), SparseLoCo (Sarfi et al., arXiv:2508.15706), with Muon inside MuLoCo
(Therien et al., arXiv:2505.23725).

Every worker takes `every` steps of its own from the anchor a, which has the same bits on all of them. Then, with a codec Q and
its residual e,

    d <- mean of Q(a - p + decay e)        m <- mu m + d        a <- a - lr (d + mu m)        p <- a

lr = 1 and mu = 0 is local SGD: the mean of the parameters, sent as differences. The model is synced in fragments, each at its
own steps. With a `delay` training goes on while a fragment is being sent; `delay` steps later p <- (p + a) / 2.
"""

import contextlib
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.codecs import Codec
from commpress.comm.collectives import Collectives
from commpress.comm.feedback import Memory
from commpress.comm.meter import Report
from commpress.comm.parameters import real_view
from commpress.comm.parts import taken_apart
from commpress.comm.plan import Override, require_flat
from commpress.comm.rank_state import RankState
from commpress.comm.receipt import Receipt, receipt
from commpress.comm.replicas import agreed_plan
from commpress.comm.resize import moved, unreadable
from commpress.comm.session import Session
from commpress.comm.work import Work, not_counted
from commpress.kernels.cpu.fingerprint import fingerprint
from commpress.notice import speaks, warn
from commpress.optim.fragment import Fragment, split
from commpress.optim.settings import require_in_range

STATE_VERSION = 1


@dataclass(frozen=True)
class OuterSettings:
    """The settings of the outer syncs. Raises ValueError for a value out of range, and for a number of steps that is not whole.

    `every`: local steps between two syncs of a fragment. `lr`, `momentum`: of the outer Nesterov step. `decay`: the share of
    the residual that the next sync adds. `fragments`: parts of the model that sync at different steps. `delay`: steps that the
    exchange of a fragment may take.
    """

    every: int
    lr: float = 1.0
    momentum: float = 0.0
    decay: float = 1.0
    fragments: int = 1
    delay: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "fragments", "delay"):
            if not isinstance(value := getattr(self, name), int):
                raise ValueError(f"{name} {value!r}: expected a whole number")
        require_in_range("every", self.every, 1)
        require_in_range("lr", self.lr, 0)
        require_in_range("momentum", self.momentum, 0, 1)
        require_in_range("decay", self.decay, 0)
        require_in_range("fragments", self.fragments, 1, self.every + 1)
        require_in_range("delay", self.delay, 0, self.every)
        if self.decay > 1:
            raise ValueError(f"decay {self.decay}: expected a number in [0, 1]")


class Outer:
    """Local steps and their outer syncs. Collective over `group`, the workers, and `inner`, the ranks of one worker.

    `parameters` maps names to the trained tensors, at least one, on CPU or an accelerator, of any float or complex dtype; a
    complex value counts as two real ones. At the start all workers get rank 0's values: float64 and complex128 rounded to 32
    bits a real value, all others exactly. Call `step` after every optimizer step, equally often on every rank. The ranks of a
    worker hold the same values (a DDP inside a node): each exchanges its part of a fragment with its peers in the other
    workers, and the ranks of the worker then gather the parts. If `parameters` are only the memory of others (local shards),
    `owners` maps the same names to the tensors whose `requires_grad` counts. Raises ValueError on all ranks if a spec is
    unknown or the ranks differ.
    """

    @torch.inference_mode(False)  # the anchors outlive a caller's inference mode
    @torch.no_grad()
    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        spec: str | Codec,
        settings: OuterSettings,
        group: dist.ProcessGroup,
        inner: dist.ProcessGroup | None = None,
        owners: Mapping[str, Tensor] | None = None,
    ) -> None:
        owners = dict(owners or parameters)
        parameters = {name: real_view(p) for name, p in parameters.items()}
        self.settings = settings
        self.device = next(iter(parameters.values())).device
        self._group, self._inner = group, inner if inner is not None and dist.get_world_size(inner) > 1 else None
        self._steps = self._first = 0
        self._waited = 0.0
        self._logged: Report | None = None
        require_agreement({**vars(settings), "inner ranks": self._inner_size}, group, self.device)
        count, workers = settings.fragments, dist.get_world_size(group)
        inner_rank = 0 if self._inner is None else dist.get_rank(self._inner)
        self._fragments = split(parameters, owners, count, settings.every, workers, inner_rank, self._inner_size)
        parts = tuple(s for f in self._fragments for s in f.segments)
        # it does not compare hashes step by step: each sync compares the anchors
        alike: dict[str, object] = {"optimizer": None, "grad_scaler": False, "verify": 0}
        plan = agreed_plan(spec, None, True, parts, group, self.device, alike)
        require_flat(plan.codec, "the fragments of an outer sync have parts of parameters")
        self._collectives = Collectives(group, self.device, plan, role="outer", verify=0)
        settings_alike: dict[str, object] = {"settings": {**plan.settings(), "optimizer": None}}
        self._session = Session(self._collectives, spec=str(plan.codec), settings=settings_alike, parameters=parts)
        self._apart = [0]
        if workers > 1:
            leads = speaks(group) and (self._inner is None or speaks(self._inner))
            weakref.finalize(self, _say_apart, self._apart, leads)
        source = dist.get_global_rank(group, 0)
        for fragment in self._fragments:
            fragment.anchor = fragment.flat()
            dist.broadcast(fragment.anchor, source, group=group)
            fragment.put(fragment.anchor)

    @property
    def steps(self) -> int:
        """Local steps so far."""
        return self._steps

    @torch.no_grad()
    def step(self) -> None:
        """Count a local step, and start and finish the syncs that are due. Call it after every optimizer step.

        Raises RuntimeError if an exchange failed, ValueError on all ranks if they have taken different numbers of steps.
        """
        self._steps += 1
        for fragment in self._fragments:
            fragment.note_step()
        for index, fragment in enumerate(self._fragments):
            if fragment.mean is not None and self._steps == fragment.synced_at + self.settings.delay:
                self._finish(fragment, 0.5)
            if (self._steps - fragment.offset) % self.settings.every == 0:
                self._start(index, fragment)
                if self.settings.delay == 0:
                    self._finish(fragment, 1.0)
        apart = [self._steps - f.synced_at for f in self._fragments if f.mean is not None or f.synced_at < self._steps]
        self._apart[0] = max(apart, default=0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync(self) -> None:
        """Sync all fragments now, as at the end of training; all ranks then hold the same bits. Collective.

        Raises the errors of `step`.
        """
        for fragment in self._fragments:
            if fragment.mean is not None:
                self._finish(fragment, 0.5)
        for index, fragment in enumerate(self._fragments):
            self._start(index, fragment)
        for fragment in self._fragments:
            self._finish(fragment, 1.0)
        self._apart[0] = 0

    @contextlib.contextmanager
    def synced(self) -> Iterator[None]:
        """Give the parameters the anchor's values while the block runs, the same bits on all ranks: use it to validate."""
        self._apart[0] = 0  # a script that uses this knows that the ranks have drifted
        drifted = [[p.detach().clone() for p in fragment.parameters] for fragment in self._fragments]
        with torch.no_grad():
            for fragment in self._fragments:
                fragment.put(fragment.anchor)
        try:
            yield
        finally:
            with torch.no_grad():
                for fragment, values in zip(self._fragments, drifted, strict=True):
                    for p, value in zip(fragment.parameters, values, strict=True):
                        p.copy_(value)

    def report(self) -> Report:
        """Return bytes and seconds of the outer syncs on this rank. The dense figure is that of DDP in every local step."""
        report = self._session.report()
        seconds = {**report.seconds, "exposed": self._waited}
        seconds["hidden"] = max(
            0.0, sum(report.seconds[phase] for phase in ("encode", "wire", "decode")) - self._waited
        )
        return replace(report, steps=self._steps - self._first, seconds=seconds)

    def receipt(self) -> Receipt:
        """Return the receipt of the outer syncs: bytes a local step that this rank has sent so far."""
        report = self.report()
        return receipt(report, None, report.spec, None, None)

    def log(self) -> dict[str, float]:
        """Return numbers for a tracker, as in `wandb.log(outer.log())`: means of a step since the last call (`Report.log`)."""
        report = self.report()
        if found := report.log(self._logged):
            self._logged = report
        return found

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return anchors, outer momentum, unfinished means and residuals. Every rank saves its own, with its own model."""
        fragments = [fragment.state_dict() for fragment in self._fragments]
        self._apart[0] = 0  # the training will go on
        content = {
            "version": STATE_VERSION,
            "settings": {**vars(self.settings), "inner ranks": self._inner_size},
            "world_size": self._session.world_size,
            "steps": self._steps,
            "fragments": fragments,
            "session": dict(self._session.state_dict()),
        }
        return RankState(content, sum(fragment.anchor.numel() for fragment in self._fragments))

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what `state_dict` saved on this rank; pass None on a rank that has joined. Collective.

        A rank that has joined gets the anchors, momentum and steps of the first rank that has a state, in full precision, and
        starts from the anchor. The other ranks may have other places than before, and the group another size: their residuals
        count as before. Raises ValueError on all ranks if a state does not fit, or if no rank has one.
        """
        error, steps, before = None, None, self._steps
        try:
            if isinstance(state, RankState) and (rows := state.loaded) is not None:  # by torch.distributed.checkpoint
                state = rows[0] if rows else None
            if state is not None:
                error, steps = self._unfit(state), int(state["steps"])
        except Exception as found:  # the other ranks wait for this one's answer
            error = str(unreadable(found)).removeprefix("cannot restore: ")
        everyone = self._collectives.traffic.ask({"error": error, "steps": steps}, "a state to restore")
        for rank, other in enumerate(everyone):
            if other["error"] is not None:
                raise ValueError(f"cannot restore: rank {rank}: {other['error']}")
        holders = [rank for rank, other in enumerate(everyone) if other["steps"] is not None]
        if not holders:
            raise ValueError("cannot restore: no rank has a state, expected at least one with a state")
        counts = {everyone[rank]["steps"] for rank in holders}
        if len(counts) > 1:
            raise ValueError(f"cannot restore: the ranks' states are of different steps: {sorted(map(str, counts))}")
        if state is not None:
            self._steps = int(state["steps"])
            for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
                fragment.load_state_dict(saved)
            self._session.restore(self._at_this_place(state["session"]))
        if len(holders) < len(everyone):
            self._welcome(holders[0], joined=state is None)
        self._first += self._steps - before  # reports do not count the steps before the restart

    # how it works

    @property
    def _inner_size(self) -> int:
        return 1 if self._inner is None else dist.get_world_size(self._inner)

    def _start(self, index: int, fragment: Fragment) -> None:
        """Start to exchange a fragment: the difference of the parameters from the anchor."""
        # ranks that have taken different numbers of steps would wait for each other, or mix up fragments
        fragment.begin()
        moving = fragment.moving()
        frozen = [segment.name for segment in fragment.segments if segment not in moving]
        settings: dict[str, object] = {"local steps": self._steps, "fragment": index, "frozen parameters": frozen}
        settings["anchor (its hash)"] = f"{fingerprint(fragment.anchor):016x}"
        self._session.agree(settings)
        bucket = fragment.anchor[fragment.part] - fragment.flat()[fragment.part]
        decay = self.settings.decay

        def prepare(bucket: Tensor, memory: Memory) -> None:
            memory.decay(decay)

        dense = (self._steps - fragment.synced_at) * fragment.dense_bytes
        override = Override(self._collectives.gradients.codec, prepare=prepare)
        send = partial(self._collectives.all_reduce, index=index, override=override, dense_bytes=dense)
        if moving == fragment.segments:
            fragment.mean = send(bucket, fragment.segments).future()
        elif not moving:
            fragment.arrived(bucket)
        else:
            whole = Work(bucket, not_counted)
            for flat, part, done in taken_apart(bucket, fragment.segments, [moving], whole.finish):
                send(flat, part, then=done)
            fragment.mean = whole.future()
        fragment.synced_at = self._steps

    def _finish(self, fragment: Fragment, share: float) -> None:
        """Wait for a fragment's mean, step the anchor by it, and move the parameters `share` of the way to the anchor."""
        assert fragment.mean is not None
        start = time.perf_counter()
        mean = fragment.mean.wait()
        self._waited += time.perf_counter() - start
        fragment.mean = None
        lr, momentum = self.settings.lr, self.settings.momentum
        own = fragment.anchor[fragment.part]
        frozen = [(at, own[at].clone(), fragment.momentum[at].clone()) for at in fragment.frozen_slices()]
        if momentum:
            fragment.momentum.mul_(momentum).add_(mean)
            own.sub_(mean.add_(fragment.momentum, alpha=momentum), alpha=lr)
        else:
            own.sub_(mean, alpha=lr)
        for at, anchor, kept in frozen:
            own[at], fragment.momentum[at] = anchor, kept
        if self._inner is not None:
            dist.all_gather(list(fragment.anchor.split(own.numel())), own.clone(), group=self._inner)
            sent, place = (self._inner_size - 1) * own.nbytes, self._fragments.index(fragment)
            values = fragment.anchor.numel()
            self._collectives.meter.record_uncompressed(
                place, values, "float32", "all_gather", "inside a worker", "parameters", sent
            )
        fragment.put(fragment.anchor, share)

    def _unfit(self, state: dict[str, Any]) -> str | None:
        """Return the reason why a state does not fit this run; None if it fits."""
        expected = {"version": STATE_VERSION, "settings": {**vars(self.settings), "inner ranks": self._inner_size}}
        for key, value in expected.items():
            if state.get(key) != value:
                return f"the saved state has {key} {state.get(key)!r}, this run has {value!r}"
        sizes = [fragment.anchor.numel() for fragment in self._fragments]
        saved = [fragment["anchor"].numel() for fragment in state["fragments"]]
        if saved != sizes:
            return f"the saved fragments have {saved} values, those of this model {sizes}"
        try:
            self._session.require_own(self._at_this_place(state["session"]))
        except ValueError as error:
            return str(error).removeprefix("cannot restore: ")
        return None

    def _at_this_place(self, session: dict[str, Any]) -> dict[str, Any]:
        return moved(session, self._session.rank, self._session.world_size)

    def _welcome(self, source: int, joined: bool) -> None:
        """Broadcast the source's anchors, momentum and steps; ranks that have joined start from the anchors."""
        root = dist.get_global_rank(self._group, source)
        about = torch.tensor(
            [self._steps, *(n for f in self._fragments for n in (f.synced_at, int(f.mean is not None)))],
            dtype=torch.int64,
            device=self.device,
        )
        dist.broadcast(about, root, group=self._group)
        self._steps, *of_fragments = about.tolist()
        for place, fragment in enumerate(self._fragments):
            fragment.synced_at, has_mean = of_fragments[2 * place : 2 * place + 2]
            fragment.receive(root, self._group, bool(has_mean))
            if joined:
                fragment.put(fragment.anchor)


def _say_apart(apart: list[int], leads: bool) -> None:
    """Warn at the end of a training if its last sync was forgotten, unless the program ends with an error."""
    if apart[0] and sys.exc_info()[0] is None and getattr(sys, "last_value", None) is None:
        warn(
            f"commpress: training ended {apart[0]} local steps after the last outer sync, and each rank has parameters of its "
            "own: expected outer.sync() after the last step, or outer.state_dict() of every rank, to go on later",
            leads,
        )
