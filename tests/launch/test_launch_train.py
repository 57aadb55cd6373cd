"""The training program: real runs on two ranks, under torchrun too, and single-rank ones in this process."""

import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torch.distributed as dist
from commands import Ended, run_command
from ranks import run
from shared import filled
from stopped import stop_at
from tiers import slowly

import commpress
from commpress.files import load_state, save_state, write_atomically
from commpress.launch import checkpoint, demo, lab, train

STEPS, STOPPED_AT = 12, 5
RUNS = {
    "ddp:AdamW:none": 1,
    "ddp:AdamW:int4": 7.8,
    "ddp:SGD:topk(0.1)|int4": 34,
    "ddp:OneBitAdamW:sign": 3.65,  # three of twelve steps are the warm-up's
    "ddp:ZeroOneAdamW:topk(0.1)|sign": 3.95,
    "ddp:DGC:topk(0.01)": 25,  # three at a quarter, a sixteenth, ...
    "ddp:EF21Muon:sign": 10.8,  # embeddings and the head by int8: a third of so small a model
    "fsdp:EF21Muon:int4": 4.1,  # gradients by int8, beside them the momentum by int4 and the updates by int8
    "fsdp:AdamW:int4": 4.7,  # gradients by int4, parameters by int8, twice a step and in validations
    "local_sgd:AdamW:int8": 11.8,  # four syncs in twelve steps
    "diloco:AdamW:topk(0.1)|int2": 131,
    "diloco:EF21Muon:sign": 94,
}
"""How the model is spread, optimizer and spec, and how many times fewer bytes they send in all."""
AFTER_A_START = {"fsdp:EF21Muon:int4": 2 * 98_304}
"""Bytes that a rank sends once when a run goes on: owners of matrices get two float32 of each value that they do not hold."""
WAYS = list(RUNS)
QUICK = ("ddp:AdamW:int4", "local_sgd:AdamW:int8")
SMALL = {
    **{"layers": 2, "width": 64, "heads": 2, "context": 32, "batch": 4, "steps": STEPS, "lr": 1e-2, "warmup_steps": 2},
    **{"eval_every": 4, "eval_batches": 4, "checkpoint_every": 3, "seed": 3, "threads": 1},
}
MORE = {
    "fsdp": {"parameters": "int8"},
    "local_sgd": {"sync_every": 4},
    "diloco": {"sync_every": 4, "fragments": 2, "delay": 3},
}
TINY = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "steps": 4, "warmup_steps": 1, "threads": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, so that single-rank runs start at once."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


def torchrun(*arguments: object) -> "subprocess.Popen[str]":
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(demo.free_port())),
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child: "subprocess.Popen[str]", seconds: float) -> str:
    """Wait for the end; its output. It is never left running."""
    try:
        return child.communicate(timeout=seconds)[0]
    finally:
        demo.end(child)


def alone(tmp_path: Path, text: Path, **changes: object) -> bool:
    """A run on one rank, in this process."""
    return train.train(train.Settings(**{**TINY, "data": text, "out": tmp_path / "run", **changes}))


def cli(*arguments: object) -> Ended:
    return run_command("train", *arguments)


