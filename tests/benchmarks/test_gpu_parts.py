"""Parts of the check of a GPU: what hangs or dies is a row that says so, takes nothing along, and leaves no process."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_parts
import gpu_worker

Record = dict[str, Any]

FAKE = """
import json, os, pathlib, signal, sys, time
place, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
place.with_suffix("." + rank + ".pid").write_text(str(os.getpid()))
with place.with_suffix("." + rank + ".jsonl").open("w") as out:
    for item in json.loads(place.read_text())["items"]:
        if item == "hangs":
            time.sleep(60)
        if item == "rank 1 hangs" and rank == "1":
            time.sleep(60)
        if item == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == "exits":
            sys.exit("RuntimeError: no such thing")
        lost = item == "rank 1 fails" and rank == "1"
        record = {"item": item, "error": "rank 1: lost" if lost else "", "ends": lost, "seconds": 0.0}
        print(json.dumps(record), file=out, flush=True)
        if lost:
            os._exit(1)
        if item == "rank 1 fails":
            time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A worker that needs no torch; its folder. Nothing of it may be left at the end."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    monkeypatch.setattr(gpu_parts, "WORKER", worker)
    monkeypatch.setattr(gpu_parts, "STALL_SECONDS", 4.0)  # a process must have started by then, on a busy machine, too
    monkeypatch.setattr(gpu_parts, "AFTERMATH", 0.2)
    yield tmp_path
    until = time.monotonic() + 10  # on a busy machine a process that was killed takes its time to end
    for pid in tmp_path.glob("*.pid"):
        while is_alive(int(pid.read_text())):
            assert time.monotonic() < until
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that was given up before it had ended is taken leave of."""
    with contextlib.suppress(ChildProcessError):
        gpu_parts.os.waitpid(pid, gpu_parts.os.WNOHANG)
    try:
        gpu_parts.os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def errors(records: list[Record]) -> dict[str, str]:
    return {record["item"]: record["error"] for record in records}


@pytest.mark.slow
def test_what_hangs_dies_or_ends_is_a_row_that_says_so_and_the_others_go_on(fake: Path) -> None:
    items = ["one", "hangs", "two", "dies", "exits", "three"]
    found = errors(gpu_parts.work_off(gpu_worker.Job("bytes", items, ["cpu"]), "part", fake, 30))
    assert list(found) == items
    assert found["hangs"] == "hangs: nothing came of it in 4 s, killed"
    assert found["dies"] == "dies: ended by signal 11: it said nothing"
    assert found["exits"] == "exits: ended with code 1: RuntimeError: no such thing"
    assert [item for item, error in found.items() if not error] == ["one", "two", "three"]


@pytest.mark.slow
def test_a_rank_that_fails_or_hangs_is_named_and_the_other_rank_does_not_stay(fake: Path) -> None:
    items = ["one", "rank 1 fails", "two", "rank 1 hangs", "three"]
    found = errors(gpu_parts.work_off(gpu_worker.Job("ranks", items, ["cpu"] * 2, "gloo"), "part", fake, 30))
    assert found["rank 1 fails"] == "rank 1: lost"
    assert found["rank 1 hangs"].startswith("rank 1 hangs: nothing came of it in")
    assert [item for item, error in found.items() if not error] == ["one", "two", "three"]


def test_a_part_ends_when_its_time_is_over_and_what_is_left_says_so(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "STALL_SECONDS", 30.0)
    begun = time.monotonic()
    found = errors(gpu_parts.work_off(gpu_worker.Job("bytes", ["one", "hangs", "two"], ["cpu"]), "part", fake, 3))
    assert time.monotonic() - begun < 20
    assert found["one"] == ""
    assert found["hangs"] == "hangs: not done after 3 s, killed"
    assert found["two"] == "two: not run: the 3 s that this part may take were over"


def test_an_interrupted_check_leaves_no_process_of_a_part_that_runs_in_another_thread(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "STALL_SECONDS", 30.0)
    job = gpu_worker.Job("bytes", ["hangs", "two"], ["cpu"])
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(gpu_parts.work_off, job, "part", fake, 30)
        while not list(fake.glob("*.pid")):
            time.sleep(0.01)
        gpu_parts.stopped.set()
        try:
            assert errors(started.result(timeout=20))["hangs"] == "hangs: stopped"
        finally:
            gpu_parts.stopped.clear()


def test_records_of_an_earlier_check_in_the_same_folder_are_not_taken_for_new_ones(fake: Path) -> None:
    job = gpu_worker.Job("bytes", ["exits"], ["cpu"])
    (fake / "part-0.0.jsonl").write_text(json.dumps({"item": "exits", "error": "", "seconds": 1.0}) + "\n")
    assert "no such thing" in errors(gpu_parts.work_off(job, "part", fake, 30))["exits"]
