"""One order of collectives on every rank, while backward goes on.

Buckets arrive in the order in which DDP hands them out, the same on every rank. On CPU one thread encodes them and another
starts, awaits and decodes their transfers, both in that order:

    encoder   [encode 0][encode 1]   [encode 2]
    wire         |=send 0=|-|=spread 0=|=send 1=|-|=spread 1=| ...      - is recode
    decode                                [decode 0]             ...    while bucket 1 is on the wire

All transfers of a bucket start before the first of the next; only its last one is awaited later. On an accelerator
everything is enqueued on a side stream in the caller's thread, and streams wait for each other instead of threads.

An error ends the exchange for good: the group is closed, so that no peer waits for us, and every rank's future fails.
"""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from commpress.comm.exchange import Transfer, Wire
from commpress.comm.failure import FailureBoard
from commpress.comm.meter import Meter, Row
from commpress.comm.timeline import Span

STOP_SECONDS = 5.0


@dataclass
class Job:
    """One bucket's exchange. `finished(error)` is called once, when the mean is in the bucket or cannot be."""

    bucket: Tensor
    exchange: Iterator[Transfer | None]
    row: Row
    step: int
    dense_bytes: int
    last: bool
    """Whether it is the last bucket of its backward."""
    finished: Callable[[BaseException | None], None]
    submitted: float = field(default_factory=time.perf_counter)


class Sequencer:
    """Runs the jobs of one process group, until it is collected or the program ends."""

    def __init__(self, wire: Wire, meter: Meter) -> None:
        self._lines = _Lines(wire, meter)
        self._stream = None if wire.device.type == "cpu" else torch.Stream(wire.device)
        if self._stream is None:
            threads = [
                threading.Thread(target=work, args=(self._lines,), name=f"commpress {name}", daemon=True)
                for name, work in (("encode", _encode_line), ("wire", _wire_line))
            ]
            for thread in threads:
                thread.start()
            weakref.finalize(self, _stop, self._lines, threads)

    def submit(self, job: Job) -> None:
        """Take the next bucket. Call it in the same order on every rank."""
        if self._stream is None:
            self._lines.encoding.put(job)
            return
        # the side stream sees the gradient, the caller's stream sees the mean (the future records it)
        self._stream.wait_stream(torch.accelerator.current_stream(job.bucket.device))
        with self._stream:
            job.bucket.record_stream(self._stream)
            try:
                if self._lines.error is not None:
                    raise self._lines.error
                self._enqueue(job)
                self._lines.finish(job, None)
            except Exception as error:
                self._lines.note(error)
                self._lines.end([job])

    def _enqueue(self, job: Job) -> None:
        phase = "encode"
        while True:
            with record_function(f"commpress::{phase}"):
                transfer = next(job.exchange, _DONE)
            if transfer is _DONE:
                return
            if isinstance(transfer, Transfer):
                self._lines.count(job, transfer)
                with record_function("commpress::wire"):
                    transfer.wait()
                phase = "decode" if transfer.last else "encode"


_DONE = object()


class _Lines:
    """What the two threads share. They hold this and not the sequencer, so that the sequencer can be collected."""

    def __init__(self, wire: Wire, meter: Meter) -> None:
        self.wire, self.meter = wire, meter
        self.board = FailureBoard(wire.group)
        self.encoding: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.sending: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.closed = False
        self.busy = 0.0  # seconds of this step in which a bucket was under way
        self.landed = 0.0  # when the last one was done

    @contextlib.contextmanager
    def timed(self, job: Job, phase: str) -> Iterator[None]:
        """Time the codec's work on a bucket."""
        start = time.perf_counter()
        with record_function(f"commpress::{phase}"):
            yield
        self.took(job, phase, start)

    def wait(self, job: Job, transfer: Transfer, started: float) -> None:
        """Await a transfer that started then."""
        with record_function("commpress::wire"):
            transfer.wait()
        self.took(job, "wire", started)

    def took(self, job: Job, phase: str, start: float) -> None:
        """Note that a phase of a bucket lasted from then until now."""
        end = time.perf_counter()
        job.row.seconds[phase] += end - start
        self.meter.note(Span(phase, job.step, job.row.bucket, start, end))

    def count(self, job: Job, transfer: Transfer) -> None:
        job.row.sent_bytes += transfer.sent
        job.row.received_bytes += transfer.received

    def finish(self, job: Job, error: BaseException | None) -> None:
        job.row.steps += 1
        job.row.dense_bytes += job.dense_bytes
        now = time.perf_counter()
        self.busy += now - max(job.submitted, self.landed)
        self.landed = now
        if job.last:
            exposed = now - job.submitted
            self.meter.steps += 1
            self.meter.exposed += exposed
            self.meter.hidden += self.busy - exposed
            self.meter.note(Span("exposed", job.step, None, job.submitted, now))
            self.busy = 0.0
        job.finished(error)

    def note(self, error: BaseException) -> None:
        """Remember the first error; it ends the exchange."""
        if self.error is None:
            self.error = self.board.explain(error)

    def end(self, jobs: list[Job]) -> None:
        """Close the connections and fail these jobs. A transfer that is still held anywhere keeps them open."""
        if not self.closed:
            self.closed = True
            self.wire.close()
        for job in jobs:
            self.finish(job, self.error)


@dataclass
class _Flight:
    """A bucket whose last transfer is on its way."""

    job: Job
    transfer: Transfer
    started: float


def _stop(lines: _Lines, threads: list[threading.Thread]) -> None:
    """End the threads. A thread that Python's shutdown meets inside torch would take the process down with it."""
    lines.encoding.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=STOP_SECONDS)


def _encode_line(lines: _Lines) -> None:
    while (job := lines.encoding.get()) is not None:
        if lines.error is None:
            try:
                with lines.timed(job, "encode"):
                    next(job.exchange)
            except Exception as error:
                lines.note(error)  # the other thread, which holds the transfers, ends the job
        lines.sending.put(job)
    lines.sending.put(None)


def _wire_line(lines: _Lines) -> None:
    flying: list[_Flight] = []  # at most one
    while True:
        job, failed = None, False
        try:
            if flying and lines.sending.empty():
                _land(lines, flying)
            job = lines.sending.get()
            if job is None:
                return
            if lines.error is None:
                _take_off(lines, job, flying)
            else:
                failed = True
        except Exception as error:
            lines.note(error)
            failed = True
        if failed:  # outside the handler: the error's frames hold transfers
            ended = [flight.job for flight in flying] + ([] if job is None else [job])
            flying.clear()
            lines.end(ended)


def _take_off(lines: _Lines, job: Job, flying: list[_Flight]) -> None:
    """Start all transfers of a bucket and await all but the last; that one flies. Land the bucket before it meanwhile."""
    while True:
        with lines.timed(job, "encode"):
            transfer = next(job.exchange)
        assert transfer is not None
        started = time.perf_counter()
        lines.count(job, transfer)
        _land(lines, flying)
        if transfer.last:
            flying.append(_Flight(job, transfer, started))
            return
        lines.wait(job, transfer, started)


def _land(lines: _Lines, flying: list[_Flight]) -> None:
    """Await the bucket that flies, if there is one, and decode it."""
    for flight in flying:
        lines.wait(flight.job, flight.transfer, flight.started)
        with lines.timed(flight.job, "decode"):
            next(flight.job.exchange, None)
        lines.finish(flight.job, None)
    flying.clear()