def whole_and_cut(folder: Path, text: Path, way: str) -> None:
    """Train by one of RUNS without a break, and again with a break (Ctrl-C on one rank, in a step) and --resume."""
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    parallel, optimizer, spec = way.split(":")
    chosen = {**SMALL, "data": text, "compress": spec, "optimizer": optimizer, "parallel": parallel}
    chosen |= MORE.get(parallel, {})
    recorded = 3 if parallel == "ddp" else 0
    whole, cut = ({**chosen, "out": folder / name} for name in ("whole", "cut"))
    assert train.train(train.Settings(**whole, timeline=recorded))
    stop_at(STOPPED_AT, lambda: train.train(train.Settings(**cut)))
    assert checkpoint.load_shared(folder / "cut")["step"] == STOPPED_AT
    assert train.train(train.Settings(**cut, resume=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Path]:
    """By one of RUNS a folder with `whole`, without a break, and `cut`, stopped at step 5 of 12 and resumed."""

    def made(way: str) -> Path:
        name = f"train {WAYS.index(way)}"
        return filled(tmp_path_factory, name, lambda folder: run(2, whole_and_cut, folder, text, way, timeout=240))

    return made


@pytest.mark.parametrize("way", slowly(WAYS, QUICK))
def test_the_loss_falls_and_the_record_says_what_happened(runs: Callable[[str], Path], way: str) -> None:
    record = json.loads((runs(way) / "whole" / "record.json").read_text())
    curve = record["curve"]
    assert [row["step"] for row in curve] == list(range(STEPS + 1))
    validations = {row["step"]: row["validation_loss"] for row in curve if row["validation_loss"] is not None}
    assert list(validations) == [0, 4, 8, STEPS]
    assert validations[0] == pytest.approx(5.55, abs=0.05)  # log 256: it knows nothing yet
    parallel, optimizer, spec = way.split(":")
    assert validations[STEPS] < validations[0] - (1 if "Adam" in optimizer else 0.02)
    assert record["final_validation_loss"] == validations[STEPS]
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(curve))
    settings = record["settings"]
    assert (settings["parallel"], settings["optimizer"], settings["compress"]) == (parallel, optimizer, spec)
    assert (record["world_size"], record["backend"], record["steps_done"]) == (2, "gloo", STEPS)
    assert record["report"]["steps"] == STEPS
    assert record["median_step_seconds"] > 0
    assert record["version"] == commpress.__version__
    assert datetime.fromisoformat(record["date"]).tzinfo is not None
    assert record["link"]["shaped"] is False
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["processor"].startswith(record["machine"]["lscpu"]["name"])
    # a ring all-reduce over two ranks sends each gradient once, and so does Gloo where half, a reduce-scatter, would do
    assert curve[-1]["dense_bytes"] == record["traffic"]["dense_bytes"]
    roles = record["report"]["roles"]
    assert sum(role["dense_bytes"] for role in roles.values()) == record["traffic"]["dense_bytes"]
    steps_bytes = roles["outer" if parallel in ("local_sgd", "diloco") else "gradients"]["dense_bytes"]
    assert steps_bytes == STEPS * 4 * record["parameters"] // (2 if parallel == "fsdp" else 1)
    gradients = [row for row in record["report"]["rows"] if row["role"] == "gradients"]
    if gradients:
        assert sum(row["backend_bytes"] for row in gradients) == STEPS * 4 * record["parameters"]
    assert record["traffic"]["ratio"] == pytest.approx(RUNS[way], rel=0.1)


@pytest.mark.parametrize("way", slowly(WAYS, QUICK))
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(runs: Callable[[str], Path], way: str) -> None:
    whole, cut = (checkpoint.load_shared(runs(way) / name) for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == STEPS
    torch.testing.assert_close(whole["model"], cut["model"], rtol=0, atol=0)
    changing = {"seconds"}
    if "diloco" in way:
        changing |= {"sent_bytes", "dense_bytes"}  # of what travels beside training, counted as it goes
    if way in AFTER_A_START:
        changing |= {"sent_bytes", "dense_bytes"}
    for a, b in zip(whole["curve"], cut["curve"], strict=True):
        assert {**a, **dict.fromkeys(changing)} == {**b, **dict.fromkeys(changing)}
    assert whole["curve"][-1]["sent_bytes"] + AFTER_A_START.get(way, 0) == cut["curve"][-1]["sent_bytes"]
    for rank in range(2):
        a, b = (checkpoint.load_own(runs(way) / name, STEPS, rank) for name in ("whole", "cut"))
        assert torch.equal(a["windows"], b["windows"])
        one, other = (own.get("optimizer", shared.get("optimizer")) for own, shared in ((a, whole), (b, cut)))
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
        for group, again in zip(one["param_groups"], other["param_groups"], strict=True):
            changed = {key: (group[key], again[key]) for key in group if group[key] != again[key]}
            changed.pop("betas", None)  # FSDP's state dict makes a list of the tuple
            assert not changed
            assert list(group.get("betas", ())) == list(again.get("betas", ()))
        if "model" in a:  # where ranks have their own
            torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)


