"""Measuring: forms in processes of their own, so that none disturbs another, called in turns."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

from commpress.model.judgement import runtimes
from commpress.model.judgement.forms import Form

LEAST_CALLS, MOST_CALLS = 20, 200
SECONDS = 4.0
"""About as long each form is called; a slow one has LEAST_CALLS all the same."""
TURNS = 10
PATIENCE = 600.0
"""Seconds in which a process must answer: a compiler takes minutes for a large model."""


class FormError(ValueError):
    """A form that its runtime cannot load or call; the text says which and why."""


@dataclass(frozen=True)
class Speed:
    """Calls of one form with so many threads."""

    threads: int
    calls: int
    median: float
    """Seconds."""
    p95: float
    turns: list[float]
    """The median of each turn; turn by turn dense and small met the same machine."""
    waited: float | None
    """The share of the time in which one thread did not run, because the machine had other work; None for several threads."""
    loading_bytes: int | None
    """The largest memory while the form was loaded and first called, above that of the loaded runtime. None: not Linux."""
    calling_bytes: int | None
    """The largest memory of the calls, with what is loaded."""


class Process:
    """A process that has loaded one form. Use as a context. Raises FormError if it cannot, or if it ends."""

    def __init__(self, form: Form, inputs: Sequence[Any], threads: int) -> None:
        self.form, self._log = form, tempfile.TemporaryFile()  # noqa: SIM115  closed at the end of the context
        self._connection, theirs = Pipe()
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, runtimes.__file__, str(number)],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        theirs.close()
        job = {"runtime": form.runtime, "path": str(form.runs), "threads": threads, "inputs": list(inputs)}
        self._send({**job, "modules": [os.getcwd() if path == "" else path for path in sys.path]})
        self.loaded: dict[str, Any] | None = None

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()  # it ends by itself
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def load(self) -> dict[str, Any]:
        """Wait until the form is there: seconds of the first call, and the memory of loading."""
        if self.loaded is None:
            found: dict[str, Any] = self._receive()
            self.loaded = found
        return self.loaded

    def ask(self, what: str, of: Any = None) -> Any:
        """One question of the protocol, and its answer."""
        self.load()
        self._send((what, of))
        return self._receive()

    def _send(self, thing: Any) -> None:
        try:
            self._connection.send(thing)
        except OSError:
            raise FormError(f"{self._named}: {self._last_words()}") from None

    def _receive(self) -> Any:
        connection: Connection = self._connection
        try:
            if not connection.poll(PATIENCE):
                raise FormError(f"{self._named}: no answer in {PATIENCE:.0f} s")
            found = connection.recv()
        except (EOFError, OSError):
            raise FormError(f"{self._named}: {self._last_words()}") from None
        if isinstance(found, str):
            raise FormError(f"{self._named}: {found.splitlines()[0][:300]}")
        return found

    @property
    def _named(self) -> str:
        return f"{self.form.file} in {self.form.runtime}"

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with code {code}{f': {lines[-1][:300]}' if lines else ''}"


def in_turns(processes: Sequence[Process], threads: int) -> list[Speed]:
    """The speeds of forms that are loaded, each called in turn until all have enough calls. Raises FormError."""
    counts = []
    for each in processes:
        (usual,), _ = each.ask("calls", 1)
        counts.append(min(max(int(SECONDS / max(usual, 1e-9)), LEAST_CALLS), MOST_CALLS))
    turns: list[list[tuple[list[float], float]]] = [[] for _ in processes]
    for _ in range(TURNS):
        for each, count, found in zip(processes, counts, turns, strict=True):
            found.append(each.ask("calls", 1 + -(-count // TURNS)))
    return [_speed(each, found, threads) for each, found in zip(processes, turns, strict=True)]


def _speed(process: Process, turns: list[tuple[list[float], float]], threads: int) -> Speed:
    # what another has left in the caches is gone behind the first call of a turn
    times = [seconds for turn, _ in turns for seconds in turn[1:]]
    wall, busy = sum(sum(turn) for turn, _ in turns), sum(busy for _, busy in turns)
    return Speed(
        threads=threads,
        calls=len(times),
        median=statistics.median(times),
        p95=statistics.quantiles(times, n=20)[-1],
        turns=[statistics.median(turn[1:]) for turn, _ in turns],
        waited=max(0.0, 1 - busy / wall) if threads == 1 else None,
        loading_bytes=process.load()["peak"],
        calling_bytes=process.ask("peak"),
    )
