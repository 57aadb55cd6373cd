"""A session: one plan at work on one process group. Buckets go in, futures of their means come out.

It knows no framework. `submit` takes a flat gradient and the names and sizes of the parameters in it; the hooks in
`commpress.hooks` translate. What must survive a restart is in `state_dict`.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings, require_agreement, require_equal, require_same_names
from commpress.comm.codecs import Codec
from commpress.comm.coding import warm_up
from commpress.comm.exchange import EXCHANGES, Labels, Transfer, Wire, alone, skip_together, stay
from commpress.comm.exchange.packed import packed
from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.feedback import Feedback, Memory, Segments
from commpress.comm.meter import Meter, Report, named
from commpress.comm.parameters import bare_name, real_view
from commpress.comm.parts import taken_apart
from commpress.comm.plan import DENSE, Choice, Plan, Treatment
from commpress.comm.rank_state import RankState
from commpress.comm.resize import merged, require_one_run, require_same_values, share, summary, unreadable
from commpress.comm.sequencer import Job, Sequencer, promise
from commpress.comm.survivors import Survivors, described, in_memory_order, of_pairs
from commpress.comm.timeline import Span, Timeline
from commpress.comm.verify import EVERY, Comparison, is_due, require_interval

STATE_VERSION = 3


class GradScaler(Protocol):
    """What is needed of `torch.amp.GradScaler`."""

    def get_scale(self) -> float:
        """The factor by which the loss is multiplied now."""


class Beside(Protocol):
    """Other traffic of the same model: the buffers that DDP broadcasts."""

    def report(self) -> Report:
        """Bytes and seconds so far, on this rank."""

    def phase(self, name: str) -> None:
        """What the report's rows are called by from now on."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Behind(Protocol):
    """What a session asks of an optimizer that is compressed behind its preconditioner (`commpress.optim`)."""

    may_be_masked: bool
    """Whether a part of a parameter may be left out of the exchange."""

    @property
    def awaits_step(self) -> bool:
        """Whether what was exchanged last has not been used."""

    def start(self, scale: float) -> bool:
        """Backward starts, its gradients multiplied by `scale`. Returns whether the exchange before this one was used."""

    def waits(self) -> bool:
        """Whether no bucket of this step may be treated before `measure` has seen them all."""

    def measure(self, gradients: list[Tensor]) -> None:
        """All buckets of this step."""

    def frozen_parameters(self) -> list[str] | None:
        """What does not require a gradient in this step, if the ranks must compare that in every step."""

    def split(self, segments: Segments) -> list[Segments]:
        """The parts of a bucket that travel in this step, each with a treatment of its own; the same on every rank."""

    def treat(self, segments: Segments, codec: Codec) -> Treatment:
        """What to do with a part of a bucket in this step; the same on every rank."""

    def receive(self, bucket: Tensor, segments: Segments) -> None:
        """This bucket will hold what was exchanged when backward is over."""

    def standing(self) -> dict[str, object]:
        """What all ranks must agree on now, as JSON values."""

    def unproven(self) -> bool:
        """Whether `standing` is new since the ranks compared it."""

    def state_dict(self) -> dict[str, Any]:
        """What of its state all ranks have alike, as of any optimizer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def own_state(self) -> dict[str, Any]:
        """What of its state is this rank's own."""

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""


@dataclass
class Held:
    """A bucket that waits until all of its step are there."""

    bucket: Tensor
    segments: Segments
    index: int
    future: "torch.futures.Future[Any]"


