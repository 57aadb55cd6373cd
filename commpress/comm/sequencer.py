"""One order of collectives on every rank, while backward goes on.

Buckets arrive in DDP's order, the same on every rank. On CPU one thread encodes them and starts their first transfers. A second
thread waits for those, starts the next transfers, and decodes. Both keep the order of the buckets:

    encode thread   [encode 0][encode 1]         [encode 2]
    network                   |== send 0 ==|== send 1 ==|=2=|= send 2 =| ...
    wire thread                             [recode 0]  [decode 0][recode 1] ...

So a bucket is sent as soon as it is encoded. An uncompressed bucket starts in the caller's thread if no other is before it: as
without commpress, it does not wait for another thread. On an accelerator everything is enqueued on a side stream in the
caller's thread, and streams wait for each other instead of threads.

An error ends the exchange for good: the group is closed, so that no peer waits for this rank, and every rank's future fails.
"""

import atexit
import contextlib
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from commpress.comm.agreement import Settings
from commpress.comm.exchange import Label, Transfer, Wire
from commpress.comm.failure import LostPeerError
from commpress.comm.meter import Meter, Row
from commpress.comm.timeline import Span

STOP_SECONDS = 5.0
THREADS = ("commpress encode", "commpress wire")
NO_BUCKET = -1
"""The index of a job that is not a bucket; it is in no report."""


@dataclass
class Job:
    """One bucket's exchange. `finished(error)` is called once, when the mean is in the bucket or cannot be."""

    bucket: Tensor
    exchange: Iterator[Transfer]
    row: Row
    step: int
    dense_bytes: int
    last: bool
    """Whether it is the last bucket of its backward."""
    finished: Callable[[BaseException | None], None]
    piece: bool = False
    """Whether it is a piece of a bucket: those of one step and row count as one."""
    submitted: float = field(default_factory=time.perf_counter)
    backend_bytes: int | None = None
    """Bytes that the group itself would send uncompressed, if they are not `dense_bytes`."""
    starts_at_once: Callable[[], bool] | None = None
    """Whether its first transfer can start now, without computing and without waiting for other ranks. None: it cannot."""
    reads: tuple[Tensor, ...] = ()
    """Other tensors of the caller that it uses, and that the caller may drop before the end."""


class Sequencer:
    """The runner of one process group's jobs. Its connections close when it is garbage collected or the program ends."""

    def __init__(self, wire: Wire, meter: Meter) -> None:
        self._lines = _Lines(wire, meter)
        self._stream = None if wire.device.type == "cpu" else torch.Stream(wire.device)
        if self._stream is None:
            threads = [
                threading.Thread(target=work, args=(self._lines,), name=name, daemon=True)
                for name, work in zip(THREADS, (_encode_line, _wire_line), strict=True)
            ]
            for thread in threads:
                thread.start()
            self._ender = weakref.finalize(self, _stop, self._lines, threads)
            _sequencers.add(self)

    def submit(self, job: Job) -> None:
        """Take the next bucket. Call it in the same order on every rank."""
        if self._stream is None:
            lines = self._lines
            # the caller must not wait here: other ranks may need its next action before they come to this bucket
            if job.starts_at_once is not None and lines.given == lines.handed_on and job.starts_at_once():
                lines.flying.put(_encoded(lines, job))
            else:
                lines.given += 1
                lines.encoding.put(job)
            return
        # the side stream sees the gradient, the caller's stream sees the mean (the future records it). What the caller drops
        # while the side stream still uses it must not be allocated anew meanwhile
        self._stream.wait_stream(torch.accelerator.current_stream(job.bucket.device))
        with self._stream:
            for used in (job.bucket, *job.reads):
                used.record_stream(self._stream)
            try:
                if self._lines.error is not None:
                    raise self._lines.error
                self._enqueue(job)
                self._lines.finish(job, None)
            except Exception as error:
                self._lines.note(error)
                self._lines.end([job])

    def ask(self, settings: Settings, label: Label) -> list[Settings]:
        """Return every rank's settings (JSON values), in the order of the ranks. Collective; call it between steps.

        Raises ExchangeError on all ranks if one is gone, or does something else. This error also ends the exchange.
        """
        error: BaseException | None = self._lines.error
        if error is None:
            try:
                return self._lines.wire.gather(settings, label)
            except Exception as found:
                self._lines.note(found)
                error = self._lines.error
            self._lines.end([])
        assert error is not None
        raise error

    def fail(self, error: BaseException) -> BaseException:
        """End the exchange on all ranks because of this rank's error. Returns the error to raise."""
        self._lines.note(error)
        self._lines.end([])
        assert self._lines.error is not None
        return self._lines.error

    def _enqueue(self, job: Job) -> None:
        phase = "encode"
        while True:
            with self._lines.timed(job, phase):
                transfer = next(job.exchange, _DONE)
            if transfer is _DONE:
                return
            assert isinstance(transfer, Transfer)
            self._lines.count(job, transfer)
            with self._lines.timed(job, "wire"):
                transfer.wait()
            phase = "decode" if transfer.last or transfer.decodes else "encode"


