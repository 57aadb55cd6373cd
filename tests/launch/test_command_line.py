"""A wrong path, flag or permission is a sentence with the flag and its value, in every command; never a traceback."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import run_command
from ranks import run
from tiers import slow
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.files import save_state
from commpress.launch import checkpoint
from commpress.launch.records import read

TINY = ("--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "2", "--steps", "2")
TINY = (*TINY, "--warmup-steps", "1", "--threads", "1")
ASKED = ("--params", "1e6", "--world", "4", "--bandwidth", "1gbit", "--spec", "int4")
WHOLE = ("--layers", "--width", "--heads", "--context", "--batch", "--accumulate", "--steps", "--warmup-steps")
WHOLE = (*WHOLE, "--eval-every", "--eval-batches", "--seed", "--checkpoint-every", "--threads", "--timeline")
WHOLE = (*WHOLE, "--fragments", "--delay", "--sync-every", "--optimizer-warmup", "--zero-stage")
REAL = ("--lr", "--weight-decay", "--outer-lr", "--outer-momentum")


def commpress_command(*arguments: object) -> tuple[int, str]:
    """Exit code and what is on stderr. Anything but an end of the program fails the test."""
    code, _, said = run_command(*arguments)
    return code, said


def requires_a_sentence(done: tuple[int, str], *words: object) -> None:
    code, said = done
    assert code in (1, 2), said
    assert "Traceback" not in said
    boxed = code == 2 and said.startswith("╭")  # what cannot be read at all, in tyro's words
    if not boxed:
        assert said.count("\n") == 1, said
    plain = " ".join(said.replace("│", " ").split())
    for word in words:
        assert str(word).lower() in plain.lower() if boxed else str(word) in plain, said


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, Path]:
    """Paths of all sorts, none of which holds what a flag wants."""
    (tmp_path / "file").write_text("the quick brown fox " * 400)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    return {
        "absent": tmp_path / "no" / "such",
        "folder": tmp_path / "folder",
        "below a file": tmp_path / "file" / "below",
        "forbidden": Path("/proc/1/x"),
        "no file": Path("/dev/full"),
        "binary": tmp_path / "binary",
        "too long": tmp_path / ("x" * 300),
    }


def test_paths_of_train(tmp_path: Path, bad: dict[str, Path]) -> None:
    common = ("train", *TINY, "--data", tmp_path / "file", "--out", tmp_path / "out")
    fine = {"--data": {"binary"}, "--out": {"absent", "folder"}, "--recipe": set(), "--fork": set()}
    for flag, takes in fine.items():
        for sort, path in bad.items():
            if sort not in takes:
                requires_a_sentence(commpress_command(*common, flag, path), flag, path)
                assert not (tmp_path / "out").exists()
    requires_a_sentence(commpress_command(*common, "--resume"), "--resume", tmp_path / "out")


@pytest.mark.parametrize("value", [slow("-1"), "abc", "nan", slow("99999999999999999999")])
def test_numbers_of_train(tmp_path: Path, bad: dict[str, Path], value: str) -> None:
    common = ("train", *TINY, "--data", tmp_path / "file", "--out", tmp_path / "out")
    for flag in (*WHOLE, *REAL):
        if value.startswith("999") and flag in REAL:
            continue  # senseless, but a number
        requires_a_sentence(commpress_command(*common, flag, value), flag, value)
    assert not (tmp_path / "out").exists()


def test_what_no_memory_holds_is_refused_before_it_is_asked_for(tmp_path: Path, bad: dict[str, Path]) -> None:
    common = ("train", *TINY, "--data", tmp_path / "file", "--out", tmp_path / "out")
    for flag in ("--layers", "--width", "--context", "--batch"):
        requires_a_sentence(commpress_command(*common, flag, 10**9), flag, 10**9, "this host has")


@pytest.mark.parametrize("spec", ["int5", "topk(2)", "topk(", "", "int4|int4", "topk(0.1)|topk(0.1)", "\x01"])
def test_specs(tmp_path: Path, bad: dict[str, Path], spec: str) -> None:
    common = ("train", *TINY, "--data", tmp_path / "file", "--out", tmp_path / "out")
    for flag in ("--compress", "--parameters", "--warmup-compress"):
        requires_a_sentence(commpress_command(*common, flag, spec), f"{flag}: ")
    requires_a_sentence(commpress_command("explain", *ASKED, "--spec", spec), f"--spec {spec}")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--params", ("0", "x", "-1", "nan", "1e300")),
        ("--world", ("1", "-1", "x")),
        ("--bandwidth", ("x", "0gbit", "1")),
        ("--delay", ("x", "-1ms")),
        ("--bucket-mb", ("0.0", "nan", "inf", "1e-12", "-1.0")),
        ("--ranks-per-host", ("0", "99")),
        ("--cores", ("-1", "x")),
        ("--step-seconds", ("0.0", "nan", "inf", "x")),
        ("--device", ("tpu",)),
    ],
)
def test_numbers_of_explain(flag: str, values: tuple[str, ...]) -> None:
    for value in values:
        requires_a_sentence(commpress_command("explain", *ASKED, flag, value), flag, value)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--params", ("0", "x", "-1", "nan", "1e300")),
        ("--model", ("x", "torch:", ":nn")),
        ("--step-seconds", ("0.0", "nan", "inf", "x")),
        ("--seconds", ("0.0", "nan", "inf", "-1.0", "x")),
    ],
)
def test_values_of_probe(flag: str, values: tuple[str, ...]) -> None:
    """Without torchrun, too: what is wrong with a flag comes before how to start it."""
    given = () if flag in ("--params", "--model") else ("--params", "7b")
    for value in values:
        requires_a_sentence(commpress_command("probe", *given, flag, value), flag, value)


def test_paths_of_the_other_commands(tmp_path: Path, bad: dict[str, Path]) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"what": "predictions", "answer": "none", "rows": []}))
    for sort, path in bad.items():
        requires_a_sentence(commpress_command("report", tmp_path / "deep" / "out.html", path), path)
        requires_a_sentence(commpress_command("explain", "--check", path), path)
        if sort not in ("absent", "folder"):
            requires_a_sentence(commpress_command("demo", "--out", path, "--steps", 1), "--out", path)
        if sort not in ("absent", "binary"):
            requires_a_sentence(commpress_command("report", path, good), path, "cannot be written")
            requires_a_sentence(commpress_command("explain", *ASKED, "--json", path), f"--json {path}", "cannot be")
            probe = commpress_command("probe", "--params", "1m", "--json", path)
            requires_a_sentence(probe, *(() if sort == "no file" else (f"--json {path}", "cannot be")))
    assert not (tmp_path / "deep").exists()
    requires_a_sentence(commpress_command("report", good, good), good, "expected the page to write first")
    assert json.loads(good.read_text())["answer"] == "none"


@pytest.mark.parametrize(
    "garbage",
    [
        "[" * 100_000,
        '{"spec": 1, "rank": 2, "rows": 5}',
        '{"settings": 1, "traffic": 2, "curve": 3, "steps_done": 4, "median_step_seconds": 5, "machine": 6,'
        ' "world_size": 7, "backend": 8}',
        '{"what": "step times", "rows": 3}',
        '{"traceEvents": [1, null]}',
        '{"what": "losses", "world_size": 2, "model": 1, "parameters": "x", "tokens_per_step": 1, "target": 1, "rows": []}',
        '{"what": "explain", "params": "x", "world": 1, "bandwidth": null, "device": 1, "rows": []}',
    ],
    ids=range(7),
)
def test_records_of_another_shape_name_the_file(tmp_path: Path, garbage: str) -> None:
    path = tmp_path / "garbage.json"
    path.write_text(garbage)
    requires_a_sentence(commpress_command("report", tmp_path / "new" / "out.html", path), path)
    requires_a_sentence(commpress_command("explain", "--check", path), path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("0", "1gbit", "--", "true"), ("hosts 0",)),
        (("2", "fast", "--", "true"), ("rate 'fast'",)),
        (("2", "1gbit", "--delay", "soon", "--", "true"), ("delay 'soon'",)),
        (("2", "1gbit", "--loss", "100%", "--", "true"), ("loss '100%'",)),
        (("2", "1gbit", "--ranks-per-host", "0", "--", "true"), ("ranks per host 0",)),
        (("2", "1gbit", "--", "no-such-command"), ("no-such-command",)),
        (("two", "1gbit", "--", "true"), ("hosts",)),
    ],
)
def test_the_lab(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    requires_a_sentence(commpress_command("lab", *arguments), *words)


def test_a_user_who_may_not_write_reads_a_sentence(bad: dict[str, Path]) -> None:
    """As another user than root: root may write everywhere."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o755)
        text = Path(folder, "text")
        text.write_text("the quick brown fox " * 400)
        closed = Path(folder, "closed")
        closed.write_text("the quick brown fox " * 400)
        closed.chmod(0o600)
        out, free = Path(folder, "out"), Path(folder, "free")
        free.mkdir()
        free.chmod(0o777)
        wishes = [
            (("demo", "--out", out, "--steps", 1), "--out", out),
            (("train", *TINY, "--data", text, "--out", out), "--out", out),
            (("train", *TINY, "--data", closed, "--out", free), "cannot read --data", closed),
            (("report", free / "out.html", closed), "cannot be read", closed),
        ]
        commands = json.dumps([[str(argument) for argument in arguments] for arguments, _, _ in wishes])
        done = subprocess.run(
            [sys.executable, "-c", AS_ANOTHER_USER, str(Path(__file__).parents[1]), commands],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            cwd="/",
        )
        if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
            pytest.skip(f"this interpreter is closed to others: {done.stderr.splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        for ended, (_, flag, path) in zip(json.loads(done.stdout), wishes, strict=True):
            requires_a_sentence((ended[0], ended[2]), flag, path, "enied")


AS_ANOTHER_USER = """
import json, os, sys
sys.path.append(sys.argv[1])
from commands import run_command
from commpress.launch import cli, demo, explain, lab, report, train
os.setgid(65534)
os.setuid(65534)
print(json.dumps([run_command(*arguments) for arguments in json.loads(sys.argv[2])]))
"""


# --- what the package writes, the report takes -------------------------------------------------------------------


def written(folder: Path) -> None:
    """Reports and a timeline of sessions of all kinds, written by each rank."""
    rank = dist.get_rank()
    x = torch.randn(8, 64)

    def train_on(model: torch.nn.Module, session: object, name: str) -> None:
        for _ in range(3):
            model(x).sum().backward()
        session.report().write_json(folder / f"{name}-{rank}.json")  # type: ignore[attr-defined]

    replicated = DistributedDataParallel(torch.nn.Linear(64, 64))
    session = commpress.attach(replicated, "int4")
    with session.timeline() as timeline:
        train_on(replicated, session, "ddp")
    timeline.write(folder / f"timeline-{rank}.json")
    sharded = fully_shard(torch.nn.Linear(64, 64))
    train_on(sharded, commpress.attach(sharded, gradients="int4", parameters="int8"), "fsdp")
    exact = DistributedDataParallel(torch.nn.Linear(64, 64))
    train_on(exact, commpress.attach(exact, "none"), "none")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `written` writes on two ranks."""
    folder = tmp_path_factory.mktemp("reports")
    run(2, written, folder)
    return folder


@pytest.mark.slow
def test_commpress_report_takes_all_that_the_package_writes(tmp_path: Path, reports: Path) -> None:
    shutil.copytree(reports, tmp_path, dirs_exist_ok=True)
    code, said = commpress_command("explain", *ASKED, "--step-seconds", "1", "--json", tmp_path / "explain.json")
    assert code == 0, said
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 9
    for file in files:
        read(file)
        code, said = commpress_command("report", tmp_path / "a" / "b" / "one.html", file)
        assert code == 0, said
    code, said = commpress_command("report", tmp_path / "all.html", *files)
    assert code == 0, said
    html = (tmp_path / "all.html").read_text()
    for text in (
        "int4, rank 0 of 2",
        "gradients int4, parameters int8, rank 1 of 2",
        "Predictions",
        "Timeline of a step",
    ):
        assert text in html


def test_the_ratio_of_sharded_gradients_is_against_what_must_be_sent(reports: Path) -> None:
    rows = [row for row in json.loads((reports / "fsdp-0.json").read_text())["rows"] if row["role"] == "gradients"]
    dense, sent, backend = (sum(row[key] for row in rows) for key in ("dense_bytes", "sent_bytes", "backend_bytes"))
    assert dense == 3 * 4 * 65 * 32  # the other's half of 64 x 65 values
    assert 7 < dense / sent < 8
    assert backend == 2 * dense  # Gloo all-reduces and keeps a part
    exact = json.loads((reports / "none-0.json").read_text())
    assert exact["ratio"] == 1.0
    assert exact["backend_bytes"] == exact["dense_bytes"]


@pytest.mark.parametrize(
    ("flag", "value", "others"),
    [
        ("--parameters", "int8", ()),
        ("--sync-every", 3, ()),
        ("--zero-stage", 1, ("--parallel", "fsdp")),
        ("--outer-lr", 0.1, ("--parallel", "local_sgd")),
        ("--outer-momentum", 0.1, ()),
        ("--fragments", 2, ()),
        ("--delay", 1, ()),
        ("--optimizer-warmup", 1, ("--optimizer", "SGD")),
        ("--warmup-compress", "int8", ("--optimizer", "DGC")),
        ("--fragments", 31, ("--parallel", "diloco")),
        ("--delay", 30, ("--parallel", "diloco")),
        ("--outer-momentum", 1.0, ("--parallel", "diloco")),
    ],
)
def test_a_flag_that_would_count_for_nothing_or_cannot_be(
    tmp_path: Path, bad: dict[str, Path], flag: str, value: object, others: tuple[str, ...]
) -> None:
    common = ("train", *TINY, "--data", tmp_path / "file", "--out", tmp_path / "out")
    requires_a_sentence(commpress_command(*common, *others, flag, value), f"{flag} {value}: ", "expected")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--params", "1e400"),
        ("--params", "1e308"),
        ("--world", "1000000000"),
        ("--bandwidth", "1e400gbit"),
        ("--bandwidth", "1e-300kbit"),
        ("--delay", "1e300s"),
        ("--bucket-mb", "1e+308"),
        ("--step-seconds", "1e+308"),
    ],
)
def test_figures_that_no_cluster_has_are_refused_at_once(flag: str, value: str) -> None:
    requires_a_sentence(commpress_command("explain", *ASKED, flag, value), flag, value)


@pytest.mark.parametrize(
    "other",
    [
        {"world_size": 0},
        {"machine": "0 cores"},
        {"parameters": 10**17},
        {"parameters": 0},
        {"bucket_mb": "x"},
        {"bucket_mb": -1},
        {"floor": 1e308},
        {"floor": -1.0},
        {"seconds": "x"},
        {"seconds": float("inf")},
        {"name": "int5"},
        {"ranks_per_host": "x"},
    ],
    ids=str,
)
def test_step_times_that_nobody_measured_name_the_file(tmp_path: Path, other: dict[str, object]) -> None:
    link = {"hosts": 2, "rate": "1gbit", "delay": "0ms", "loss": "0%", "shaped": True}
    rows = [
        {"name": "floor", "kind": "floor", "seconds": other.get("floor", 1.0), "quartiles": [1.0, 1.0, 1.0]},
        {"name": other.get("name", "none"), "kind": "commpress", "seconds": other.get("seconds", 1.0)},
    ]
    record = {
        **{"what": "step times", "machine": "2 cores", "world_size": 2, "parameters": 1000000},
        **{key: value for key, value in other.items() if key in ("machine", "world_size", "parameters", "bucket_mb")},
        **{"link": {**link, "ranks_per_host": other.get("ranks_per_host", 1)}, "rows": rows},
    }
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(record))
    requires_a_sentence(commpress_command("explain", "--check", path), path)


@pytest.mark.parametrize("key", ["identity", "model", "durations", "curve", "traffic", "step"])
def test_a_checkpoint_that_lacks_a_part_names_the_file_and_the_part(
    tmp_path: Path, bad: dict[str, Path], key: str
) -> None:
    file = tmp_path / "out" / "step-00000001" / "checkpoint.pt"
    checkpoint.write(tmp_path / "out", 1, 0, {}, {})
    checkpoint.publish(tmp_path / "out", 1)
    whole = {"step": 1, "identity": {}, "model": {}, "durations": [], "curve": [], "traffic": {}}
    save_state(file, {name: value for name, value in whole.items() if name != key})
    common = ("train", *TINY, "--data", tmp_path / "file", "--out", tmp_path / "out")
    requires_a_sentence(commpress_command(*common, "--resume"), file, f"it has no {key!r}")


def test_the_lab_needs_a_command() -> None:
    requires_a_sentence(run_command("lab", "2", "1gbit")[::2], "expected a command after --")
