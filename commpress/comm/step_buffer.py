"""The backwards of replicas, step after step: the state at their start, and the buckets that wait until a step is complete.

    bucket -> [pending, if the optimizer must see all first, or a restart has another layout] -> Collectives.all_reduce

Buckets wait if a norm over all gradients is clipped, and in the first step after a restart, which is exchanged in the saved
layout. On an accelerator they also wait in steps at whose start the ranks compare their states.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from commpress.comm.auto import Auto
from commpress.comm.codecs import Codec
from commpress.comm.collectives import Collectives
from commpress.comm.feedback import Feedback
from commpress.comm.optimizer_hooks import OptimizerHooks
from commpress.comm.parameters import real_view
from commpress.comm.parts import taken_apart, when_all_end
from commpress.comm.plan import Override
from commpress.comm.ratio_warmup import RatioWarmup
from commpress.comm.resize import require_same_parameters
from commpress.comm.rules import Rules
from commpress.comm.segments import Segments, sizes
from commpress.comm.timeline import Span
from commpress.comm.traffic import Step
from commpress.comm.verify import Comparison
from commpress.comm.work import Work, not_counted


@dataclass
class PendingBucket:
    """A bucket that waits until its step is complete."""

    bucket: Tensor
    segments: Segments
    index: int
    work: Work


class StepBuffer:
    """The gradients of one set of replicas, bucket by bucket. `parameters` are their names and sizes, if they are known.

    `auto` chooses the plan of each step, or `warmup` its codec; without them the plan is that of `collectives`. `rules` name
    codecs of parameters.
    """

    def __init__(
        self,
        collectives: Collectives,
        optimizer: OptimizerHooks | None = None,
        parameters: Segments = (),
        auto: Auto | None = None,
        rules: Rules | None = None,
        warmup: RatioWarmup | None = None,
    ) -> None:
        self.collectives, self.optimizer, self.parameters = collectives, optimizer, parameters
        self.auto, self.rules, self.warmup = auto, rules, warmup
        collectives.behind = "" if optimizer is None else type(optimizer).__name__
        collectives.may_undo = optimizer is not None and collectives.grad_scaler is not None
        self.replicas: Callable[[], Iterable[tuple[str, Tensor]]] = tuple
        """Returns tensors, by name, that should have the same bits on all ranks when a step begins; by default none."""
        self.step = 0
        """Steps so far."""
        self.steps_before = 0
        """Steps of the run before this session, by the state that was restored."""
        self.restored: list[Segments] = []
        """The saved layout in which the next step is exchanged; empty if that is the layout of the buckets."""
        self._pending: list[PendingBucket] = []
        self._compared: Callable[[], None] | None = None
        """Waits until the ranks have compared their states at the start of this step; None if the exchanges do that."""
        self._begins = True
        self._current = Step(0)
        self._backward_started: float | None = None

    def submit(self, bucket: Tensor, segments: Segments, index: int, last: bool) -> "torch.futures.Future[Tensor]":
        """Replace `bucket` ([n], contiguous, any float or complex dtype) by its mean over the ranks, in the background.

        `segments` holds the names of the parameters in it and their numbers of real values (a complex value is two), `index` is
        its place among the buckets, and `last` ends the step. The future holds `bucket`; waiting for it raises RuntimeError if
        the exchange failed on any rank. Call it in the same order on every rank.
        """
        if self._begins:
            self._begin()
        self._begins = last
        if self.optimizer is not None:
            self.optimizer.on_bucket(bucket, segments)
        if last and self._backward_started is not None:
            self.note("backward", self._backward_started)
            self._backward_started = None
        waits = self.restored or self._compared is not None
        if waits or (self.optimizer is not None and self.optimizer.needs_all_buckets()):
            work = _whole(bucket)
            self._pending.append(PendingBucket(bucket, segments, index, work))
            if last:
                self.flush()
        else:
            work = self._send(bucket, segments, index, last)
        self.step += last
        return work.future()

    def flush(self) -> None:
        """Exchange the waiting buckets of a complete step; in the first step after a restart, in the saved layout."""
        pending, layouts = self._pending, self.restored
        self._pending, self.restored = [], []
        if not layouts or {one.segments for one in pending} == set(layouts):
            self._on_all_buckets()
            for one in pending:
                self._send(one.bucket, one.segments, one.index, one is pending[-1], one.work.finish)
            return
        places: dict[str, Tensor] = {}
        known = {segment.name: segment for one in pending for segment in one.segments}
        for one in pending:
            values = real_view(one.bucket).view(-1).split(sizes(one.segments))
            places |= zip((segment.name for segment in one.segments), values, strict=True)
        saved = {segment.name: segment.n for layout in layouts for segment in layout}
        require_same_parameters(saved, {name: part.numel() for name, part in places.items()})
        layouts = [tuple(known[segment.name] for segment in layout) for layout in layouts]  # a state has no shapes
        flats = [torch.cat([places[segment.name] for segment in layout]) for layout in layouts]

        def finish_all(error: BaseException | None) -> None:
            for one in pending:
                one.work.finish(error)

        ended = when_all_end(len(layouts), finish_all)

        def finished(layout: Segments, flat: Tensor, error: BaseException | None) -> None:
            for segment, part in zip(layout, flat.split(sizes(layout)), strict=True):
                places[segment.name].copy_(part)
            ended(error)

        self._on_all_buckets()
        for index, (layout, flat) in enumerate(zip(layouts, flats, strict=True)):
            self._send(flat, layout, index, index == len(layouts) - 1, partial(finished, layout, flat))

    def _begin(self) -> None:
        collectives, optimizer = self.collectives, self.optimizer
        if self.auto is not None:
            self.auto.begin_step()
        if self.warmup is not None:
            collectives.gradients = replace(collectives.gradients, codec=self.warmup.at(self.step_of_run))
        due = collectives.traffic.is_due(self.step)
        comparison = Comparison(self.step, list(self.replicas())) if due else None
        self._current = Step(self.step, comparison, None if self.auto is None else self.auto.watch)
        if optimizer is None:
            collectives.follow_scale()
            return
        scaler = collectives.grad_scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        if not optimizer.begin_backward(scale):
            if scale >= collectives.scale:  # a scaler that skips a step lowers its scale
                raise RuntimeError(
                    "commpress: two backward passes have exchanged gradients without optimizer.step() between them. Put all "
                    "but the last backward of a step under no_sync(); with a GradScaler pass grad_scaler= to attach"
                )
            collectives.feedback.restore_snapshot()
        collectives.feedback.begin_step()
        collectives.follow_scale()
        compare = collectives.traffic.compare
        if optimizer.must_verify():
            self._compared = compare(optimizer.replicated_state(), "an optimizer to compare")
        elif (frozen := optimizer.frozen_parameters()) is not None:
            self._compared = compare({"frozen parameters": frozen}, "frozen parameters to compare")

    def _on_all_buckets(self) -> None:
        if self._compared is not None:
            compared, self._compared = self._compared, None
            compared()
        if self.optimizer is not None:
            self.optimizer.on_all_buckets()

    def _send(
        self,
        x: Tensor,
        segments: Segments,
        index: int,
        last: bool,
        then: Callable[[BaseException | None], None] | None = None,
    ) -> Work:
        """Exchange a bucket, or the parts of it that are sent in this step, by the optimizer's override for each."""
        collectives, step, optimizer = self.collectives, self._current, self.optimizer
        if self.auto is not None:
            rules = self.rules
            apart = None if rules is None else rules.parts(segments, self.step_of_run)
            self.auto.note_bucket(apart or [(segments, None)], real_view(x).element_size())
        if self.rules is not None:
            return self._send_by_rules(self.rules, x, segments, index, last, then)
        if optimizer is None:
            pieces = [segments] if self.auto is None else self.auto.cut(segments, real_view(x).element_size())
            if len(pieces) == 1:
                return collectives.all_reduce(x, segments, index, step=step, last=last, then=then)
            return self._send_pieces(pieces, x, index, last, then)
        codec, parts = collectives.gradients.codec, optimizer.split(segments)
        if parts == [segments]:
            override = optimizer.override(segments, codec)
            return collectives.all_reduce(x, segments, index, override=override, step=step, last=last, then=then)
        # values in none of the parts do not change, nor do their memories
        collectives.feedback.register(segments)
        if not parts:
            override = Override(None, "nothing in it is trained")
            return collectives.all_reduce(x, segments, index, override=override, step=step, last=last, then=then)
        whole = _whole(x)
        finished = whole.finish if then is None else then
        for flat, part, done in taken_apart(x, segments, parts, finished):
            override = optimizer.override(part, codec)
            ends = last and part is parts[-1]
            collectives.all_reduce(flat, part, index, override=override, step=step, last=ends, then=done)
        return whole

    def _send_pieces(
        self,
        pieces: list[Segments],
        x: Tensor,
        index: int,
        last: bool,
        then: Callable[[BaseException | None], None] | None,
    ) -> Work:
        """Exchange a bucket in pieces, each as soon as the link is free."""
        whole = _whole(x)
        ended = when_all_end(len(pieces), whole.finish if then is None else then)
        parts = real_view(x).view(-1).split([sum(sizes(piece)) for piece in pieces])
        for values, piece in zip(parts, pieces, strict=True):
            step, ends = replace(self._current, piece_of=real_view(x).numel()), last and piece is pieces[-1]
            self.collectives.all_reduce(values, piece, index, step=step, last=ends, then=ended)
        return whole

    def _send_by_rules(
        self,
        rules: Rules,
        x: Tensor,
        segments: Segments,
        index: int,
        last: bool,
        then: Callable[[BaseException | None], None] | None,
    ) -> Work:
        """Exchange a bucket in parts, each by the codec that the rules have for it."""
        send, parts = self.collectives.all_reduce, rules.parts(segments, self.step_of_run)
        if len(parts) == 1:
            step = replace(self._current, rules=rules.shares(segments))
            return send(x, segments, index, override=_by_rule(parts[0][1]), step=step, last=last, then=then)
        whole, flat = _whole(x), real_view(x).view(-1)
        apart = taken_apart(flat, segments, [part for part, _ in parts], whole.finish if then is None else then)
        for (values, part, done), (_, codec) in zip(apart, parts, strict=True):
            ends = last and part is parts[-1][0]
            step = replace(self._current, rules=rules.shares(part))
            send(values, part, index, override=_by_rule(codec), step=step, last=ends, then=done)
        return whole

    @property
    def step_of_run(self) -> int:
        """Return the number of the next step in the whole run, from 0 on, as restarts count it."""
        return self.steps_before + self.step

    def resume(self, step: int) -> None:
        """Go on after so many steps of the run, with the restored memories: the next step is exchanged in their layout."""
        self.steps_before = step - self.step
        self.restored = list(self.collectives.feedback.memories)

    def forget_skipped_step(self) -> None:
        """Undo the last exchange in the residuals, if the GradScaler has skipped the step that should have used it."""
        if self.collectives.may_undo and self.optimizer is not None and self.optimizer.awaits_step:
            self.collectives.feedback.restore_snapshot()

    def take_over(self, feedback: Feedback, names: Mapping[str, str], scale: float) -> None:
        """Take over another session's residuals of the parameters that both exchange. Call it before the first step.

        `names` maps its names of these parameters to the names here. `scale` is the loss scale of its residuals.
        """
        own = self.collectives.feedback
        self.collectives.scale = scale
        own.load_state_dict(feedback.renamed(names), self.collectives.device)
        own.register(self.parameters)
        self.restored = list(own.memories)

    # the timeline

    @property
    def recording(self) -> bool:
        """Whether a timeline is being recorded."""
        return self.collectives.meter.timeline is not None

    def note(self, phase: str, start: float) -> None:
        """Note that `phase` of this step lasted from `start` (`time.perf_counter`) until now."""
        self.collectives.meter.note(Span(phase, self.step, None, start, time.perf_counter()))

    def backward_starts(self) -> None:
        """Note that backward starts now. It ends with the step's last bucket."""
        self._backward_started = time.perf_counter()

    def timeline_starts(self) -> None:
        """Begin a timeline, between two steps."""
        self._backward_started = None


def _whole(x: Tensor) -> Work:
    """Return the work of a bucket that is sent in parts, or later, with the future that a hook returns (`Traffic.submit`)."""
    work = Work(x, not_counted)
    work.future()
    return work


def _by_rule(codec: Codec | None) -> Override | None:
    """Return the override for a rule's codec; None if the step's own plan holds."""
    return None if codec is None else Override(codec)
