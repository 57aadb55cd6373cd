"""What one rank of a training program meets alone: all ranks end, with one sentence and one code, or go on without it."""

import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import run_command
from ranks import Died, run
from tiers import slow

from commpress.launch import checkpoint, data, tasks

TINY = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "steps": 6, "warmup-steps": 1, "threads": 1}
SOON = 15
"""Seconds in which all ranks have ended, on a busy machine; the group's timeout is 20."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


def command(by_rank: list[dict[str, Any]]) -> tuple[int, str, str]:
    """The command line with this rank's flags, as rank R of a host of its own: exit code, output, errors."""
    rank = dist.get_rank()
    os.environ["COMMPRESS_HOST"] = f"host {rank}"
    flags = [part for name, value in {**TINY, **by_rank[rank]}.items() for part in (f"--{name}", str(value))]
    return run_command("train", *(flag for flag in flags if flag != "True"))


def requires_one_sentence(results: list[tuple[int, str, str]], rank: int, *words: str) -> None:
    """All ranks end with 1; rank 0 and the one that met it say so in the same line, with the words; others are silent."""
    for other, (code, _, errors) in enumerate(results):
        assert code == 1, results
        if other not in (0, rank):
            assert not errors
            continue
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert f"rank {rank} (host {rank})" in errors
        for word in words:
            assert word in errors, errors


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_data_that_one_rank_cannot_read(tmp_path: Path, text: Path, rank: int) -> None:
    flags = [{"data": text, "out": tmp_path / "out"} for _ in range(3)]
    flags[rank]["data"] = tmp_path / "absent.txt"
    requires_one_sentence(run(3, command, flags, timeout=SOON), rank, "cannot read", str(tmp_path / "absent.txt"))
    assert not (tmp_path / "out").exists()


def test_what_all_ranks_meet_is_said_once_and_without_a_rank(tmp_path: Path) -> None:
    flags = [{"data": tmp_path / "absent.txt", "out": tmp_path / "out"} for _ in range(2)]
    (first, _, said), (second, _, silent) = run(2, command, flags, timeout=SOON)
    assert (first, second, silent) == (1, 1, "")
    assert said == f"error: cannot read --data {tmp_path}/absent.txt: there is no such file or folder\n"


