"""`train` by `auto`, which is its default, and by specs by parameter, on two ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from clocked import by_clock
from commands import Ended, ended, run_command
from ranks import outcome, run

from commpress import Session
from commpress.comm.auto_behind import AutoBehind
from commpress.comm.sharded_auto import ShardedAuto
from commpress.launch import recipes, train

MODEL = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "eval_every": 0, "threads": 1}


def pays(spec: str) -> float:
    """The seconds of a step where all specs pay."""
    return 1.0 if spec == "none" else 0.5


def does_not(spec: str) -> float:
    return 0.5 if spec == "none" else 1.0


def trained(folder: Path, seconds: Callable[[str], float]) -> tuple[Ended, int]:
    """What came of a run whose steps take so long by spec, and how many losses its session was told."""
    settings = train.Settings(**MODEL, steps=60, compress="auto", data=folder / "text.txt", out=folder / "run")
    noting = mock.patch.object(Session, "note_loss", autospec=True, side_effect=Session.note_loss)
    with noting as told, by_clock(seconds):
        return ended(lambda: train.train(settings)), told.call_count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "first", "last"),
    [
        (pays, "both measured in this run", "; 2.00 times as fast as without compression"),
        (does_not, "compression does not pay here, it is off: a step", "; compression does not pay here, it is off"),
    ],
)
def test_a_run_with_auto_ends_with_its_receipt(
    tmp_path: Path, seconds: Callable[[str], float], first: str, last: str
) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    said, told = run(2, trained, tmp_path, seconds)[0]
    assert said.code == 0
    assert told == 60
    choices = json.loads((tmp_path / "run" / "record.json").read_text())["report"]["choices"]
    assert {trial["spec"] for trial in choices[-1]["trials"]} == {"none", "bf16", "int8", "int4"}
    page = tmp_path / "page.html"
    assert run_command("report", page, tmp_path / "run" / "record.json").code == 0
    assert "What auto chose" in page.read_text()
    assert first in said.out
    line = said.out.rstrip().splitlines()[-1]
    assert line.startswith("commpress ")
    assert " MB a step, mean of 60 steps: a dense exchange in float32 sends " in line
    assert line.endswith(last)


def sharded(folder: Path) -> Ended:
    folder.joinpath("recipe.toml").write_text('[traffic]\nspec = "auto"\nparameters = "auto"\n')
    settings = train.Settings(
        **MODEL, steps=60, parallel="fsdp", recipe=folder / "recipe.toml", data=folder / "text.txt", out=folder / "run"
    )
    with by_clock(pays, ShardedAuto):
        return ended(lambda: train.train(settings))


@pytest.mark.slow
def test_a_sharded_run_finds_the_specs_that_its_recipe_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    said = run(2, sharded, tmp_path)[0]
    assert said.code == 0, said.err
    assert "both measured in this run" in said.out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["settings"]["compress"], record["settings"]["parameters"]) == ("auto", "auto")
    assert record["report"]["spec"].startswith("auto: ")
    assert "still looking" not in record["report"]["spec"]


SHARDED = ("--parallel", "deepspeed", "--optimizer", "OneBitAdamW", "--parameters", "int8")


@pytest.mark.parametrize("flags", [("--parallel", "diloco"), SHARDED], ids=" ".join)
def test_auto_is_for_gradients_and_for_optimizers_that_are_not_sharded(tmp_path: Path, flags: tuple[str, ...]) -> None:
    refused = run_command("train", "--compress", "auto", *flags, "--out", tmp_path / "refused")
    assert refused.code == 1
    assert "--compress auto: expected --parallel ddp, fsdp or deepspeed, and no --parameters beside" in refused.err


def test_parameters_are_found_beside_gradients(tmp_path: Path) -> None:
    flags = ("--parallel", "fsdp", "--compress", "int4", "--parameters", "auto")
    refused = run_command("train", *flags, "--out", tmp_path / "refused")
    assert refused.code == 1
    assert "--parameters auto: one search finds both specs; expected --compress auto, got int4" in refused.err


@pytest.mark.parametrize(
    ("chosen", "spec"),
    [
        ({}, "auto"),
        ({"optimizer": "SGD"}, "auto"),
        ({"compress": "int4"}, "int4"),
        ({"optimizer": "OneBitAdamW"}, "auto"),
        ({"optimizer": "EF21Muon"}, "auto"),
        ({"optimizer": "OneBitAdamW", "parallel": "deepspeed", "parameters": "int8"}, "int4"),
        ({"optimizer": "EF21Muon", "parallel": "fsdp"}, "auto"),
        ({"optimizer": "EF21Muon", "parallel": "deepspeed", "parameters": "int8"}, "auto"),
        ({"optimizer": "EF21Muon", "parallel": "diloco"}, "int4"),
        *(({"parallel": parallel}, "auto") for parallel in ("fsdp", "deepspeed")),
        *(({"parallel": parallel}, "int4") for parallel in ("local_sgd", "diloco")),
    ],
    ids=str,
)
def test_the_default_is_auto_where_auto_works(chosen: dict[str, str], spec: str) -> None:
    assert recipes.with_specs(train.Settings(**chosen)).compress == spec


def cut_and_resumed(folder: Path) -> list[str]:
    """A run by default that stops after 4 steps and goes on, and what is said to those who go on by another spec."""
    said = []
    common = {**MODEL, "data": folder / "text.txt"}
    for name, spec, other in (("auto", None, "int4"), ("int4", "int4", None)):
        settings = {**common, "out": folder / name}
        assert train.train(train.Settings(**settings, compress=spec, steps=4))
        assert train.train(train.Settings(**settings, compress=spec, steps=6, resume=True))
        said.append(outcome(lambda s=settings, o=other: train.train(train.Settings(**s, compress=o, resume=True))))
    return said


def test_a_run_by_default_goes_on_by_auto_and_others_do_not(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    for by_name, by_default in run(2, cut_and_resumed, tmp_path):
        assert "has --compress auto, this one --compress int4; both must be the same" in by_name
        assert "has --compress int4, this one --compress auto; both must be the same" in by_default
    record = json.loads((tmp_path / "auto" / "record.json").read_text())
    assert (record["settings"]["compress"], record["steps_done"]) == ("auto", 6)


def behind(folder: Path) -> Ended:
    settings = train.Settings(
        **MODEL,
        steps=125,  # 6 of warm-up, 4 as they are, and a search of at most 50, times the longest interval
        optimizer="ZeroOneAdamW",
        optimizer_warmup=6,
        sync_every=2,
        compress="auto",
        data=folder / "text.txt",
        out=folder / "run",
    )
    with by_clock(pays, AutoBehind):
        return ended(lambda: train.train(settings))


@pytest.mark.slow
def test_a_run_by_zero_one_adam_finds_its_spec_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    said = run(2, behind, tmp_path)[0]
    assert said.code == 0, said.err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["report"]["spec"].startswith("auto: ")
    assert "still looking" not in record["report"]["spec"]
    assert "both measured in this run" in said.out


RULES = {"blocks.0.*": "int8", "*.bias": "none", "*": "int4"}


def by_patterns(folder: Path) -> list[str]:
    """A run by the patterns of a file, which goes on by those of another; one by a file of other patterns."""
    if dist.get_rank() == 0:
        folder.joinpath("rules.toml").write_text(
            "".join(f'"{pattern}" = "{spec}"\n' for pattern, spec in RULES.items())
        )
        folder.joinpath("rules.json").write_text(json.dumps(RULES))
        folder.joinpath("other.toml").write_text('"*.bias" = "none"\n"*" = "int4"\n')
    dist.barrier()
    common = {**MODEL, "layers": 2, "data": folder / "text.txt", "out": folder / "run"}
    assert train.train(train.Settings(**common, compress=str(folder / "rules.toml"), steps=4))
    assert train.train(train.Settings(**common, compress=str(folder / "rules.json"), steps=6, resume=True))
    saved = json.loads((folder / "run" / "record.json").read_text())["settings"]
    assert train.train(train.Settings(**{**saved, "data": folder / "text.txt", "out": folder / "run"}))  # is at its end
    return [
        outcome(
            lambda: train.train(train.Settings(**common, compress=str(folder / "other.toml"), steps=6, resume=True))
        ),
        outcome(
            lambda: train.train(
                train.Settings(
                    **{**common, "out": folder / "no"},
                    compress=str(folder / ("rules.toml", "other.toml")[dist.get_rank()]),
                )
            )
        ),
    ]


def test_a_file_has_specs_by_parameter(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    for other, differ in run(2, by_patterns, tmp_path):
        assert f"has --compress {json.dumps(RULES)}, this one --compress " in other
        assert ' has --compress {"*.bias": "none", "*": "int4"}, rank 0 has --compress {"blocks.0' in differ
        assert "all ranks need the same" in differ
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert json.loads(record["settings"]["compress"]) == RULES
    assert list(record["report"]["rules"]) == [f"{pattern}: {spec}" for pattern, spec in RULES.items()]
    assert {row["spec"] for row in record["report"]["rows"]} == {"int8", "none", "int4"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", '"*.wieght" = "int8"\n"*" = "int4"', "'*.wieght': decides for none of"),
        ("a.toml", '"*.bias" = "none"', "no pattern fits parameter"),
        ("a.toml", '"*" = "int5"', "'*': spec 'int5': unknown codec 'int5'"),
        ("a.toml", 'blocks.0.bias = "none"', "'blocks': expected a spec in quotes"),
        ("a.toml", '"*" = 4', '\'*\': expected a spec in quotes, as in "*.bias" = "none", got 4'),
        ("a.toml", "", "expected patterns and their specs"),
        ("a.toml", '"*" = ', "Invalid value"),
        ("a.json", '{"*": "int4", "*": "int8"}', "'*': the pattern appears twice"),
        ("a.json", "[1]", "expected patterns and their specs"),
        ("a.json", '{"*": ', "line 1"),
    ],
)
def test_a_file_that_makes_no_sense_is_named_with_its_key(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    refused = run_command("train", "--compress", path, "--out", tmp_path / "out", "--steps", 2)
    assert refused.code == 1
    assert f"error: --compress {path}: " in refused.err
    assert said in refused.err
    assert "Traceback" not in refused.err


FALLING = "topk(0.25->0.05, 5)|int4"


def by_falling_ratio(folder: Path) -> None:
    """A run by a ratio that warms up, with a restart in its third stage."""
    common = {**MODEL, "optimizer": "SGD", "data": folder / "text.txt", "out": folder / "run", "compress": FALLING}
    assert train.train(train.Settings(**common, steps=3))
    assert train.train(train.Settings(**common, steps=6, resume=True))


@pytest.mark.slow
def test_a_ratio_that_warms_up_goes_on_after_a_restart(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 100)
    run(2, by_falling_ratio, tmp_path)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["report"]["spec"] == FALLING
    specs = list(dict.fromkeys(row["spec"] for row in record["report"]["rows"]))
    assert specs == [f"topk({ratio})|int4" for ratio in ("0.0952", "0.069", "0.05")]  # steps 3 to 5


@pytest.mark.parametrize("flags", [("--parallel", "fsdp"), ("--optimizer", "DGC")], ids=" ".join)
def test_a_ratio_that_warms_up_is_for_replicas_with_a_plain_optimizer(tmp_path: Path, flags: tuple[str, str]) -> None:
    refused = run_command("train", "--compress", FALLING, *flags, "--out", tmp_path / "out", "--steps", 2)
    assert refused.code == 1
    assert f"error: --compress {FALLING}: a ratio warms up under --parallel ddp" in refused.err
    assert "expected one ratio, such as topk(0.05)|int4" in refused.err


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused = run_command("train", "--compress", tmp_path / "absent.toml", "--out", tmp_path / "out", "--steps", 2)
    assert refused.code == 1
    assert f"error: cannot read --compress {tmp_path / 'absent.toml'}: No such file or directory" in refused.err


@pytest.mark.parametrize("flags", [("--parallel", "fsdp"), ("--optimizer", "DGC")], ids=" ".join)
def test_specs_by_parameter_are_for_ddp_with_a_plain_optimizer(tmp_path: Path, flags: tuple[str, str]) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('"*" = "int4"\n')
    refused = run_command("train", "--compress", path, *flags, "--out", tmp_path / "out", "--steps", 2)
    assert refused.code == 1
    assert "expected --parallel ddp and --optimizer AdamW or SGD, got " in refused.err