def test_the_timeline_holds_the_phases_of_the_asked_steps(runs: Callable[[str], Path]) -> None:
    events = json.loads((runs("ddp:AdamW:int4") / "whole" / "timeline.json").read_text())["traceEvents"]
    phases = {(event["args"]["step"], event["name"]) for event in events if event["ph"] == "X"}
    each = ("forward", "backward", "encode", "wire", "decode", "exposed")
    assert phases == set(itertools.product((5, 6, 7), each))


def test_a_run_too_short_for_a_timeline_says_so(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alone(tmp_path, text, timeline=2)
    assert "no timeline: it starts 5 steps after the start" in capsys.readouterr().out
    assert not (tmp_path / "run" / "timeline.json").exists()


@pytest.mark.slow
def test_resume_needs_the_same_run(runs: Callable[[str], Path], text: Path) -> None:
    out = runs("ddp:AdamW:int4") / "whole"
    saved = json.loads((out / "record.json").read_text())["settings"]
    same = {**saved, "data": text, "out": out, "resume": True}
    for change, message in (
        ({"compress": "int8"}, "--compress int4, this one --compress int8"),
        ({"width": 32}, "--width 64, this one --width 32"),
        ({"warmup_steps": 5}, "--warmup-steps 2, this one --warmup-steps 5"),
        ({"steps": 8}, "is at step 12, this one has --steps 8"),
    ):
        with pytest.raises(train.TrainingError, match=message):
            train.train(train.Settings(**{**same, **change}))
    for way in WAYS[7:]:
        out, parallel = runs(way) / "whole", way.split(":")[0]
        settings = json.loads((out / "record.json").read_text())["settings"]
        message = f"world size of 2, this one a world size of 1.*--parallel {parallel}"
        with pytest.raises(train.TrainingError, match=message):
            train.train(train.Settings(**{**settings, "data": text, "out": out, "resume": True}))


@pytest.mark.parametrize("way", slowly(WAYS[:7], QUICK))
def test_a_run_goes_on_with_other_ranks_and_more_steps(
    tmp_path: Path, runs: Callable[[str], Path], text: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """What two ranks have trained for twelve steps, one trains for three more."""
    shutil.copytree(runs(way) / "whole", tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "record.json").read_text())["settings"]
    more = {**saved, "data": text, "out": tmp_path / "run", "resume": True, "steps": STEPS + 3, "timeline": 0}
    assert train.train(train.Settings(**more))
    said = capsys.readouterr().out
    assert "that run had 2 ranks, this one has 1" in said
    assert f"--steps {STEPS + 3}, not {STEPS} as before" in said
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["steps_done"], record["world_size"]) == (STEPS + 3, 1)
    curve = {row["step"]: row for row in record["curve"]}
    assert curve[STEPS + 3]["validation_loss"] < curve[STEPS]["validation_loss"] + 0.1
    assert curve[STEPS + 1]["train_loss"] < curve[STEPS]["train_loss"] + 0.5  # not anew


@pytest.mark.slow
def test_interrupting_torchrun_leaves_a_checkpoint_and_no_process(tmp_path: Path, text: Path) -> None:
    flags = {**TINY, "steps": 300, "data": text, "out": tmp_path, "compress": "int4"}
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    child = torchrun("-m", "commpress.launch.train", *arguments)
    try:
        assert child.stdout is not None
        until = time.monotonic() + 150
        while not child.stdout.readline().startswith("step "):
            assert time.monotonic() < until
            assert child.poll() is None
        family = demo.descendants(child.pid)
        assert len(family) >= 2
        child.send_signal(signal.SIGINT)
    finally:
        output = finish(child, 60)
    found = re.search(r"stopped at step (\d+) of 300", output)
    assert found, output
    assert "\ncommpress int4: sent " in output[found.end() :]
    state = checkpoint.load_shared(tmp_path)
    assert 0 < state["step"] == int(found[1]) < 300
    assert not [pid for pid in family if running(pid)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "record.json", f"step-{state['step']:08d}"]
    for rank in range(2):
        checkpoint.load_own(tmp_path, state["step"], rank)


