"""commpress's own group, with the ranks of the user's group: the user's messages cannot mix with its transfers.

While a group is made, every rank waits for every other, through the store. Meanwhile each rank listens, on the user's group,
for the rank before it. So a rank that dies in that time is noticed at once, and named on all other ranks:

    rank 0   make the group ... made -->  1        a connection that closes before that byte came: its rank is lost
    rank 1   make the group ... made -->  2
    rank 2   make the group ... made -->  0
"""

import contextlib
import datetime
import functools
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from commpress.comm.agreement import gather_settings
from commpress.comm.failure import GRACE, FailureBoard, LostPeerError, is_lost
from commpress.notice import host_name
from commpress.store import own_store, with_timeout

TAG = (1 << 31) - 1
"""The tag of the byte on the user's group."""
POLL = 0.02
LOOK_EVERY = 0.25
"""Seconds between two looks at what other ranks have posted."""


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta | None:
    """Return the timeout of a group on this kind of device; None if it is not known."""
    options = getattr(group._get_backend(device), "options", None)
    timeout: datetime.timedelta | None = getattr(options, "_timeout", None)
    return timeout


def follow_default_timeout(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give a group the timeout of the default group if that is shorter; groups that frameworks make may have half an hour."""
    default = dist.distributed_c10d._get_default_group()
    mine, theirs = timeout_of(default, device), timeout_of(group, device)
    if group is not default and mine is not None and (theirs is None or mine < theirs):
        dist.distributed_c10d._set_pg_timeout(mine, group)


def sibling(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, tuple[str, ...]]:
    """Return a new group of the same ranks, and the names of their hosts. Collective over those ranks only.

    Its timeout is that of `group` or of the default group, whichever is shorter (a group of a mesh has half an hour). Rank 0
    chooses its name, which no other group has. torch's own names depend on the number of groups that a rank has at the moment,
    and garbage collection may close a group on one rank only.

    Raises ExchangeError on all ranks, naming the rank, if a rank dies meanwhile or does not come within the timeout.
    """
    cpu, rank = torch.device("cpu"), dist.get_rank(group)
    timeouts = [timeout_of(one, cpu) for one in (group, dist.distributed_c10d._get_default_group())]
    timeout = min((t for t in timeouts if t is not None), default=dist.distributed_c10d.default_pg_timeout)
    everyone = gather_settings({"host": host_name(), "name": uuid.uuid4().hex}, group, cpu)
    name = f"commpress {everyone[0]['name']}"
    board = FailureBoard(f"{name}/join", rank, [str(other["host"]) for other in everyone])
    came = f"commpress/came/{name}"
    making = _Making(group, timeout, name, f"{came}/{rank}")
    listening = _Listening(group)
    deadline = time.monotonic() + timeout.total_seconds() + GRACE
    look_at = time.monotonic() + LOOK_EVERY
    while making.is_alive():
        making.join(POLL)
        if listening.error is not None:
            raise board.explain(LostPeerError(listening.peer, str(listening.error)))
        now = time.monotonic()
        if now > deadline:
            raise board.explain(LostPeerError(_missing(came, board), "Wait timeout while a group was made"))
        if now > look_at:
            look_at = now + LOOK_EVERY
            if board.has_reason():
                raise board.explain(LostPeerError(None, "a rank has left while a group was made"))
    if making.error is not None:
        error = making.error
        lost = is_lost(error) or "imed out" in str(error)
        raise board.explain(LostPeerError(_missing(came, board), f"Wait timeout: {error}") if lost else error)
    assert making.made is not None
    listening.tell(group, deadline)
    if listening.error is not None:
        raise board.explain(LostPeerError(listening.peer, str(listening.error)))
    return making.made, board.hosts


def part_of(group: dist.ProcessGroup, members: Sequence[int], name: str, device: torch.device) -> dist.ProcessGroup:
    """Return a group of some ranks of `group` (`members`, this rank included), with its backend and timeout. Collective over
    `members`.

    `name` is the same on all of them, and no other group has it. If init_process_group was given a `device_id`, torch splits
    NCCL's default group: then all ranks of that group must make such a part at the same time.
    """
    ranks = dist.get_process_group_ranks(group)
    config = dist.distributed_c10d.get_backend_config(group)
    backends = {part.rpartition(":")[2] for part in config.split(",")}
    with _named(name):
        made = dist.new_group(
            [ranks[member] for member in members],
            timeout=timeout_of(group, device),
            backend=backends.pop() if len(backends) == 1 else config,
            use_local_synchronization=True,
            group_desc="commpress",
        )
    assert isinstance(made, dist.ProcessGroup)
    assert dist.get_rank(made) == members.index(dist.get_rank(group))  # torch sorts the ranks
    return made


class _Making(threading.Thread):
    """A thread that makes the group, which waits for all its ranks."""

    def __init__(self, group: dist.ProcessGroup, timeout: datetime.timedelta, name: str, came: str) -> None:
        super().__init__(name="commpress joins", daemon=True)
        self._ranks, self._timeout = dist.get_process_group_ranks(group), timeout
        self._name, self._came = name, came
        self.made: dist.ProcessGroup | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            own_store().set(self._came, "1")
            with _named(self._name):
                made = dist.new_group(
                    self._ranks, timeout=self._timeout, use_local_synchronization=True, group_desc="commpress"
                )
            assert isinstance(made, dist.ProcessGroup)
            # a rank that fails at once would close its connections while others are still making theirs
            dist.barrier(group=made)
            self.made = made
        except BaseException as error:
            self.error = error


class _Listening(threading.Thread):
    """A thread that waits, on the user's group, for the byte by which the rank before this one says that it has its group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(name="commpress listens", daemon=True)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self.peer, self._next = (rank - 1) % world_size, (rank + 1) % world_size
        self._group: dist.ProcessGroup | None = group
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        byte = torch.zeros(1, dtype=torch.uint8, device="cpu")
        try:
            dist.recv(byte, group=self._group, tag=TAG, group_src=self.peer)
        except BaseException as error:
            self.error = error
        self._group = None

    def tell(self, group: dist.ProcessGroup, deadline: float) -> None:
        """Send the byte to the next rank, since this one has made its group, and wait for that of the rank before."""
        byte = torch.ones(1, dtype=torch.uint8, device="cpu")
        try:
            dist.send(byte, group=group, tag=TAG, group_dst=self._next)
            self.join(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            self.error = error


def _missing(came: str, board: FailureBoard) -> int | None:
    """Return the first rank that has not begun to make the group; None if all have, or if the store does not answer."""
    ranks = range(len(board.hosts))
    try:
        return with_timeout(GRACE, lambda: next((r for r in ranks if not own_store().check([f"{came}/{r}"])), None))
    except (RuntimeError, TimeoutError):
        return None


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Have torch give this name to the group that this thread makes; groups of other threads get their names as before."""
    _install_names()
    _wanted.name = name
    try:
        yield
    finally:
        del _wanted.name


_wanted = threading.local()
"""The name of the group that a thread makes."""


@functools.cache
def _install_names() -> None:
    """Patch torch so that it takes a group's name from `_wanted` first. The patch stays: other threads may be using it."""
    c10d = dist.distributed_c10d
    torchs = c10d._process_group_name

    def named(ranks: Any, use_hashed_name: bool) -> Any:
        mine = getattr(_wanted, "name", None)
        return torchs(ranks, use_hashed_name) if mine is None else mine

    c10d._process_group_name = named