_DONE = object()


class _Lines:
    """State that the two threads share. They hold this and not the sequencer, so that the sequencer can be collected."""

    def __init__(self, wire: Wire, meter: Meter) -> None:
        self.wire, self.meter = wire, meter
        self.board = wire.board
        self.encoding: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.flying: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self.given = 0  # jobs for the encode thread, counted by the caller
        self.handed_on = 0  # jobs that it has put into `flying`, counted by the encode thread
        self.error: BaseException | None = None
        self.noting = threading.Lock()
        self.closed = False
        self.busy = 0.0  # seconds of this step in which a bucket was being exchanged
        self.landed = 0.0  # when the last exchange ended
        self.counted: dict[
            int, int
        ] = {}  # the last step of each row that counts pieces, by the row's id: the meter keeps rows

    @contextlib.contextmanager
    def timed(self, job: Job, phase: str) -> Iterator[None]:
        """Time the codec's work on a bucket."""
        start = time.perf_counter()
        with record_function(f"commpress::{phase}"):
            yield
        self.took(job, phase, start)

    def took(self, job: Job, phase: str, start: float) -> None:
        """Note that a phase of a bucket lasted from `start` (`time.perf_counter`) until now."""
        end = time.perf_counter()
        job.row.seconds[phase] += end - start
        if job.row.bucket != NO_BUCKET:
            self.meter.note(Span(phase, job.step, job.row.bucket, start, end))

    def count(self, job: Job, transfer: Transfer) -> None:
        job.row.sent_bytes += transfer.sent
        job.row.inside_bytes += transfer.sent * transfer.inside
        job.row.received_bytes += transfer.received

    def finish(self, job: Job, error: BaseException | None) -> None:
        job.row.steps += not (job.piece and self.counted.get(id(job.row)) == job.step)
        if job.piece:
            self.counted[id(job.row)] = job.step
        job.row.dense_bytes += job.dense_bytes
        job.row.backend_bytes += job.dense_bytes if job.backend_bytes is None else job.backend_bytes
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
        with self.noting:
            if self.error is None:
                cause = error
                if isinstance(cause, LostPeerError) and cause.peer is None and self.wire.device.type == "cpu":
                    cause = self.wire.lost_peer(str(cause))
                self.error = self.board.explain(cause)
            for one in (error, error.__cause__, error.__context__):
                if one is not None:  # an error's frames hold transfers, which keep the connections open
                    traceback.clear_frames(one.__traceback__)

    def end(self, jobs: list[Job]) -> None:
        """Close the connections and fail these jobs. A transfer that is still held anywhere keeps them open: an exchange that
        has stopped halfway may hold its own."""
        for job in jobs:
            job.exchange = iter(())
        if not self.closed:
            self.closed = True
            self.wire.close()
        for job in jobs:
            self.finish(job, self.error)


