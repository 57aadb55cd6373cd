"""One order of collectives on every rank, while backward goes on.

Buckets arrive in the order in which DDP hands them out, the same on every rank. On CPU one thread encodes them and another
starts, awaits and decodes their transfers, both in that order:

    encoder   [encode 0][encode 1]   [encode 2]
    wire         |=send 0=|-|=spread 0=|=send 1=|-|=spread 1=| ...      - is recode
    decode                                [decode 0]             ...    while bucket 1 is on the wire

All transfers of a bucket start before the first of the next; only its last one is awaited later. On an accelerator
everything is enqueued on a side stream in the caller's thread, and streams wait for each other instead of threads.

An error ends the exchange for good: the group is aborted, so that no peer waits for us, and every rank's future fails.
"""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.exchange import Transfer
from commpress.comm.failure import FailureBoard
from commpress.comm.meter import Meter, Row

STOP_SECONDS = 5.0


@dataclass
class Job:
    """One bucket's exchange. `finished(error)` is called once, when the mean is in the bucket or cannot be."""

    bucket: Tensor
    exchange: Iterator[Transfer | None]
    row: Row
    dense_bytes: int
    last: bool
    """Whether it is the last bucket of its backward."""
    finished: Callable[[BaseException | None], None]
    submitted: float = field(default_factory=time.perf_counter)


class Sequencer:
    """Runs the jobs of one process group, until it is collected or the program ends."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, meter: Meter) -> None:
        self._lines = _Lines(FailureBoard(group, device), meter)
        self._stream = None if device.type == "cpu" else torch.Stream(device)
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
                for transfer in job.exchange:
                    if transfer is not None:
                        self._lines.count(job, transfer)
                        transfer.wait()
                self._lines.finish(job, None)
            except Exception as error:
                self._lines.fail(job, error)


class _Lines:
    """What the two threads share. They hold this and not the sequencer, so that the sequencer can be collected."""

    def __init__(self, board: FailureBoard, meter: Meter) -> None:
        self.board, self.meter = board, meter
        self.encoding: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.sending: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.busy_since = 0.0

    def count(self, job: Job, transfer: Transfer) -> None:
        job.row.sent_bytes += transfer.sent
        job.row.received_bytes += transfer.received

    def finish(self, job: Job, error: BaseException | None) -> None:
        job.row.steps += 1
        job.row.dense_bytes += job.dense_bytes
        self.busy_since = self.busy_since or job.submitted
        if job.last:
            now = time.perf_counter()
            self.meter.steps += 1
            self.meter.exposed += now - job.submitted
            self.meter.hidden += job.submitted - self.busy_since
            self.busy_since = 0.0
        job.finished(error)

    def fail(self, job: Job, error: BaseException) -> None:
        if self.error is None:
            self.error = self.board.end(error)
        self.finish(job, self.error)


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
                with _timed(job.row, "encode"):
                    next(job.exchange)
            except Exception as error:
                lines.fail(job, error)
                continue
        lines.sending.put(job)
    lines.sending.put(None)


def _wire_line(lines: _Lines) -> None:
    flying: tuple[Job, Transfer, float] | None = None  # the bucket whose last transfer is on its way
    while True:
        if flying is not None and lines.sending.empty():
            _land(lines, *flying)
            flying = None
        job = lines.sending.get()
        if job is None:
            return
        try:
            if lines.error is not None:
                raise lines.error
            while True:
                with _timed(job.row, "encode"):
                    transfer = next(job.exchange)
                assert transfer is not None
                started = time.perf_counter()
                lines.count(job, transfer)
                if flying is not None:
                    _land(lines, *flying)
                    flying = None
                if transfer.last:
                    flying = (job, transfer, started)
                    break
                transfer.wait()
                job.row.seconds["wire"] += time.perf_counter() - started
        except Exception as error:
            lines.fail(job, error)


def _land(lines: _Lines, job: Job, transfer: Transfer, started: float) -> None:
    try:
        transfer.wait()
        job.row.seconds["wire"] += time.perf_counter() - started
        with _timed(job.row, "decode"):
            next(job.exchange, None)
        lines.finish(job, None)
    except Exception as error:
        lines.fail(job, error)


@contextlib.contextmanager
def _timed(row: Row, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    row.seconds[phase] += time.perf_counter() - start