def running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_one_rank_without_torchrun(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alone(tmp_path, text)
    assert "1 ranks" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["world_size"] == 1
    assert record["traffic"]["sent_bytes"] == 0
    with pytest.raises(train.TrainingError, match="holds the checkpoint of a run: go on with --resume"):
        alone(tmp_path, text)
    assert alone(tmp_path, text, resume=True)
    assert "already at step 4 of 4" in capsys.readouterr().out


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, text: Path) -> None:
    for name, sizes in (("whole", {"batch": 4}), ("parts", {"batch": 2, "accumulate": 2})):
        alone(tmp_path, text, out=tmp_path / name, eval_batches=8 // sizes["batch"], **sizes)
    whole, parts = (checkpoint.load_shared(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole["curve"], parts["curve"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)


def test_a_loss_that_is_not_finite_ends_training(tmp_path: Path, text: Path) -> None:
    with pytest.raises(
        train.TrainingError, match=r"step \d+: the loss is .*expected finite numbers; --lr 1e\+30 is probably too high$"
    ):
        alone(tmp_path, text, lr=1e30, steps=20)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compress", "int5"], "unknown codec 'int5'"),
        (["--warmup-compress", "int5"], "unknown codec 'int5'"),
        (["--optimizer", "Adam"], "--optimizer Adam: expected one of AdamW, OneBitAdamW, ZeroOneAdamW, EF21Muon"),
        (
            ["--parallel", "fsdp", "--optimizer", "EF21Muon", "--parameters", "auto"],
            "--parameters auto: under --optimizer EF21Muon auto finds the spec of the momentum alone",
        ),
        (
            ["--parallel", "deepspeed", "--optimizer", "EF21Muon", "--zero-stage", 3],
            "--zero-stage 3: expected 0, 1 or 2 under --optimizer EF21Muon",
        ),
        (["--sync-every", 0], "--sync-every 0: expected at least 1"),
        (["--zero-stage", 4], "--zero-stage 4: expected 0, 1, 2 or 3"),
        (["--parallel", "fsdp", "--optimizer", "DGC"], "DGC exchanges by itself: expected --parallel ddp or deepspeed"),
        (
            ["--parallel", "diloco", "--optimizer", "OneBitAdamW"],
            "OneBitAdamW exchanges by itself: expected --parallel ddp or deepspeed, got diloco",
        ),
        (
            ["--parallel", "diloco", "--optimizer", "EF21Muon", "--compress", "auto"],
            "--compress auto: expected --parallel ddp, fsdp or deepspeed",
        ),
        (
            ["--optimizer-warmup", 2, "--optimizer", "EF21Muon"],
            "--optimizer-warmup 2: has no effect here, expected",
        ),
        (["--width", 30, "--heads", 4], "--width 30 --heads 4: the width must be a multiple of the heads"),
        (["--layers", 0], "--layers 0: expected at least 1"),
        (["--steps", 0], "--steps 0: expected at least 1"),
        (["--lr", "nan"], "--lr nan: expected at least 0"),
        (["--resume"], "no checkpoint in"),
        (["--data", "no/such/file"], "--data no/such/file: there is no such file or folder"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(tmp_path: Path, flags: list[object], message: str) -> None:
    result = cli("--out", tmp_path / "out", *flags)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = cli("--out", tmp_path / "out", "--data", tmp_path / "empty")
    assert result.code == 1
    assert "expected text, found 0 bytes in 0 text files (0 skipped)" in result.err


def test_files_that_are_not_text_are_skipped_and_counted(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "text.txt").write_bytes(text.read_bytes())
    (folder / "picture.png").write_bytes(b"\x89PNG\0\xff")
    flags = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = cli("--out", tmp_path / "out", "--data", folder, *flags)
    assert result.code == 0, result.err
    assert "1 files skipped that are not text" in result.out


def test_checkpoints_of_two_steps_are_never_paired(tmp_path: Path, text: Path) -> None:
    alone(tmp_path, text)
    folder = tmp_path / "run" / "step-00000004"
    state = load_state(folder / "session-rank0.pt")
    save_state(folder / "session-rank0.pt", {**state, "step": 3})
    with pytest.raises(ValueError, match="was written at step 3, expected that of step-00000004"):
        alone(tmp_path, text, resume=True)
    (folder / "session-rank0.pt").unlink()
    with pytest.raises(ValueError, match=r"session-rank0\.pt is missing"):
        alone(tmp_path, text, resume=True)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def torn(f: BinaryIO) -> None:
        f.write(b"half of it")
        raise OSError("the disk is full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, torn)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_ending_a_child_ends_what_it_started() -> None:
    child = subprocess.Popen(["bash", "-c", "sleep 100 & sleep 100"])
    try:
        until = time.monotonic() + 10
        while len(family := demo.descendants(child.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(family) == 2
    finally:
        demo.end(child)
    assert child.poll() is not None
    assert not [pid for pid in family if running(pid)]


needs_lab = pytest.mark.skipif(bool(lab.missing()), reason=lab.missing())
OVER = [pytest.param(True, marks=needs_lab, id="lab"), pytest.param(False, id="loopback")]
"""Over what the demo's ranks talk."""


def networks() -> set[str]:
    """The namespaces of labs on this machine."""
    return {path.name for path in Path("/var/run/netns").glob("cp*")}


@pytest.mark.slow
@pytest.mark.parametrize("shaped", OVER)
def test_a_demo_run_that_fails_says_why_and_leaves_nothing(tmp_path: Path, shaped: bool) -> None:
    before = networks()
    with pytest.raises(demo.DemoError, match=r"ended with code 1\nerror: .*unknown codec 'int5'"):
        demo.train(tmp_path, {"compress": "int5"}, 3, shaped)
    left = {name for name in networks() - before if not Path("/proc", name[2:].split("h")[0].split("sw")[0]).exists()}
    assert not left  # those of processes that live are of tests beside this one


@pytest.mark.slow
@pytest.mark.parametrize("shaped", OVER)
def test_a_stopped_demo_leaves_no_process_and_no_network(tmp_path: Path, shaped: bool) -> None:
    without: list[str] = [] if shaped or lab.missing() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [*without, sys.executable, "-m", "commpress.launch.demo", "--out", str(tmp_path), "--steps", "2000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    family: list[int] = []
    try:
        assert child.stdout is not None
        said, until = "", time.monotonic() + 150
        while not (line := child.stdout.readline()).startswith("step "):
            said += line
            assert time.monotonic() < until
            assert child.poll() is None
        family = demo.descendants(child.pid)
        assert bool({name for name in networks() for pid in family if name.startswith(f"cp{pid}")}) == shaped
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=90)
    finally:
        demo.end(child)
    assert child.returncode == 130
    assert errors.strip().endswith("stopped")
    assert ("the ranks talk over this machine's loopback" in said) != shaped
    assert not [pid for pid in family if running(pid)]
    assert not [name for name in networks() for pid in family if name.startswith(f"cp{pid}")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shaped", OVER)
def test_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shaped: bool
) -> None:
    if not shaped:
        monkeypatch.setattr(lab, "missing", lambda: "a network lab needs root")
    path = demo.demo(tmp_path, 60)
    page, said = path.read_text(), " ".join(capsys.readouterr().out.split())
    assert "OneBitAdamW sign" in page
    assert ("3.3 M parameters, 2 ranks, 60 steps, 1 Gbit/s" if shaped else "2 ranks, 60 steps, loopback") in said
    assert ("a network lab needs root; the ranks talk over this machine's loopback" in said) != shaped
    record = json.loads((tmp_path / "auto" / "record.json").read_text())
    assert record["settings"]["compress"] == "auto"
    last = said[said.rindex("auto ") :] if shaped else said[said.rindex(" auto ") + 1 :]
    assert re.search(r"x fewer bytes a step \(|the same bytes a step", last), last
    assert ("on a link of 1 Gbit/s `commpress explain` predicts int4" in last) != shaped
    assert ("predicted, " in said) != shaped
    assert ("<h2>Predictions</h2>" in page) != shaped
    if shaped:  # a link so slow that compression pays
        assert re.match(r"auto chose (int4: 7\.8|int8: 3\.9)x fewer bytes a step.* [\d.]+x faster", last), last
        assert "both measured in this run" in page
    assert html.escape(last.partition("; on a link")[0]) in page
    assert "validation loss" in (tmp_path / "auto" / "stdout.log").read_text()