@dataclass
class _Flight:
    """A bucket and its transfer under way; the transfer is None if nothing is to be sent, or if an error occurred."""

    job: Job
    transfer: Transfer | None = None
    started: float = 0.0

    def go_on(self, lines: _Lines) -> None:
        """Do the codec's work up to the next transfer, and start it."""
        with lines.timed(self.job, "decode" if self.transfer is not None and self.transfer.decodes else "encode"):
            self.transfer = next(self.job.exchange, None)
        self.started = time.perf_counter()
        if self.transfer is not None:
            lines.count(self.job, self.transfer)

    def arrive(self, lines: _Lines) -> None:
        """Wait until the transfer has arrived."""
        assert self.transfer is not None
        with record_function("commpress::wire"):
            self.transfer.wait()
        lines.took(self.job, "wire", self.started)


_sequencers: "weakref.WeakSet[Sequencer]" = weakref.WeakSet()
"""All sequencers with threads."""


@atexit.register
def _end_all() -> None:
    """End the threads before Python shuts down. A thread that drops the last reference to its sequencer runs `_stop` itself, so
    it must be joined here."""
    until = time.monotonic() + 2 * STOP_SECONDS  # torchrun kills a process after 30 s
    for sequencer in list(_sequencers):
        sequencer._ender()
    for thread in threading.enumerate():
        if thread.name in THREADS:
            thread.join(timeout=max(0.0, until - time.monotonic()))


def _stop(lines: _Lines, threads: list[threading.Thread]) -> None:
    """End the threads and the connections. If Python shut down while a thread is inside torch, the process would crash."""
    lines.encoding.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=STOP_SECONDS)
    if not lines.closed:
        lines.closed = True
        lines.wire.close()


def _encode_line(lines: _Lines) -> None:
    while (job := lines.encoding.get()) is not None:
        lines.flying.put(_encoded(lines, job))
        lines.handed_on += 1
        del job  # so that its tensors are freed while this thread waits for the next job
    lines.flying.put(None)


def _encoded(lines: _Lines, job: Job) -> _Flight:
    flight = _Flight(job)
    if lines.error is None:
        try:
            flight.go_on(lines)
        except Exception as error:
            lines.note(error)  # the other thread ends the job
    return flight


def _wire_line(lines: _Lines) -> None:
    landing: list[_Flight] = []  # at most one: a bucket on its last transfer
    while True:
        flight, failed = None, False
        try:
            if landing and lines.flying.empty():
                _land(lines, landing)
            flight = lines.flying.get()
            if flight is None:
                return
            if lines.error is None:
                _fly(lines, flight, landing)
            else:
                failed = True
        except Exception as error:
            lines.note(error)
            failed = True
        if failed:  # outside the handler: the error's frames hold transfers
            _crash(lines, landing + ([] if flight is None else [flight]))
            landing.clear()


def _fly(lines: _Lines, flight: _Flight, landing: list[_Flight]) -> None:
    """Finish the bucket before this one, then take this one to its last transfer."""
    _land(lines, landing)
    while flight.transfer is not None and not flight.transfer.last:
        flight.arrive(lines)
        flight.go_on(lines)
    landing.append(flight)


def _land(lines: _Lines, landing: list[_Flight]) -> None:
    """Wait for the last transfer of the bucket in `landing`, if there is one, and decode it."""
    for flight in landing:
        if flight.transfer is not None:
            flight.arrive(lines)
            with lines.timed(flight.job, "decode"):
                next(flight.job.exchange, None)
        lines.finish(flight.job, None)
    landing.clear()


def _crash(lines: _Lines, flights: list[_Flight]) -> None:
    """Drop all transfers, also those in the queue, so that the connections close; then fail the jobs."""
    ends = False
    while not lines.flying.empty():
        queued = lines.flying.get()
        ends = ends or queued is None
        flights += [] if queued is None else [queued]
    if ends:
        lines.flying.put(None)
    for flight in flights:
        flight.transfer = None
    lines.end([flight.job for flight in flights])
