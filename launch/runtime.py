"""The ranks of a program together: they join, find out who failed, and stop and end with one sentence and one code.

A step that every rank takes by itself (read its data, write its checkpoint) goes through `together`: the results are gathered,
so no rank waits for one that has failed. An error in the middle of a collective cannot be gathered: `in_one_voice` writes the
reason into the store, and the others, whose connections close, read it there.
"""

import contextlib
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from commpress.comm.agreement import gather_settings
from commpress.comm.failure import ExchangeError
from commpress.notice import global_rank, host_name
from commpress.store import own_store, with_timeout

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds for which a rank that lost another looks for the reason in the store."""
KEY = "commpress/launch/failure"
SILENCE = 30.0
"""Seconds in which a store that is still there answers, on a host with much else to do."""
ASKED = itertools.count()
"""What the ranks have spoken of in the store; rank 0's number counts."""
STOPPED = "asked to stop before rank 0 was done with what all ranks waited for; run the same command again to repeat it"
LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|timed? ?out", re.IGNORECASE)
"""Words in the errors of a process group that lost a rank."""


class TrainingError(ValueError):
    """Training cannot start or go on. All ranks know, so only rank 0 prints it."""


class LoneError(TrainingError):
    """An error that only this rank met: it prints it, too."""


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """The default process group, joined if necessary and left at the end, and this rank's device.

    Raises LoneError if this rank cannot join the others.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    backend = "nccl" if cuda else "gloo"
    try:
        if "RANK" in os.environ:  # torchrun
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    except (ValueError, RuntimeError, OSError) as error:
        raise LoneError(f"{named(global_rank(), host_name())}cannot join the other ranks: {error}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


def together(action: Callable[[], T], device: torch.device) -> T:
    """Call `action` on every rank, and return its result on this one. Collective; `action` must not be.

    Raises TrainingError on all ranks if it fails on one of them. The sentence says on which rank of which host, unless it
    is the same on all.
    """
    said = ""
    result: T
    cause: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others must hear of it
        said, cause = sentence(error), error
    # one number in the usual case
    failed = torch.tensor([float(cause is not None)], dtype=torch.float32, device=device)
    dist.all_reduce(failed)
    if not failed.item():
        return result
    found = gather_settings({"said": said, "host": host_name()}, dist.distributed_c10d._get_default_group(), device)
    everyone = [(str(of["host"]), str(of["said"])) for of in found]
    kind = LoneError if said and said != joined(everyone) else TrainingError
    raise kind(joined(everyone)) from cause


def by_first_rank(action: Callable[[], Any], device: torch.device) -> Any:
    """Call a function on rank 0 that may take longer than a group's timeout; return its result on all ranks. Collective.

    The result must fit into JSON. Raises TrainingError on all ranks, with the sentence, if it fails or if they are asked to
    stop, and LoneError on a rank that lost rank 0, or that alone is asked to stop.
    """
    from commpress.model.first_rank import LostFirstRankError, done_by_first_rank

    who, asked_at = named(dist.get_rank(), host_name()), math.inf

    def said() -> dict[str, Any]:
        try:
            with _ended_by_signals():
                return {"returned": action()}
        except KeyboardInterrupt:
            return {"failed": STOPPED}
        except Exception as error:  # whatever it is, the others must hear of it
            return {"failed": sentence(error)}

    def leave_if_asked() -> None:
        nonlocal asked_at
        if (stop := _installed_stop()) and stop.asked:
            asked_at = min(asked_at, time.monotonic())
        if time.monotonic() - asked_at > PATIENCE:  # rank 0 was not asked, or cannot hear it now
            post(f"{who}{STOPPED}")
            raise LoneError(f"{who}{STOPPED}")

    try:
        found = done_by_first_rank(said, None, device, leave_if_asked)
    except LostFirstRankError as error:
        raise LoneError(f"{who}{error}") from error
    if "failed" in found:
        raise TrainingError(found["failed"])
    return found["returned"]


def joined(said: list[tuple[str, str]]) -> str:
    """Return one line for the ranks' errors ((host, sentence) by rank, "" for none)."""
    failed = [(rank, host, text) for rank, (host, text) in enumerate(said) if text]
    texts = dict.fromkeys(text for _, _, text in failed)
    if len(failed) == len(said) and len(texts) == 1:
        return failed[0][2]
    lines = []
    for text in texts:
        ranks = [named(rank, host).removesuffix(": ") for rank, host, other in failed if other == text]
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        lines.append(f"{', '.join(ranks[:3])}{more}: {text}")
    return "; ".join(lines)


def named(rank: int, host: str) -> str:
    """Return the start of a sentence about one rank."""
    return f"rank {rank} ({host}): "


def require_same_flags(mine: dict[str, object], device: torch.device) -> None:
    """Raise TrainingError on all ranks if one has another value for a flag than rank 0; keys are Python's names. Collective."""
    group = dist.distributed_c10d._get_default_group()
    everyone = gather_settings({**mine, "host": host_name()}, group, device)
    for rank, other in enumerate(everyone):
        for name in mine:
            if str(here := other[name]) != str(there := everyone[0][name]):  # NaN is unlike itself
                flag = f"--{name.replace('_', '-')}"
                who = named(rank, str(other["host"])).removesuffix(": ")
                kind = LoneError if rank == dist.get_rank() else TrainingError
                raise kind(f"{who} has {flag} {here}, rank 0 has {flag} {there}: all ranks need the same")


