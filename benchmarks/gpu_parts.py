"""Parts of `gpu_check` in processes of their own: started, watched, and ended by their ids, whatever becomes of them."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_worker import Job

from commpress.launch.link import free_port

Record = dict[str, Any]
WORKER = Path(__file__).with_name("gpu_worker.py")
STALL_SECONDS = 90.0
"""An item that takes longer is ended. A codec's kernels have to be compiled in it, some dozens of times."""
AFTERMATH = 5.0
"""Seconds that the other ranks get once one has ended early."""
POLL = 0.05
stopped = threading.Event()
"""Set when the check is interrupted: parts that run in other threads then end, too."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""How ranks of one host find each other, unless the environment has another way: a host's name may lead nowhere."""


class Ranks:
    """The processes of one command, one a rank, each in a session of its own; ended when the block is left."""

    def __init__(self, command: Sequence[str], world_size: int, folder: Path, name: str) -> None:
        self.logs = [folder / f"{name}.{rank}.log" for rank in range(world_size)]
        self._command, self._processes = command, list[subprocess.Popen[bytes]]()

    def __enter__(self) -> "Ranks":
        W, port = len(self.logs), free_port()
        try:
            for rank, log in enumerate(self.logs):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": W, "LOCAL_WORLD_SIZE": W}
                store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment = LOOPBACK | os.environ | {key: str(value) for key, value in (place | store).items()}
                with log.open("wb") as out:
                    self._processes.append(
                        subprocess.Popen(self._command, stdout=out, stderr=out, env=environment, start_new_session=True)
                    )
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def wait(self, seconds: float, watched: Sequence[Path] = (), stall: float = 0.0) -> str:
        """Return when all have ended, "" if all did well; else why not, in words.

        So it is after `seconds`, after `stall` in which none of the `watched` files has grown, or soon after one has failed.
        """
        begun = grown = time.monotonic()
        until, size, failed = begun + seconds, -1, ""
        while any(process.poll() is None for process in self._processes):
            now = time.monotonic()
            if watched and (found := sum(p.stat().st_size for p in watched if p.exists())) != size:
                size, grown = found, now
            if stopped.is_set():
                return "stopped"
            if now > until:
                return failed or f"not done after {seconds:.0f} s, killed"
            if watched and now > grown + stall:
                return failed or f"nothing came of it in {stall:.0f} s, killed"
            if not failed and (failed := self._failure()):
                until = min(until, now + AFTERMATH)
            time.sleep(POLL)
        return failed or self._failure()

    def end(self) -> None:
        """Kill what still runs of the ranks, and of what they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it for ever
                process.wait(AFTERMATH)

    def _failure(self) -> str:
        for rank, (process, log) in enumerate(zip(self._processes, self.logs, strict=True)):
            if code := process.poll():
                how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
                who = f"rank {rank} " if len(self.logs) > 1 else ""
                return f"{who}{how}: {last_line(log) or 'it said nothing'}"
        return ""


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("[W", "Traceback"))]
    return (errors or lines or [""])[-1][:500]


def final_line(log: Path) -> str:
    """Return the last line of what a program has printed: its answer."""
    return ([line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""])[-1]


def work_off(job: Job, name: str, folder: Path, seconds: float) -> list[Record]:
    """Return a record for each item of a job, in their order; `error` says why one has no result.

    An item that ends its processes is a record, too, and the others go on in new ones.
    """
    found: dict[str, Record] = {}
    left, until, start = list(job.items), time.monotonic() + seconds, 0
    while left and time.monotonic() < until and not stopped.is_set():
        place = folder / f"{name}-{start}.json"
        place.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, items=left))))
        outputs = [place.with_suffix(f".{rank}.jsonl") for rank in range(len(job.devices))]
        for path in outputs:  # of an earlier check
            path.unlink(missing_ok=True)
        with Ranks([sys.executable, str(WORKER), str(place)], len(job.devices), folder, place.stem) as ranks:
            reason = ranks.wait(until - time.monotonic(), outputs, STALL_SECONDS)
        records = merged([read(path) for path in outputs])
        found |= {record["item"]: record for record in records}
        left = [item for item in left if item not in found]
        if left and not (records and records[-1].get("ends")):
            found[left[0]] = {"item": left[0], "error": f"{left[0]}: {reason or 'it ended before it came to this'}"}
            del left[0]
        elif reason and not left and not any(record["error"] for record in records):
            found[job.items[-1]]["error"] = f"{job.items[-1]}: done, but then {reason}"
        start += 1
    over = f"not run: the {seconds:.0f} s that this part may take were over"
    return [found.get(item, {"item": item, "error": f"{item}: {over}"}) for item in job.items]


def read(path: Path) -> list[Record]:
    """Return the whole lines that a worker has written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def merged(by_rank: Sequence[list[Record]]) -> list[Record]:
    """Return rank 0's records up to where a rank stopped, and behind them the error of the rank that did, if one says so."""
    whole = []
    for at in range(max(map(len, by_rank))):
        told = [records[at] for records in by_rank if at < len(records)]
        bad = next((record for record in told if record.get("ends")), None)
        if bad is None and len(told) < len(by_rank):
            break
        whole.append(bad or next((record for record in told if record["error"]), told[0]))
        if bad is not None:
            break
    return whole
