"""Nothing stays behind: sessions and threads end with their model, and the process ends in peace."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import outcome, run
from torch.nn.parallel import DistributedDataParallel
from training import network, train

import commpress
from commpress.comm import sequencer

ENDINGS = {"destroyed": 0, "left": 0, "raised": 3, "collected": 0}
"""What the process returns."""
SCRIPT = """
import gc, json, os, sys
import torch, torch.distributed as dist
import torch._dynamo  # DDP would in each process
from torch.nn.parallel import DistributedDataParallel
import commpress
from commpress.comm.coding import warm_up

folder, *endings = sys.argv[1:]
warm_up(commpress.parse("int4"), torch.device("cpu"))
gc.freeze()  # what is imported would be looked through at the end of each process
started = {}
for ending, rank in [(ending, rank) for ending in endings for rank in range(2)]:  # forked: imports take the time
    if pid := os.fork():
        started[pid] = f"{ending}-{rank}"
        continue
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{ending}-{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    break
else:
    ended = dict(os.wait() for _ in started)
    print(json.dumps({name: os.waitstatus_to_exitcode(ended[pid]) for pid, name in started.items()}))
    sys.exit()

dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ending}", rank=rank, world_size=2)
torch.manual_seed(0)
ddp = DistributedDataParallel(torch.nn.Linear(64, 64), bucket_cap_mb=0.001)
session = commpress.attach(ddp, "int4")
for _ in range(3):
    ddp(torch.randn(8, 64)).square().mean().backward()
if ending == "destroyed":
    dist.destroy_process_group()
elif ending == "raised":
    raise SystemExit(3)
elif ending == "collected":
    del ddp, session
    dist.destroy_process_group()
print("done", flush=True)
"""


def threads() -> list[str]:
    """The names of the threads that are ours."""
    return [t.name for t in threading.enumerate() if t.name.startswith("commpress")]


def collected() -> dict[str, int]:
    """Threads and sessions before, during and after two models' lives."""
    gc.collect()
    seen = {"before": len(threads()), "all before": threading.active_count()}
    models = [DistributedDataParallel(network()) for _ in range(2)]
    sessions = [commpress.attach(ddp, spec) for ddp, spec in zip(models, ("int4", "topk(0.1)|int4"), strict=True)]
    for ddp in models:
        train(ddp, range(3))
    seen["during"] = len(threads())
    watched = [weakref.ref(session) for session in sessions]
    del models, sessions, ddp
    gc.collect()
    seen["sessions after"] = sum(ref() is not None for ref in watched)
    seen["after"], seen["all after"] = len(threads()), threading.active_count()
    return seen


def refused() -> tuple[int, int]:
    """Threads before and after an attach that fails because the model has a hook."""
    ddp = DistributedDataParallel(network())
    session = commpress.attach(ddp, "int4")
    before = len(threads())
    assert outcome(lambda: commpress.attach(ddp, "int4")).startswith("RuntimeError")
    gc.collect()
    assert session.report().steps == 0  # the first one lives on
    return before, len(threads())


def test_sessions_and_threads_end_with_their_model() -> None:
    for seen in run(2, collected, fresh=True):
        assert (seen["before"], seen["during"], seen["after"]) == (0, 4, 0)
        assert seen["sessions after"] == 0
        assert seen["all after"] == seen["all before"]


def test_a_refused_attach_leaves_no_threads() -> None:
    for before, after in run(2, refused, fresh=True):
        assert (before, after) == (2, 2)


def ended_by_its_own_thread() -> tuple[list[str], list[str]]:
    """The threads that are ours before and after the end of the program, where one of them dropped the last reference."""
    dropped, stopping = threading.Event(), threading.Event()
    finish, stop = sequencer._Lines.finish, sequencer._stop

    def held(lines: Any, job: Any, error: Any) -> None:
        finish(lines, job, error)
        if job.last and not dropped.is_set():
            dropped.wait(20)  # until the program has let go of all that it has

    def slow(*arguments: Any) -> None:
        stop(*arguments)
        stopping.set()
        time.sleep(0.3)  # the transfer is still to be let go, which calls torch

    sequencer._Lines.finish, sequencer._stop = held, slow  # type: ignore[method-assign]
    try:
        ddp = DistributedDataParallel(torch.nn.Linear(64, 64))
        commpress.attach(ddp, "int4")
        ddp(torch.randn(8, 64)).square().mean().backward()
        del ddp
        gc.collect()
        dropped.set()
        assert stopping.wait(20)
        before = threads()
        sequencer._end_all()
        return before, threads()
    finally:
        sequencer._Lines.finish, sequencer._stop = finish, stop  # type: ignore[method-assign]


def test_a_thread_that_drops_the_last_reference_ends_before_the_program_does() -> None:
    for before, after in run(2, ended_by_its_own_thread, fresh=True):
        assert before == ["commpress wire"]
        assert after == []


@pytest.mark.slow
def test_the_process_ends_in_peace(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *ENDINGS],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        codes = json.loads(process.communicate(timeout=180)[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(codes) == 2 * len(ENDINGS)
    for name, code in codes.items():
        ending = name.split("-")[0]
        out, err = ((tmp_path / f"{name}.{stream}").read_text() for stream in ("out", "err"))
        assert code == ENDINGS[ending], (name, err)
        assert ("done" in out) == (ending != "raised"), name
        for word in ("Traceback", "terminate called", "Fatal Python error", "Aborted"):
            assert word not in err, (name, err)
