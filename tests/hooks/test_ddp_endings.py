"""Nothing stays behind: sessions and threads end with their model, and the process ends in peace."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from ranks import outcome, run
from torch.nn.parallel import DistributedDataParallel
from training import network, train

import commpress

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import commpress

rank, folder, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]
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


@pytest.mark.parametrize("ending", ["destroyed", "left", "raised", "collected"])
def test_the_process_ends_in_peace(ending: str, tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path), ending],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, err = process.communicate(timeout=60)
            assert process.returncode == (3 if ending == "raised" else 0), err
            assert ("done" in out) == (ending != "raised")
            assert not any(
                word in err for word in ("Traceback", "terminate called", "Fatal Python error", "Aborted")
            ), err
    finally:
        for process in ranks:
            process.kill()
            process.wait()