class Session:
    """What `commpress.attach` returns. Collective: every rank of `group` makes one at the same point.

    `group` is the process group of the data-parallel ranks and `device` where the gradients live. Ranks whose spec, settings,
    parameters or library version differ all raise ValueError with both values. `role` is what the report calls the traffic.
    Every `verify` steps (0: never), and in the first three, the ranks compare hashes of the means and of `replicas`, and
    payloads have checksums.
    """

    def __init__(
        self,
        spec: str | Codec,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        exchange: str | None = None,
        error_feedback: bool = True,
        grad_scaler: GradScaler | None = None,
        parameters: Segments = (),
        optimizer: Behind | None = None,
        role: str = "gradients",
        verify: int = EVERY,
    ) -> None:
        self._verify = verify
        self._comparison: Comparison | None = None
        self._optimizer, self._scaler, self._role = optimizer, grad_scaler, role
        self.plan = _agree(spec, exchange, error_feedback, parameters, group, device, self._apart())
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device = device
        self.group = group
        self._parameters = dict(parameters)
        self._scale = 1.0
        self._feedback = Feedback(self.world_size)
        self.meter = Meter()
        self.beside: list[Beside] = []
        self.layouts: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}
        """Shapes and strides of the parameters, for those who know them."""
        self.replicas: Callable[[], Iterable[tuple[str, Tensor]]] = tuple
        """What all ranks should hold the same bits of when a step begins, by name; for those who know it."""
        self.pairs: set[str] = set()
        """The complex parameters: each of their values is a pair of reals, in `parameters` and segments, too."""
        self._labels = Labels()
        self._restored: list[Segments] = []
        self._held: list[Held] = []
        self._starts_step = True
        self._looks = False
        self._step = 0
        self._backward_started: float | None = None
        if self.world_size > 1:
            self._wire = Wire(group, device)
            self._sequencer = Sequencer(self._wire, self.meter)
            warm_up(self.plan.codec, device)

    def submit(
        self,
        bucket: Tensor,
        segments: Segments,
        index: int,
        last: bool,
        *,
        treatment: Treatment | None = None,
        dense_bytes: int | None = None,
    ) -> torch.futures.Future[Tensor]:
        """Replace `bucket` ([n], contiguous, any float or complex dtype) by its mean over the ranks, in the background.

        `segments` names the parameters in it, and how many reals of it are theirs (a complex value is two), `index` its place
        among the buckets, `last` ends the step. `dense_bytes` is what
        the report compares with, if not one dense exchange of the bucket. A `treatment` is that of a session without an
        optimizer. The future holds `bucket`; waiting for it raises RuntimeError if the exchange failed on any rank. Same order
        on every rank.
        """
        if self._starts_step:
            self._start_step()
        self._starts_step = last
        if self._optimizer is not None:
            self._optimizer.receive(bucket, segments)
        if last and self._backward_started is not None:
            self.note("backward", self._backward_started)
            self._backward_started = None
        future, mean = promise(self.device), bucket
        bucket = real_view(bucket).view(-1)
        if self._restored or (self._optimizer is not None and self._optimizer.waits()):
            self._held.append(Held(bucket, segments, index, future))
            if last:
                self._release()
        else:
            finished = partial(_settle, future, bucket)
            self._start(bucket, segments, index, last, finished, treatment, dense_bytes)
        self._step += last
        return future.then(partial(_result, mean))  # no collective hangs on it: it only raises what the exchange raised

    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """From the next step on only what these masks keep travels, without indices; elsewhere the mean is 0. Collective.

        `masks` are bool, of the parameters' shapes and strides, by name; a parameter without one travels whole. Feedback of
        what they prune is dropped. Call it between steps, and before `load_state_dict`. Raises ValueError on all ranks if
        the ranks' masks differ or one does not fit, or for an optimizer that keeps a momentum of what travels.
        """
        refusal, masks = None, {bare_name(name): mask for name, mask in masks.items()}
        if self._optimizer is not None and not self._optimizer.may_be_masked:
            refusal = f"{type(self._optimizer).__name__} keeps the momentum of all values: expected SGD for masks"
        for name, mask in masks.items():
            n, each = self._parameters.get(name), 2 if name in self.pairs else 1
            if n != each * mask.numel():
                known = "no such parameter" if n is None else n // each
                refusal = f"mask of {name!r}: {mask.numel()} values, the session has {known}"
            elif (mask.shape, mask.stride()) != (laid := self.layouts.get(name, (mask.shape, mask.stride()))):
                refusal = (
                    f"mask of {name!r}: shape {tuple(mask.shape)}, strides {mask.stride()}; the parameter has "
                    f"{tuple(laid[0])}, {laid[1]}"
                )
        require_equal(self._ask(described(masks, refusal), "a set of masks"))
        if self._optimizer is not None and self._scaler is not None and self._optimizer.awaits_step:
            self._feedback.undo()  # the scaler has skipped the step
        flat = {name: in_memory_order(mask) for name, mask in masks.items()}
        self._feedback.keep(Survivors({name: of_pairs(m) if name in self.pairs else m for name, m in flat.items()}))

    def look(self, on: bool) -> None:
        """While on, the exact mean of all values travels, also of those that masks prune: to see which shall grow again."""
        self._looks = on

    def phase(self, name: str) -> None:
        """What the report's rows are called by from now on."""
        self.meter.enter(name)
        for other in self.beside:
            other.phase(name)

    def agree(self, settings: Mapping[str, object], what: str = "settings to compare") -> None:
        """Raise ValueError on every rank, naming both values, if these (JSON values) differ. Collective.

        `what` they are, in words, for a rank that meets another one at something else.
        """
        require_equal(self._ask(dict(settings), what))

    def gather(self, settings: Mapping[str, object], what: str) -> list[Settings]:
        """Return every rank's settings (JSON values). Collective: a rank that does something else is an error on all."""
        return self._ask(dict(settings), what)

    def report(self) -> Report:
        """Bytes and seconds so far, on this rank."""
        own = self.meter.report(str(self.plan.codec), self.rank, self.world_size)
        together = Report.together(own, *(other.report() for other in self.beside))
        return replace(together, rank=self.rank, world_size=self.world_size)

    @contextlib.contextmanager
    def timeline(self) -> Iterator[Timeline]:
        """Record when what happened while the block runs: `with session.timeline() as t: ...; t.write("trace.json")`.

        Enter and leave it between steps.
        """
        self.meter.timeline = Timeline(self.rank)
        self._backward_started = None
        try:
            yield self.meter.timeline
        finally:
            self.meter.timeline = None

    @property
    def recording(self) -> bool:
        """Whether a timeline is being recorded."""
        return self.meter.timeline is not None

    def note(self, phase: str, start: float) -> None:
        """For hooks: `forward` of this step lasted from `start` (`time.perf_counter`) until now."""
        self.meter.note(Span(phase, self._step, None, start, time.perf_counter()))

    def backward_starts(self) -> None:
        """For hooks: backward starts now. It ends with the step's last bucket."""
        self._backward_started = time.perf_counter()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} has connections and cannot be copied or pickled: save its state_dict(), on every rank"
        )

    def state_dict(self) -> dict[str, Any]:
        """Memories and layout of this rank (every rank saves its own). Call it between steps.

        DDP lays out its buckets anew between its first and its second step. A state that is saved just there goes on
        with the first layout: nothing is lost, but not bit for bit.
        """
        if self._optimizer is not None and self._scaler is not None and self._optimizer.awaits_step:
            self._feedback.undo()  # the scaler has skipped the step
        content = {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "rank": self.rank,
            "world_size": self.world_size,
            "step": self._step,
            "scale": self._scale,
            "optimizer": None if self._optimizer is None else self._optimizer.own_state(),
            "buckets": self._feedback.state_dict(),
            "beside": [other.state_dict() for other in self.beside],
        }
        shared = None if self._optimizer is None else self._optimizer.state_dict()
        return RankState(content, sum(self._parameters.values()), shared)

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Restore what `state_dict` saved on the same rank; training goes on bit for bit. Collective, between steps.

        `state` is that dict, or what `torch.distributed.checkpoint` has loaded into one, or a sequence of the states of all
        ranks of a run; the latter two are good for any number of ranks now: what they had withheld is kept in total. By hand,
        load a compressed optimizer's own state before; a distributed checkpoint has it with the session's. DDP lays its buckets
        out anew after a restart; the first step is exchanged in the saved layout all the same.

        Raises ValueError on all ranks if a state belongs to another version, plan, rank, number of ranks or model, or if the
        ranks' states are not of one step; TypeError for what is no state, on its rank.
        """
        refusal: Exception | None = None
        mine: list[dict[str, Any]] = []
        said: Settings = {"nothing": True}
        try:
            mine = self._states(state)
            said = [*map(summary, mine), said][0]
        except Exception as error:  # the other ranks wait for what this one has to say
            refusal = unreadable(error)
            said = {"error": str(refusal)}
        everyone = self._ask(said, "a state to restore")
        if refusal is not None:
            raise refusal
        first = require_one_run(everyone)
        if self._optimizer is not None and isinstance(state, RankState) and state.loaded_shared is not None:
            self._optimizer.load_state_dict(state.loaded_shared)
        if int(first["world_size"]) != self.world_size:
            own = self._mean_of_own([one["optimizer"] for one in mine], int(first["world_size"]))
            self.restore(merged(mine, first, self.rank, self.world_size) | {"optimizer": own, "beside": []})
        else:
            self.restore(mine[0])

    def _states(self, state: Any) -> list[dict[str, Any]]:
        """The saved states that this rank goes on with: its own, or its share of those of another number of ranks."""
        if isinstance(state, RankState) and (rows := state.loaded) is not None:
            found = rows
        elif isinstance(state, Mapping):
            found = [dict(state)]
            self.require_own(found[0])
        elif isinstance(state, Sequence) and not isinstance(state, str):
            found = share(state, self.rank, self.world_size)
        else:
            raise TypeError(
                f"cannot restore: got {type(state).__name__}, expected what session.state_dict() returned on this rank"
            )
        for one in found:
            self._require_fit(one)
        if len(found) == 1 and found[0]["world_size"] == self.world_size:
            self.require_own(found[0])
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the state of this rank, which fits, as all ranks do. Not collective."""
        self._scale = float(state["scale"])
        self._feedback.load_state_dict(state["buckets"], self.device)
        if self._role == "gradients":  # others keep their layout
            self._restored = list(self._feedback.memories)
        if self._optimizer is not None and state["optimizer"] is not None:
            self._optimizer.load_own_state(state["optimizer"])
        for other, saved_beside in zip(self.beside, state.get("beside", ()), strict=False):
            other.load_state_dict(saved_beside)

    @property
    def feedback(self) -> Feedback:
        """What this rank has withheld, by parameter."""
        return self._feedback

    def take_over(self, feedback: Feedback, names: Mapping[str, str], scale: float) -> None:
        """Go on with what another session withheld, of parameters that both exchange. Call it before the first step.

        `names` has its names for them, and ours. `scale` is the loss scale of what it withheld.
        """
        self._scale = scale
        self._feedback.load_state_dict(feedback.renamed(names), self.device)
        self._feedback.register(tuple(self._parameters.items()))
        self._restored = list(self._feedback.memories)

    def require_own(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state belongs to another version, plan, rank, number of ranks or model."""
        require_same_values({"rank": self.rank, "world_size": self.world_size}, state)
        self._require_fit(state)

    def _require_fit(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state, of any rank among any number of them, is not one of this session's."""
        require_same_values({"version": STATE_VERSION, "settings": self._settings()}, state)
        saved = {bare_name(name): int(n) for bucket in state["buckets"] for name, n in bucket["segments"]}
        if self._parameters and saved:
            gradients = self._role == "gradients"  # in other roles some may not have been exchanged yet
            present = {name: n for name, n in self._parameters.items() if gradients or name in saved}
            _require_same_parameters(saved, present)
        self._feedback.require_fit(state["buckets"])

    def _settings(self) -> dict[str, object]:
        return {**self.plan.settings(), "optimizer": self._apart()["optimizer"]}

    def _mean_of_own(self, mine: list[Any], saved: int) -> Any:
        """What an optimizer has of its own on a rank, as the mean over all that have saved. Collective."""
        if self._optimizer is None:
            return None
        mean = self._optimizer.own_state()
        for name, kept in mean.items():
            for key in kept:
                total = torch.zeros_like(kept[key])
                for one in mine:
                    total += one[name][key].to(total.device)
                dist.all_reduce(total, group=self.group)
                kept[key] = total / saved
        return mean

    def _start_step(self) -> None:
        due = self.world_size > 1 and is_due(self._verify, self._step)
        self._comparison = Comparison(self._step, list(self.replicas())) if due else None
        self._labels.proven = due
        if self._optimizer is None:
            self._follow_scale()
            return
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        if not self._optimizer.start(scale):
            if scale >= self._scale:  # a scaler that skips a step lowers its scale
                raise RuntimeError(
                    "commpress: two backward passes have exchanged gradients without optimizer.step() between them. Put all "
                    "but the last backward of a step under no_sync(); with a GradScaler pass grad_scaler= to attach"
                )
            self._feedback.undo()
        self._follow_scale()
        if self._optimizer.unproven():
            require_equal(self._ask(self._optimizer.standing(), "an optimizer to compare"))
        elif (frozen := self._optimizer.frozen_parameters()) is not None and self.world_size > 1:
            require_same_names("frozen parameters", frozen, self.group, self.device)

    def _start(
        self,
        bucket: Tensor,
        segments: Segments,
        index: int,
        last: bool,
        finished: Callable[[BaseException | None], None],
        treatment: Treatment | None = None,
        dense_bytes: int | None = None,
    ) -> None:
        W = self.world_size
        if self._optimizer is not None and treatment is None:
            if (parts := self._optimizer.split(segments)) != [segments]:
                self._start_parts(bucket, segments, parts, index, last, finished)
                return
            treatment = self._optimizer.treat(segments, self.plan.codec)
        treatment = treatment or Treatment(self.plan.codec)
        if self._looks:
            treatment = Treatment(DENSE, "all values are looked at")
        n = bucket.numel() if self._looks else self._feedback.survivors.total(segments)
        if n == 0:
            treatment = Treatment(None, "nothing is left of it")
        choice = self.plan.choose(n, bucket.element_size(), W, treatment)
        values, dtype = bucket.numel(), bucket.dtype
        if segments and segments[0][0] in self.pairs:
            values, dtype = values // 2, dtype.to_complex()
        row = self.meter.row(index, values, named(dtype), str(choice.codec), choice.exchange, choice.reason, self._role)
        chunk = None
        if choice.exchange == "two_shot" and not treatment.apart:
            cuts = chunk_bounds(n, W, choice.codec.granularity)
            chunk = (cuts[self.rank], cuts[self.rank + 1])
        memory = self._feedback.memory(segments, choice.feedback, chunk, self.device, treatment.momentum)
        exchange = self._exchange(bucket, segments, choice, treatment, memory)
        if W == 1:
            next(exchange, None)
            row.steps += 1
            self.meter.steps += last
            finished(None)
            return
        if (comparison := self._comparison) is not None:
            if treatment.codec is not None:
                exchange = comparison.watch(exchange, bucket, f"the mean of bucket {index}")
            if last:
                exchange = comparison.finish(exchange, self._wire, self._labels.next("hashes of this step"))
        dense = ring_bytes(bucket.nbytes, W) if dense_bytes is None else dense_bytes
        self._sequencer.submit(Job(bucket, exchange, row, self._step, dense, last, finished))

    def _start_parts(
        self,
        bucket: Tensor,
        segments: Segments,
        parts: list[Segments],
        index: int,
        last: bool,
        finished: Callable[[BaseException | None], None],
    ) -> None:
        """Exchange parts of a bucket one by one; what is in none of them stays as it is, and so does what is kept of it."""
        self._feedback.register(segments)
        if not parts:
            self._start(bucket, segments, index, last, finished, Treatment(None, "nothing in it is trained"))
        for flat, part, done in taken_apart(bucket, segments, parts, finished):
            optimizer = self._optimizer
            assert optimizer is not None
            self._start(flat, part, index, last and part is parts[-1], done, optimizer.treat(part, self.plan.codec))

    def _exchange(
        self, bucket: Tensor, segments: Segments, choice: Choice, treatment: Treatment, memory: Memory
    ) -> Iterator[Transfer]:
        # a mean of gradients does not send along what is remembered of momenta
        used = Memory() if treatment.apart or (treatment.reason and treatment.prepare is None) else memory
        travels, places = bucket, None if self._looks else memory.places
        if places is not None and (treatment.codec is not None or not places.numel()):
            nbytes = places.numel() * bucket.element_size()
            travels = memory.buffer("survivors", nbytes, self.device).view(bucket.dtype)
        n, spec = travels.numel(), str(choice.codec)
        label = self._labels.bucket(self._role, segments, n, spec, choice.exchange)
        if treatment.codec is None:
            alone_here = self._scaler is None or self.world_size == 1
            exchange = stay() if alone_here else skip_together(travels, self._wire, label)
        elif self.world_size == 1:
            exchange = alone(travels, used)
        else:
            exchange = EXCHANGES[choice.exchange](travels, choice.codec, used, self._wire, label)
        if places is not None and travels is not bucket:
            exchange = packed(bucket, places, travels, exchange)
        if self._optimizer is None and treatment.prepare is None and treatment.blend is None:
            return exchange
        # where the codec sees the bucket itself, its pass does the blending
        fused = used if choice.codec.lossy and self.world_size > 1 and places is None else None
        return _prepared(treatment, bucket, memory, self._scaler is not None, fused, exchange)

    def _release(self) -> None:
        """Exchange a step all of whose buckets are there; the first after a restart in the layout that was saved."""
        held, layouts = self._held, self._restored
        self._held, self._restored = [], []
        if not layouts or {h.segments for h in held} == set(layouts):
            self._measure([h.bucket for h in held])
            for h in held:
                self._start(h.bucket, h.segments, h.index, h is held[-1], partial(_settle, h.future, h.bucket))
            return
        places: dict[str, Tensor] = {}
        for h in held:
            places |= zip((n for n, _ in h.segments), h.bucket.split([n for _, n in h.segments]), strict=True)
        saved = {name: n for layout in layouts for name, n in layout}
        _require_same_parameters(saved, {name: part.numel() for name, part in places.items()})
        flats = [torch.cat([places[name] for name, _ in layout]) for layout in layouts]
        waiting = len(layouts)

        def finished(layout: Segments, flat: Tensor, error: BaseException | None) -> None:
            nonlocal waiting
            for (name, _), part in zip(layout, flat.split([n for _, n in layout]), strict=True):
                places[name].copy_(part)
            waiting -= 1
            if waiting == 0 or error is not None:
                for h in held:
                    if not h.future.done():
                        _settle(h.future, h.bucket, error)

        self._measure(flats)
        for index, (layout, flat) in enumerate(zip(layouts, flats, strict=True)):
            end = index == len(layouts) - 1
            self._start(flat, layout, index, end, partial(finished, layout, flat))

    def _ask(self, settings: Settings, what: str) -> list[Settings]:
        """Every rank's settings. Collective: a rank that does something else meanwhile is an error on all."""
        if self.world_size == 1:
            return [settings]
        return self._sequencer.ask(settings, self._labels.next(what))

    def _measure(self, gradients: list[Tensor]) -> None:
        if self._optimizer is not None:
            self._optimizer.measure(gradients)

    def _apart(self) -> dict[str, object]:
        """What else the ranks must agree on."""
        optimizer = None if self._optimizer is None else type(self._optimizer).__name__
        return {"optimizer": optimizer, "grad_scaler": self._scaler is not None, "verify": self._verify}

    def _follow_scale(self) -> None:
        """Memories hold gradients times the loss scale; when that changes they change with it."""
        if self._scaler is not None and (scale := float(self._scaler.get_scale())) != self._scale:
            self._feedback.rescale(scale / self._scale)
            self._scale = scale


def _prepared(
    treatment: Treatment,
    bucket: Tensor,
    memory: Memory,
    may_undo: bool,
    fused: Memory | None,
    exchange: Iterator[Transfer],
) -> Iterator[Transfer]:
    """Make of the gradient what is sent, in the thread that encodes, and send it. The blending is left to what encodes with
    `fused`, if there is one."""
    if may_undo:
        memory.keep()
    if treatment.prepare is not None:
        treatment.prepare(bucket, memory)
    if fused is not None:
        fused.blend = treatment.blend
    elif treatment.blend is not None:
        treatment.blend.apply(bucket)
    yield from exchange
    if fused is not None:
        fused.blend = None


def _require_same_parameters(saved: dict[str, int], present: dict[str, int]) -> None:
    for name in sorted(saved.keys() | present.keys()):
        if saved.get(name) != present.get(name):
            raise ValueError(
                f"cannot restore: parameter {name!r} has {saved.get(name, 'no')} values in the saved state, "
                f"{present.get(name, 'no')} in the model"
            )


def _agree(
    spec: str | Codec,
    exchange: str | None,
    error_feedback: bool,
    parameters: Segments,
    group: dist.ProcessGroup,
    device: torch.device,
    more: dict[str, object],
) -> Plan:
    try:
        plan = Plan.of(spec, exchange, error_feedback)
        require_interval(more["verify"])
    except (ValueError, TypeError) as error:
        require_agreement({"error": str(error)}, group, device)
        raise
    settings: dict[str, object] = {
        "spec": str(plan.codec),
        "exchange": plan.exchange,
        "error_feedback": error_feedback,
        "commpress version": version("commpress"),
        "parameters": f"{len(parameters)} with {sum(n for _, n in parameters)} values",
        **more,
    }
    require_agreement(settings, group, device)
    return plan


def _settle(future: "torch.futures.Future[Any]", bucket: Tensor, error: BaseException | None) -> None:
    future.set_result(error or bucket)


def _result(mean: Tensor, future: "torch.futures.Future[Any]") -> Tensor:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return mean