def or_too_coarse(session: Any) -> str:
    """Return the end of a sentence that names the lossy codecs by which a session sends now; empty if there are none."""
    optimizer = getattr(getattr(session, "step_buffer", None), "optimizer", None)
    if optimizer is not None and optimizer.own_spec() is not None:  # it has not begun to send by the session's
        return ""
    plans = [plan for one in getattr(session, "collectives", ()) for plan in (one.gradients, one.parameters)]
    lossy = dict.fromkeys(str(plan.codec) for plan in plans if plan.codec.lossy)
    return f", or {' and '.join(lossy)} too coarse" if lossy else ""


def ranks_without(good: bool, device: torch.device) -> str:
    """Return the ranks on which `good` is false, in words; "" if it is false on none or on all. Collective."""
    group = dist.distributed_c10d._get_default_group()
    found = gather_settings({"host": host_name(), "good": good}, group, device)
    bad = [named(rank, str(of["host"])).removesuffix(": ") for rank, of in enumerate(found) if not of["good"]]
    return ", ".join(bad) if len(bad) < len(found) else ""


def sentence(error: BaseException) -> str:
    """Return an error as one line: file and reason, or a message; for an unexpected error also its place."""
    return " ".join(_said(error).split())


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error) or type(error).__name__
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, RuntimeError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return text + "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last)


@contextlib.contextmanager
def same_error_on_all_ranks() -> Iterator[None]:
    """Turn an error that all ranks meet into a TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except (ValueError, TypeError) as error:
        raise TrainingError(str(error)) from error


@contextlib.contextmanager
def in_one_voice() -> Iterator[None]:
    """Run a collective program: an error on this rank becomes a TrainingError that names the rank, and reaches the others.

    A rank that lost another names it and the reason, if that rank could still write it into the store.
    """
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size == 1:
            raise LoneError(sentence(error)) from error
        who = named(rank, host_name())
        if lost_another(error):
            reason = posted()
            raise LoneError(
                f"{who}ends, too: {reason}" if reason else f"{who}lost another rank: {' '.join(str(error).split())}"
            ) from error
        post(f"{who}{sentence(error)}")
        raise LoneError(f"{who}{sentence(error)}") from error


class Stop:
    """Becomes true when this process is asked to end."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False
        """Whether it also interrupts what this process does, once."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.at_once:
            self.at_once = False
            raise KeyboardInterrupt

    def __float__(self) -> float:
        return float(self.asked)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a flag. A second one changes nothing: torchrun sends one of its own."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the program that called, as under Ray Train
        return
    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _installed_stop() -> Stop | None:
    """Return the handler that `stop_signals` installed in this process, if there is one."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Stop) else None


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let what `stop_signals` hears end what runs here, by KeyboardInterrupt; it may take long, and nobody else can end it."""
    if (stop := _installed_stop()) is None:
        yield
        return
    if stop.asked:
        raise KeyboardInterrupt
    stop.at_once = True
    try:
        yield
    finally:
        stop.at_once = False


class StopOfAll:
    """A stop that one rank is asked for and all take, where each works by itself. Made by all ranks together."""

    def __init__(self, stop: Stop, device: torch.device) -> None:
        self._stop, self._device = stop, device
        group = dist.distributed_c10d._get_default_group()
        self._key = f"{KEY}/stop-{gather_settings({'asked': next(ASKED)}, group, device)[0]['asked']}"

    def asked(self) -> bool:
        """Whether a rank was asked, as far as it is known here. Raises TimeoutError or RuntimeError if the store is gone."""
        if self._stop.asked:
            with_timeout(SILENCE, lambda: own_store().set(self._key, ""))
            return True
        return bool(with_timeout(SILENCE, lambda: own_store().check([self._key])))

    def agreed(self, here: bool) -> bool:
        """Whether it is so on any rank. Collective: each comes here, stopped or done."""
        asked = torch.tensor(float(here), dtype=torch.float32, device=self._device)
        dist.all_reduce(asked)
        return asked.item() > 0


@contextlib.contextmanager
def not_disturbed_in_ending() -> Iterator[None]:
    """Run a program so that all ranks end with the same code.

    A launcher ends the slower ones by SIGTERM when the first has ended; SIGTERM is ignored after an error.
    """
    try:
        yield
    except TrainingError:
        if "RANK" in os.environ and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


def run_on_all_ranks(program: Callable[[], object]) -> None:
    """Run a collective program. A TrainingError ends it with code 1; rank 0, and a rank that met it alone, print the reason."""
    rank = global_rank()
    try:
        with process_group(), not_disturbed_in_ending():
            program()
    except TrainingError as error:
        if rank == 0 or isinstance(error, LoneError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def lost_another(error: Exception) -> bool:
    """Return whether an error is about another rank: a closed connection, or the library's text about a failed exchange."""
    if isinstance(error, ExchangeError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def post(reason: str) -> None:
    """Write the reason why this rank ends into the store, if the store can be reached."""
    _soon(lambda: dist.distributed_c10d._get_default_store().set(KEY, reason))


def posted() -> str:
    """Return the reason that another rank wrote; "" if there is none after a while."""
    found: list[str] = []

    def look() -> None:
        store = dist.distributed_c10d._get_default_store()
        waited = threading.Event()
        for _ in range(20):
            if store.check([KEY]):
                found.append(store.get(KEY).decode())
                return
            waited.wait(PATIENCE / 20)

    _soon(look)
    return found[0] if found else ""


def _soon(ask: Callable[[], object]) -> None:
    """Ask the store, with a time limit: its host may have failed."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            ask()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
