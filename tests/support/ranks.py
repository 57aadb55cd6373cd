"""Real ranks for tests: a pool of processes that stay from test to test, forked from one that has imported commpress.

    results = run(3, function, *args)       # function(*args) on ranks 0, 1, 2, each in a Gloo group of three

`function` is a module-level function of the test module. An exception on any rank fails the test with its traceback.
"""

import atexit
import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

AFTERMATH = 3.0
"""Seconds that the other ranks get to say what they saw once one has failed."""


class RankError(AssertionError):
    """A rank raised, ended or did not answer in time."""


@dataclass(frozen=True)
class Died:
    """The result, in a `fresh` run, of a rank whose process ended."""

    exitcode: int | None


@dataclass
class _Worker:
    process: Any
    pipe: Connection


@dataclass
class _Pool:
    """Ranks, forked from a process that has imported the modules of `parent`; they import `libraries` themselves."""

    parent: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    workers: list[_Worker] = field(default_factory=list)

    def take(self, world_size: int) -> list[_Worker]:
        """Return the first ranks, started where they are missing or have ended."""
        if any(not worker.process.is_alive() for worker in self.workers):
            self.close()
        while len(self.workers) < world_size:
            here, there = _context.Pipe()
            process = _context.Process(target=_serve, args=(there, (*self.parent, *self.libraries)), daemon=True)
            with _forked_from(self.parent):
                process.start()
            there.close()
            self.workers.append(_Worker(process, here))
        return self.workers[:world_size]

    def close(self) -> None:
        """End all ranks."""
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGKILL)
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()


BARE = (
    "torch",
    "torch._dynamo",  # DDP and the optimizers import it at their first step
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch.optim",
    "compiler",
    "rich.table",
)
"""Modules that a rank has imported if nothing that is under test may be there."""
WARM = (*BARE, "warm")
_context = multiprocessing.get_context("forkserver")
_parents: dict[tuple[str, ...], forkserver.ForkServer] = {}
_pool = _Pool(WARM)
_stores = itertools.count()


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    group_timeout: float = 20,
    fresh: bool = False,
    bare: bool = False,
    tcp: bool = False,
) -> list[Any]:
    """Call `function(*args)` on each of `world_size` ranks of a new default group; return the results by rank.

    Raises RankError if a rank raises, if its process ends, or after `timeout` seconds. With `fresh` the processes are new and
    not used again, and a rank that ends has `Died` for its result; with `bare` they have not imported commpress, either.
    `tcp` keeps the store in rank 0's process, not in a file.
    """
    fresh = fresh or bare
    pool = _Pool(BARE) if bare else _Pool(WARM, _pool.libraries) if fresh else _pool
    try:
        workers = pool.take(world_size)
        url = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{_folder()}/{next(_stores)}"
        call = pickle.dumps((function, args))
        for rank, worker in enumerate(workers):
            worker.pipe.send_bytes(pickle.dumps((sys.path, url, rank, world_size, group_timeout, call)))
        results = _collect(workers, time.monotonic() + timeout, timeout, may_die=fresh)
    except BaseException:  # Ctrl-C too: the ranks are in the middle of something
        pool.close()
        raise
    if fresh:
        pool.close()
    return results


@contextlib.contextmanager
def apart(*libraries: str) -> Iterator[None]:
    """Run the ranks of this context in processes of their own, which import `libraries` before anything else."""
    global _pool
    before, _pool = _pool, _Pool(WARM, libraries)
    try:
        yield
    finally:
        _pool.close()
        _pool = before


@atexit.register
def close() -> None:
    """End all ranks. The next `run` starts new ones."""
    _pool.close()
    if _folder.cache_info().currsize:
        shutil.rmtree(_folder(), ignore_errors=True)
        _folder.cache_clear()


@contextlib.contextmanager
def _forked_from(modules: tuple[str, ...]) -> Iterator[None]:
    """Let multiprocessing fork from the process that has imported `modules`; it starts when it is first wanted."""
    if modules not in _parents:
        _parents[modules] = forkserver.ForkServer()
        _parents[modules].set_forkserver_preload(list(modules))
    parent = _parents[modules]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}):
        parent.ensure_running()
    with mock.patch.object(forkserver, "connect_to_new_process", parent.connect_to_new_process):
        yield


@functools.cache
def _folder() -> str:
    """The folder of the stores, which stays until the ranks end.

    A rank may drop the last reference to a group in a later call: its store ends the process if the folder is gone.
    """
    return tempfile.mkdtemp(prefix="commpress-ranks-")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(workers: list[_Worker], deadline: float, timeout: float, may_die: bool) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    ranks = {worker.pipe: rank for rank, worker in enumerate(workers)}
    while len(results) + len(failures) < len(workers):
        waiting = [pipe for pipe, rank in ranks.items() if rank not in results and rank not in failures]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = ranks[pipe]  # type: ignore[index]
            try:
                good, value = pickle.loads(workers[rank].pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                workers[rank].process.join(AFTERMATH)
                good, value = may_die, Died(workers[rank].process.exitcode)
            if good:
                results[rank] = value
            else:
                failures[rank] = f"rank {rank} of {len(workers)}: {value}"
                deadline = min(deadline, time.monotonic() + AFTERMATH)
    silent = [rank for rank in range(len(workers)) if rank not in results and rank not in failures]
    if failures:
        tail = f"\n(without an answer by then: ranks {silent})" if silent else ""
        raise RankError("\n".join(failures[rank] for rank in sorted(failures)) + tail)
    if silent:
        for rank in silent:
            os.kill(workers[rank].process.pid, signal.SIGUSR1)  # prints where its threads stand
        time.sleep(1)
        raise RankError(f"ranks {silent} of {len(workers)} gave no answer in {timeout} s (their stacks are on stderr)")
    return [results[rank] for rank in range(len(workers))]


def _serve(pipe: Connection, modules: tuple[str, ...]) -> None:
    """Run calls in a rank's process, one after another, until the pipe closes."""
    for name in modules:  # they are there, unless the import failed: multiprocessing says nothing of that
        importlib.import_module(name)
    gc.freeze()  # what is imported stays: no collection looks through it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            path, url, rank, world_size, group_timeout, call = pickle.loads(pipe.recv_bytes())
            sys.path[:] = path
            try:
                answer = pickle.dumps((True, _called(url, rank, world_size, group_timeout, call)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)


def _called(url: str, rank: int, world_size: int, group_timeout: float, call: bytes) -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a program that ran here before may have set another number, and not on all ranks
    dist.init_process_group(
        "gloo",
        init_method=url,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=group_timeout),
    )
    try:
        dist.barrier()  # a rank that is done early does not go while another still connects to it
        function, args = pickle.loads(call)
        with mock.patch.dict(os.environ):  # what it sets ends with it
            return function(*args)
    finally:
        dist.destroy_process_group()


def outcome(action: Callable[[], Any]) -> str:
    """Return what `action()` raises, as "Type: message"; "" if it returns."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
