"""One group's wire, sequencer and meter. Its traffic is queued, counted, labelled and compared here."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings, require_equal
from commpress.comm.error import ErrorWatch
from commpress.comm.exchange import Label, Labels, Transfer, Wire
from commpress.comm.exchange.around import in_inference_mode
from commpress.comm.failure import DriftError
from commpress.comm.meter import ROLES, Meter, Report, Row, dtype_name
from commpress.comm.parameters import real_view
from commpress.comm.plan import BucketPlan
from commpress.comm.question import ROOM, Question
from commpress.comm.scratch import ScratchPool
from commpress.comm.segments import Segments
from commpress.comm.sequencer import NO_BUCKET, Job, Sequencer
from commpress.comm.verify import Comparison, is_due
from commpress.comm.work import Work, not_counted


@dataclass
class Step:
    """A step whose collectives belong together.

    It has its number, the comparison of its results and the watch over its error, if there are such in this step. `rules` are
    the rules by which it sends, and how many values each has. A piece of a bucket is `piece_of` so many real values; in the
    report all that are compressed are one bucket, and one that is not has a row of its own.
    """

    number: int
    comparison: Comparison | None = None
    error: ErrorWatch | None = None
    rules: dict[str, int] = field(default_factory=dict)
    piece_of: int = 0


class Traffic:
    """The traffic of one process group, one exchange after another. Collective: all its ranks make one at the same point."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, scratch: ScratchPool, verify: int) -> None:
        self.world_size = dist.get_world_size(group)
        self.on_host = device.type == "cpu"
        """Whether codecs and exchanges run on the host, which sees how long they take; on an accelerator it enqueues them."""
        self.meter, self.labels = Meter(), Labels()
        self._scratch, self._verify = scratch, verify
        self._counts: dict[int, int] = {}
        self._landed = 0.0
        self._busy, self._waited = dict.fromkeys(ROLES, 0.0), dict.fromkeys(ROLES, 0.0)
        if self.world_size > 1:
            self.wire = Wire(group, device)
            self._sequencer = Sequencer(self.wire, self.meter)

    def ask(self, settings: Settings, what: str) -> list[Settings]:
        """Return every rank's settings. Collective; if a rank does something else meanwhile, all raise an error.

        It waits for all ranks, so call it between steps. Inside a backward use `send_question`.
        """
        if self.world_size == 1:
            return [settings]
        return self._sequencer.ask(settings, self.labels.next(what))

    def send_question(self, settings: Settings, what: str, room: int = ROOM) -> Question:
        """Ask all ranks without waiting; the group must have several.

        The answers arrive before the means of the buckets that are submitted later: read them in the next step. `room` is the
        size of one answer in bytes, the same on all ranks.
        """
        question = Question(settings, self.wire, room)
        self._submit_question(question, question.exchange(self.labels.next(what)))
        return question

    def compare(self, settings: Settings, what: str) -> Callable[[], None] | None:
        """Let later submissions be exchanged only if all ranks have these settings. Collective, without waiting.

        On CPU the queue of exchanges compares, and ends with a DisagreementError on all ranks if they differ. On an accelerator
        it returns a function that must be called before the next bucket is submitted: it waits for the ranks, and raises
        ValueError if they differ.
        """
        if self.world_size == 1:
            return None
        question = Question.of_hash(settings, self.wire)
        label, more = self.labels.next(what), self.labels.next(what)

        def compared() -> Iterator[Transfer]:
            for transfer in question.exchange(label):
                transfer.wait()  # no later bucket may start before this
            if not question.is_unanimous():
                try:
                    require_equal(self.wire.gather(settings, more))
                except ValueError as error:
                    raise DriftError(str(error)) from None
            yield from ()

        def read() -> None:
            question.work.wait()
            if not question.is_unanimous():
                require_equal(self._sequencer.ask(settings, more))

        in_line = self.wire.by_message
        self._submit_question(question, compared() if in_line else question.exchange(label))
        return None if in_line else read

    def _submit_question(self, question: Question, exchange: Iterator[Transfer]) -> None:
        row = Row(NO_BUCKET, 0, "", "", "", "")
        job = Job(question.work.out, exchange, row, self.meter.steps, 0, False, question.work.finish)
        self._sequencer.submit(job)

    def count(self, index: int) -> int:
        """Count a reduction with this index in the report; returns how many there were before."""
        before = self._counts.get(index, 0)
        self._counts[index] = before + 1
        self.meter.steps = max(self.meter.steps, before + 1)
        return before

    def is_due(self, step: int) -> bool:
        """Whether the results of this step are compared."""
        return self.world_size > 1 and is_due(self._verify, step)

    def label(
        self,
        role: str,
        segments: Segments,
        n: int,
        plan: BucketPlan,
        name: str,
        index: int,
        step: Step | None = None,
    ) -> Label:
        """Return the label of an exchange in this step; `index` is its place in the report."""
        self.labels.proven = self.is_due(self._counts.get(index, 0) if step is None else step.number)
        return self.labels.bucket(role, segments, n, str(plan.codec), name)

    def report(self, spec: str, rank: int, world_size: int) -> Report:
        """Return bytes and seconds so far. `exposed` are the seconds that training waited, `hidden` those beside it."""
        report = self.meter.report(spec, rank, world_size)
        for role in ROLES:
            report.seconds["exposed"] += self._waited[role]
            report.seconds["hidden"] += max(0.0, self._busy[role] - self._waited[role])
        return report

    def spent(self, role: str) -> tuple[float, float]:
        """Return the seconds that training has waited for this role's exchanges, and the seconds in which one was running."""
        return (
            self.meter.exposed + self._waited[role],
            self.meter.exposed + self.meter.hidden + self._busy[role],
        )

    def submit(
        self,
        role: str,
        name: str,
        plan: BucketPlan,
        values: int,
        dtype: torch.dtype,
        out: Tensor,
        index: int,
        dense_bytes: int,
        exchange: Iterator[Transfer],
        compared: str = "",
        *,
        buffer: Tensor | None = None,
        backend_bytes: int | None = None,
        step: Step | None = None,
        last: bool = False,
        then: Callable[[BaseException | None], None] | None = None,
        plain: tuple[int, Label] | None = None,
        reads: tuple[Tensor, ...] = (),
    ) -> Work:
        """Run an exchange that leaves its result in `out`, and count it. `buffer`, of `scratch`, is free afterwards.

        `compared` is the name of a result that must have the same bits on all ranks, else "". `plain` is given if the exchange
        is one collective with no computation before it: the collective's bytes and label. `reads` are all other tensors of the
        caller that the exchange uses: on an accelerator it goes on after this call, and the caller may drop them at once.
        """
        rules, piece = ({}, False) if step is None else (step.rules, step.piece_of > 0 and not plan.reason)
        row = self.meter.row(index, values, dtype_name(dtype), str(plan.codec), name, plan.reason, role, rules)
        number = self._number(role, index) if step is None else step.number
        work = Work(out, partial(self._note_waiting, role) if step is None else not_counted)
        if step is not None and then is None:
            work.future()  # a hook returns it; to make it releases the GIL, which a thread that is awake by then would take
        exchange = self._compared(exchange, out, compared, number, step, last)
        if out.is_inference():
            exchange = in_inference_mode(exchange)
        finished = partial(self._finish, work, buffer, role if step is None else None, then)
        if self.world_size == 1:
            next(exchange, None)
            row.steps += 1
            self.meter.steps += last
            finished(None)
        else:
            self._sequencer.submit(
                Job(
                    *(out, exchange, row, number, dense_bytes, last, finished),
                    piece=piece,
                    backend_bytes=backend_bytes,
                    starts_at_once=None if plain is None else partial(self.wire.starts_at_once, *plain),
                    reads=reads,
                )
            )
        return work

    def _number(self, role: str, index: int) -> int:
        """Return the step of an index in the report: the number of its reductions before."""
        if role == "updates":
            return self.meter.steps
        return self._counts.get(index, 0) if role == "parameters" else self.count(index)

    def _compared(
        self, exchange: Iterator[Transfer], out: Tensor, what: str, number: int, step: Step | None, last: bool
    ) -> Iterator[Transfer]:
        """Compare the ranks' results: at the end of the step, or at once if the exchange belongs to no step."""
        if step is not None:
            comparison, ends = step.comparison, last
        else:
            comparison, ends = (Comparison(number, ()) if what and self.is_due(number) else None), True
        if comparison is None:
            return exchange
        if what:
            exchange = comparison.watch(exchange, real_view(out), what)
        return comparison.finish(exchange, self.wire, self.labels.next("hashes of this step")) if ends else exchange

    def _note_waiting(self, role: str, seconds: float) -> None:
        self._waited[role] += seconds

    def _finish(
        self,
        work: Work,
        buffer: Tensor | None,
        role: str | None,
        then: Callable[[BaseException | None], None] | None,
        error: BaseException | None,
    ) -> None:
        if role is not None:
            now = time.perf_counter()
            self._busy[role] += now - max(work.submitted, self._landed)
            self._landed = now
        if buffer is not None and error is None:
            self._scratch.give_back(buffer)
        if then is not None:
            then(error)
        work.finish(error)
