"""The training program by DeepSpeed's engine: all ZeRO stages, resumed runs, and what starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import fresh
from ranks import outcome, run
from shared import filled
from stopped import stop_at
from tiers import slowly

from commpress.launch import checkpoint, demo, train

pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

STEPS, STOPPED_AT = 12, 5
TINY = {
    "layers": 1,
    "width": 64,
    "heads": 2,
    "context": 32,
    "batch": 4,
    "steps": STEPS,
    "warmup_steps": 2,
    "threads": 1,
}
COMMON = {**TINY, "lr": 1e-2, "eval_every": 6, "eval_batches": 2}
BEHIND = {"compress": "sign", "optimizer_warmup": 4}
RUNS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0, "compress": "int4"},
    "ZeRO 1, ZeroOneAdamW": {"zero_stage": 1, **BEHIND, "optimizer": "ZeroOneAdamW", "sync_every": 2},
    "ZeRO 2, OneBitAdamW": {"zero_stage": 2, **BEHIND, "optimizer": "OneBitAdamW"},
    "ZeRO 0, EF21Muon": {"zero_stage": 0, "compress": "int4", "optimizer": "EF21Muon"},
    "ZeRO 1, EF21Muon": {"zero_stage": 1, "compress": "int4", "optimizer": "EF21Muon"},
    "ZeRO 2, EF21Muon": {"zero_stage": 2, "compress": "int4", "optimizer": "EF21Muon", "parameters": "int8"},
    "ZeRO 2": {"zero_stage": 2, "compress": "int4", "parameters": "int8"},
    "ZeRO 2, accumulated": {"zero_stage": 2, "compress": "int4", "batch": 2, "accumulate": 2},
    # two matrices are wide enough for DeepSpeed not to keep them everywhere
    "ZeRO 3": {"zero_stage": 3, "compress": "int4", "parameters": "int8", "width": 160},
    "ZeRO 0, pruned": {"zero_stage": 0, "compress": "int4"},
    "ZeRO 1, pruned": {"zero_stage": 1, "compress": "int4"},
    "ZeRO 2, pruned": {"zero_stage": 2, "compress": "int4", "parameters": "int8"},
    "ZeRO 3, pruned": {"zero_stage": 3, "compress": "int4", "parameters": "int8", "width": 160},
    "ZeRO 1, quantised": {"zero_stage": 1, "compress": "int4"},
    "ZeRO 3, quantised": {"zero_stage": 3, "compress": "int4", "parameters": "int8", "width": 160},
}
PRUNE = "[[prune]]\nstart = 2\nend = 8\nevery = 2\namount = 0.6\n"
QUANTIZE = '[[quantize]]\nstart = 3\nactivations = "static"\nlayers = ["blocks.*"]\n'
TAYLOR = PRUNE + 'criterion = "taylor"\n'
RECIPES = {"ZeRO 0, pruned": PRUNE + QUANTIZE, "ZeRO 1, quantised": QUANTIZE, "ZeRO 3, quantised": QUANTIZE}
RECIPES |= {"ZeRO 1, pruned": PRUNE, "ZeRO 2, pruned": TAYLOR + QUANTIZE, "ZeRO 3, pruned": TAYLOR}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, so that runs start at once."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return path


def whole_and_cut(folder: Path, text: Path, name: str) -> None:
    """One of RUNS without a break, and stopped by Ctrl-C on one rank, and resumed."""
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    fresh()
    settings = {**COMMON, "data": text, "parallel": "deepspeed", **RUNS[name]}
    if name in RECIPES:
        settings["recipe"] = folder / "recipe.toml"
        if not dist.get_rank():
            settings["recipe"].write_text(RECIPES[name])
        dist.barrier()
    whole, cut = ({**settings, "out": folder / way} for way in ("whole", "cut"))
    assert train.train(train.Settings(**whole))
    stop_at(STOPPED_AT * settings.get("accumulate", 1), lambda: train.train(train.Settings(**cut)))
    assert checkpoint.load_shared(folder / "cut")["step"] == STOPPED_AT
    assert train.train(train.Settings(**cut, resume=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Path]:
    """By one of RUNS a folder with `whole`, without a break, and `cut`, stopped at step 5 of 12 and resumed."""

    def made(name: str) -> Path:
        place = f"deepspeed {list(RUNS).index(name)}"
        return filled(tmp_path_factory, place, lambda folder: run(2, whole_and_cut, folder, text, name, timeout=240))

    return made


@pytest.mark.parametrize("name", slowly(RUNS, quick=("ZeRO 2",)))
def test_the_loss_falls_and_the_record_says_what_happened(runs: Callable[[str], Path], name: str) -> None:
    record = json.loads((runs(name) / "whole" / "record.json").read_text())
    losses = [row["validation_loss"] for row in record["curve"] if row["validation_loss"] is not None]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log 256: it knows nothing yet
    assert losses[2] < losses[0] - 1.5
    settings, changes = record["settings"], RUNS[name]
    assert {key: settings[key] for key in changes} == changes
    assert (settings["parallel"], record["world_size"], record["steps_done"]) == ("deepspeed", 2, STEPS)
    roles = record["report"]["roles"]
    for role in ("gradients", "parameters") if "parameters" in changes else ("gradients",):
        most = 0.7 if name in RECIPES else 0.6  # the small file is made of exact values
        assert roles[role]["sent_bytes"] < most * roles[role]["dense_bytes"], role
    backwards = changes.get("accumulate", 1)  # ZeRO 2 sends in each
    sharded = (
        changes["zero_stage"] and changes.get("optimizer", "EF21Muon") == "EF21Muon"
    )  # a reduce-scatter sends half of an all-reduce
    assert roles["gradients"]["dense_bytes"] >= STEPS * backwards * 4 * record["parameters"] // (2 if sharded else 1)


def assert_same(one: Any, other: Any) -> None:
    """Equal trees, tensors bit for bit."""
    (leaves, tree), (others, same) = (torch.utils._pytree.tree_flatten(state) for state in (one, other))
    assert tree == same
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", slowly(RUNS, quick=("ZeRO 2",)))
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(runs: Callable[[str], Path], name: str) -> None:
    whole, cut = (checkpoint.load_shared(runs(name) / way) for way in ("whole", "cut"))
    assert whole["step"] == cut["step"] == STEPS
    torch.testing.assert_close(whole["model"], cut["model"], rtol=0, atol=0)
    if name in RECIPES:
        small = [json.loads((runs(name) / way / "record.json").read_text())["small_model"] for way in ("whole", "cut")]
        assert small[0] == small[1]
        assert small[0]["sparsity"] == pytest.approx(0.6 if "pruned" in name else 0, abs=1e-2)
        assert small[0]["times_smaller"] > (2 if RECIPES[name] == PRUNE + QUANTIZE else 1.5)
    assert_same(whole.get("optimizer"), cut.get("optimizer"))
    for a, b in zip(whole["curve"], cut["curve"], strict=True):
        assert (a["train_loss"], a["validation_loss"]) == (b["train_loss"], b["validation_loss"])
    for rank in range(2):
        a, b = (checkpoint.load_own(runs(name) / way, STEPS, rank) for way in ("whole", "cut"))
        assert_same(a.get("zero"), b.get("zero"))
        assert torch.equal(a["windows"], b["windows"])


def accumulated(folder: Path, text: Path) -> None:
    """The same batches in one backward a step and in two, at ZeRO 0, 1 and 2."""
    fresh()
    for stage in range(3):
        for parts in (1, 2):
            out = folder / f"{stage}-{parts}"
            changes = {"steps": 4, "batch": 4 // parts, "accumulate": parts, "eval_batches": 2 * parts}
            chosen = {**TINY, **changes, "compress": "none", "parallel": "deepspeed", "zero_stage": stage}
            train.train(train.Settings(**chosen, data=text, out=out))


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, text: Path) -> None:
    run(2, accumulated, tmp_path, text, timeout=240)
    for stage in range(3):
        whole, parts = (checkpoint.load_shared(tmp_path / f"{stage}-{n}")["curve"] for n in (1, 2))
        for a, b in zip(whole, parts, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4), stage


def by_default(folder: Path, text: Path) -> None:
    """A run at ZeRO 2 without a spec that stops after 4 steps and goes on, past the choice."""
    fresh()
    settings = {**TINY, "data": text, "out": folder / "out", "parallel": "deepspeed", "parameters": "auto"}
    assert train.train(train.Settings(**{**settings, "steps": 4}))
    assert train.train(train.Settings(**{**settings, "steps": 64}, resume=True))


@pytest.mark.slow
def test_a_run_by_default_finds_its_specs_and_goes_on(tmp_path: Path, text: Path) -> None:
    run(2, by_default, tmp_path, text)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["settings"]["compress"], record["settings"]["parameters"]) == ("auto", "auto")
    assert record["steps_done"] == 64
    assert record["report"]["spec"].startswith("auto: ")
    assert "still looking" not in record["report"]["spec"]


def refused(folder: Path, text: Path) -> list[str]:
    """What is said about settings that no engine takes."""
    fresh()
    chosen = {**TINY, "data": text, "out": folder / "out", "parallel": "deepspeed"}
    wishes: list[dict[str, Any]] = [
        {"zero_stage": 0, "parameters": "int8"},
        {"zero_stage": 3, "optimizer": "OneBitAdamW", **BEHIND},
        {"zero_stage": 4},
    ]
    return [outcome(lambda w=w: train.train(train.Settings(**chosen, **w))) for w in wishes]


def test_what_no_engine_takes_is_said_in_a_sentence(tmp_path: Path, text: Path) -> None:
    for replicas, whole, stage in run(2, refused, tmp_path, text):
        assert "TrainingError: parameters 'int8': ZeRO 0 sends no parameters" in replicas
        assert "TrainingError: OneBitAdamW under ZeRO 3: expected ZeRO 0, 1 or 2" in whole
        assert stage == "TrainingError: --zero-stage 4: expected 0, 1, 2 or 3"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_either_launcher_starts_it(tmp_path: Path, text: Path, launcher: str) -> None:
    flags = {**TINY, "parallel": "deepspeed", "data": text, "out": tmp_path / "out", "compress": "int4"}
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    program = Path(sys.executable).with_name(launcher)
    ranks = {"torchrun": ["--nproc-per-node", "2", "-m"], "deepspeed": ["--no_local_rank", "--num_accelerators", "2"]}
    ranks["deepspeed"].append("--module")
    port = {"torchrun": "--master-port", "deepspeed": "--master_port"}[launcher]
    command = [program, port, str(demo.free_port()), *ranks[launcher], "commpress.launch.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PATH"] = f"{program.parent}:{environment['PATH']}"  # the launcher looks for python there
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["world_size"], record["steps_done"]) == (2, STEPS)