def test_a_folder_that_one_rank_cannot_write(tmp_path: Path, text: Path) -> None:
    for out, reason in (
        (text / "below", "Not a directory"),
        (Path("/proc/1/run"), "cannot write"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        flags = [{"data": text, "out": tmp_path / "out"}, {"data": text, "out": out}]
        requires_one_sentence(run(2, command, flags, timeout=SOON), 1, f"--out {out}", reason)


def test_a_recipe_and_a_teacher_that_one_rank_cannot_read(tmp_path: Path, text: Path) -> None:
    recipe, other = tmp_path / "recipe.toml", tmp_path / "other.toml"
    recipe.write_text("[[prune]]\nstart = 1\namount = 0.5\n")
    other.write_text(f'[distil]\nteacher = "{tmp_path}/nobody"\n')
    common = {"data": text, "out": tmp_path / "out", "recipe": recipe}
    absent = [common, {**common, "recipe": tmp_path / "absent.toml"}]
    requires_one_sentence(run(2, command, absent, timeout=SOON), 1, "--recipe", "absent.toml", "No such file")
    run(2, command, [{"data": text, "out": tmp_path / "teacher"}] * 2)
    here = tmp_path / "here.toml"
    here.write_text(f'[distil]\nteacher = "{tmp_path}/teacher"\n')
    results = run(2, command, [{**common, "recipe": here}, {**common, "recipe": other}], timeout=SOON)
    requires_one_sentence(results, 1, "distil.teacher", f"{tmp_path}/nobody")


def test_flags_that_differ(tmp_path: Path, text: Path) -> None:
    common = {"data": text, "out": tmp_path / "out"}
    for name, value, before in (("steps", 5, 6), ("compress", "int8", "auto"), ("lr", 0.5, 0.001)):
        results = run(2, command, [common, {**common, name: value}], timeout=SOON)
        requires_one_sentence(
            results, 1, f"--{name} {value}", f"rank 0 has --{name} {before}", "all ranks need the same"
        )


def test_flags_that_only_one_rank_has(tmp_path: Path, text: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[prune]]\nstart = 1\namount = 0.5\n")
    common = {"data": text, "out": tmp_path / "out"}
    for more, here, there in (
        ({"recipe": recipe}, "--recipe one", "--recipe none"),
        ({"recipe": recipe, "resume": True}, "--recipe one", "--recipe none"),
        ({"resume": True}, "--resume True", "--resume False"),
        ({"fork": tmp_path / "other"}, "--fork one", "--fork none"),
        ({"tensorboard": True}, "--tensorboard True", "--tensorboard False"),
    ):
        results = run(2, command, [common, {**common, **more}], timeout=SOON)
        requires_one_sentence(results, 1, f"has {here}, rank 0 has {there}: all ranks need the same")
    both = {**common, "recipe": recipe}
    results = run(2, command, [both, {**both, "resume": True}], timeout=SOON)
    requires_one_sentence(results, 1, "has --resume True, rank 0 has --resume False")


def test_texts_that_differ_are_named_by_rank_and_host(tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 300)
    flags = [{"data": path, "out": tmp_path / "out"} for path in (text, other)]
    (code, _, said), (as_well, _, _) = run(2, command, flags, timeout=SOON)
    assert (code, as_well) == (1, 1)
    assert "rank 1 (host 1) reads 3900 bytes" in said


def test_a_checkpoint_that_one_rank_has_lost(tmp_path: Path, text: Path) -> None:
    common = {"data": text, "out": tmp_path / "out"}
    assert [code for code, _, _ in run(2, command, [common] * 2)] == [0, 0]
    (tmp_path / "out" / "step-00000006" / "session-rank1.pt").unlink()
    results = run(2, command, [{**common, "resume": True, "steps": 8}] * 2, timeout=SOON)
    requires_one_sentence(results, 1, "session-rank1.pt is missing")


def test_hosts_without_a_shared_disk_keep_their_own_parts(tmp_path: Path, text: Path) -> None:
    """And a resumed run follows the unbroken one bit for bit."""
    apart = [{"data": text, "out": tmp_path / f"host{rank}", "eval-every": 2} for rank in range(2)]
    (code, said, _), (as_well, silent, _) = run(2, command, [{**flags, "checkpoint-every": 4} for flags in apart])
    assert (code, as_well, silent) == (0, 0, "")
    assert "is a folder of its own on each host" in said
    names = [
        sorted(str(p.relative_to(tmp_path / f"host{r}")) for p in (tmp_path / f"host{r}").rglob("*")) for r in (0, 1)
    ]
    folder = "step-00000006"
    assert names[0] == ["latest", "record.json", folder, f"{folder}/checkpoint.pt", f"{folder}/session-rank0.pt"]
    assert names[1] == ["latest", folder, f"{folder}/session-rank1.pt"]
    results = run(2, command, [{**flags, "resume": True, "steps": 9} for flags in apart])
    assert [code for code, _, _ in results] == [0, 0], results
    # the same on a shared disk, for the values
    run(2, command, [{**apart[0], "out": tmp_path / "shared"}] * 2)
    run(2, command, [{**apart[0], "out": tmp_path / "shared", "resume": True, "steps": 9}] * 2)
    one, other = (checkpoint.load_shared(tmp_path / name)["model"] for name in ("host0", "shared"))
    for name in one:
        assert torch.equal(one[name], other[name])


def test_a_recipe_on_hosts_without_a_shared_disk(tmp_path: Path, text: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[prune]]\nstart = 1\namount = 0.5\n\n[[quantize]]\nstart = 2\nbits = 8\n")
    flags = [{"data": text, "out": tmp_path / f"host{rank}", "recipe": recipe} for rank in range(2)]
    (code, said, errors), (as_well, _, _) = run(2, command, flags)
    assert (code, as_well) == (0, 0), errors
    assert "times smaller than in float32" in said
    assert [(tmp_path / f"host{rank}" / "model.safetensors").exists() for rank in range(2)] == [True, False]


def failing(folder: Path, by_rank: list[dict[str, Any]], rank: int, how: str) -> None:
    """Training in which `rank` meets something in the middle; each rank writes down its end, and ends."""
    sample, drawn = data.sample, 0

    def counting(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 3 and dist.get_rank() == rank:
            if how == "raises":
                raise KeyError("a column of the user's")
            if how == "dies":
                os._exit(9)
            if how == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return sample(*arguments)

    data.sample = counting
    if how == "nan" and dist.get_rank() == rank:
        loss = tasks.cross_entropy
        tasks.cross_entropy = lambda *given: loss(*given) * (float("nan") if drawn >= 3 else 1.0)
    started = time.monotonic()
    end = command(by_rank)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    (folder / f"end{dist.get_rank()}").write_text(json.dumps([*end, time.monotonic() - started]))
    os._exit(1)


@pytest.mark.parametrize(
    ("how", "spec", "rank"),
    [
        # each way on each rank, compressed and not, and each of these two on each rank
        *(("raises", "int4", 1), ("raises", "none", 0), ("dies", "int4", 0), slow("dies", "none", 1)),
        *((how, "int4", rank) for how in ("full", "nan") for rank in (0, 1)),
    ],
)
def test_what_a_rank_meets_in_the_middle_ends_all(tmp_path: Path, text: Path, how: str, spec: str, rank: int) -> None:
    flags = {"data": text, "out": tmp_path / "out", "checkpoint-every": 3, "compress": spec}
    results = run(2, failing, tmp_path, [flags] * 2, rank, how, fresh=True, timeout=40)
    assert [result.exitcode for result in results if isinstance(result, Died)] == (
        [1, 1] if how != "dies" else [9, 1] if rank == 0 else [1, 9]
    )
    ends = {r: json.loads(path.read_text()) for r in (0, 1) if (path := tmp_path / f"end{r}").exists()}
    assert set(ends) == ({0, 1} if how != "dies" else {1 - rank})
    who, other = f"rank {rank} (host {rank})", f"rank {1 - rank} (host {1 - rank})"
    for r, (code, _, errors, seconds) in ends.items():
        assert code == 1
        assert seconds < SOON
        assert errors.startswith("error: ") or (how in ("full", "nan") and r == 1 and not errors)
        assert errors.count("\n") <= 1
    if how == "raises":
        assert f'{who}: KeyError: "a column of the user\'s"' in ends[rank][2]
        assert ends[1 - rank][2].startswith(f"error: {other}") or spec == "int4"
    if how == "full":
        assert f"{who}: " in ends[0][2]
        assert f"{who}: " in ends[rank][2]
        assert "File too large" in ends[rank][2]
    if how == "nan":
        assert "step 3: the loss is nan" in ends[0][2]
        assert f"not finite on {who}" in ends[0][2]
        assert ends[0][2].endswith(f" is probably too high, or {spec} too coarse\n")
    if how == "dies":
        assert ends[1 - rank][2].startswith(f"error: {other}")
    shutil.rmtree(tmp_path / "out")
