"""`commpress probe`: what it measures on real ranks, what it makes of that, what it refuses, and what it says in the end."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from commands import Ended, run_command
from hosts import on_host
from ranks import run

from commpress.comm import cost, link_speed
from commpress.comm import speed as codec_speed
from commpress.comm.auto import SPECS
from commpress.comm.cost import Cluster, Speed
from commpress.comm.link_speed import LinkSpeed
from commpress.launch import lab, probe, records, speed, stragglers
from commpress.launch.model_size import trained_parameters
from commpress.launch.predictions import predicted
from commpress.launch.speed import Measured
from commpress.launch.verdict import BEYOND, span, verdict

needs_lab = pytest.mark.skipif(bool(lab.missing()), reason=lab.missing())
QUICK = ("--seconds", "0.2")
FAST = Speed(1e-10, (1e-10, 1e-10), (1e-10, 1e-10), 1e-10)
MEASURED = Measured("a machine", dict.fromkeys((*SPECS, *BEYOND), FAST), 1e-10)
MB = 2**20


def probed(by_rank: Sequence[Sequence[object]], hosts: Sequence[str], lazy: int | None = None) -> Ended:
    """The command on this rank, which stands on a host of that name; rank `lazy` computes slower than the others."""
    rank = dist.get_rank()

    def sleepy(a: torch.Tensor, out: torch.Tensor) -> float:
        start = time.perf_counter()
        work(a, out)
        time.sleep(0.02 * (rank == lazy))
        return time.perf_counter() - start

    work = stragglers.work
    with (
        mock.patch.dict(os.environ, {"COMMPRESS_HOST": hosts[rank], "COLUMNS": "200"}),
        mock.patch.object(codec_speed, "VALUES", 2**14),
        mock.patch.object(speed, "SOCKET_BYTES", 2**21),
        mock.patch.object(link_speed, "MOST", 2**20),
        mock.patch.object(stragglers, "work", sleepy),
    ):
        return run_command("probe", *by_rank[rank])


def everywhere(*arguments: object, hosts: Sequence[str], lazy: int | None = None) -> list[Ended]:
    return run(len(hosts), probed, [(*QUICK, *arguments)] * len(hosts), hosts, lazy)


def test_rank_0_prints_and_all_ranks_end_with_0() -> None:
    first, second = everywhere("--params", "2m", hosts=["a", "b"])
    assert (first.code, second.code) == (0, 0), first.err
    assert second.out == second.err == first.err == ""
    for words in ("2 ranks on 2 hosts", "Between hosts: ", "each rank has a host of its own", "Stragglers", "Codecs"):
        assert words in first.out
    assert [line.split()[0] for line in first.out.splitlines() if "all_reduce" in line] == ["plain", "bf16"]
    assert first.out.splitlines()[-1].startswith("Your network is ")


def test_links_between_hosts_and_inside_them_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    found = everywhere("--params", "2m", "--step-seconds", "0.1", "--json", path, hosts=["a", "a", "b"])
    assert [ended.code for ended in found] == [0, 0, 0], found[0].err
    assert "3 ranks on 2 hosts" in found[0].out
    assert "Inside a host: nothing" not in found[0].out
    assert "hours a day" in found[0].out
    record = records.read(path)
    assert record["hosts"] == ["a", "a", "b"]
    for link in (record["between"], record["inside"]):
        assert link["bandwidth"] > 1e6
        assert link["repeats"] >= link_speed.FEWEST
    assert record["bandwidth"] == pytest.approx(record["between"]["bandwidth"] * cost.FRAME)
    assert [row["spec"] for row in record["rows"]] == [*SPECS, *BEYOND]
    assert len(record["work_seconds"]) == 3
    page = tmp_path / "page.html"
    assert run_command("report", page, path).code == 0
    assert record["answer"] in page.read_text()


def test_ranks_of_one_host_have_no_link_between_hosts(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    found = everywhere("--params", "2m", "--json", path, hosts=["a", "a"])
    assert "Between hosts: nothing to measure, there is one host." in found[0].out
    record = json.loads(path.read_text())
    assert record["between"] is None
    assert record["bandwidth"] == pytest.approx(record["inside"]["bandwidth"] * cost.FRAME)


def test_a_rank_that_computes_slower_is_named_with_its_host() -> None:
    first, *_ = everywhere("--params", "2m", hosts=["a", "b", "c"], lazy=1)
    (line,) = (line for line in first.out.splitlines() if line.startswith("Stragglers"))
    assert line.startswith("Stragglers in computing: rank 1 (b) by ")


def test_stragglers_are_those_more_than_a_tenth_behind() -> None:
    hosts = ["a", "a", "b", "b"]
    said = stragglers.sentence([1.0, 1.0, 1.09, 1.0], hosts)
    assert said == "Stragglers: none. The slowest in computing, rank 2 (b), takes 9% more than the median."
    said = stragglers.sentence([1.0, 1.2, 1.0, 3.0], hosts)
    assert said.startswith("Stragglers in computing: rank 3 (b) by 200%, rank 1 (a) by 20% behind")
    assert "rank 1" in stragglers.sentence([1.0, 1.2], ["a", "b"])  # of two ranks, too


# --- the link ----------------------------------------------------------------------------------------------------


def test_rings_load_each_link_in_both_directions() -> None:
    hosts = link_speed.by_host(["a", "b", "a", "b", "c", "a"])
    assert hosts == [[0, 2, 5], [1, 3], [4]]
    assert link_speed.ring_between(hosts) == {0: (1, 4), 1: (4, 0), 4: (0, 1)}
    assert link_speed.ring_between(hosts[:2]) == {0: (1, 1), 1: (0, 0), 2: (3, 3), 3: (2, 2)}
    assert link_speed.ring_inside(hosts) == {0: (2, 5), 2: (5, 0), 5: (0, 2), 1: (3, 3), 3: (1, 1)}
    assert link_speed.ring_between([[0, 1]]) == link_speed.ring_inside([[0], [1]]) == {}


def test_neither_latency_nor_a_start_without_shaping_counts_as_bandwidth() -> None:
    assert link_speed.bandwidth(MB // 4, 0.02 + 0.25, MB, 0.02 + 1.0) == pytest.approx(MB)
    assert link_speed.bandwidth(MB // 4, 0.15, MB, 0.9) == pytest.approx(MB)
    assert link_speed.bandwidth(MB // 4, 0.99, MB, 1.0) == pytest.approx(MB)  # disturbed: no 75 MB/s


def between_hosts(link: lab.Link, hosts: Sequence[lab.Host]) -> tuple[LinkSpeed | None, LinkSpeed | None]:
    with on_host(link, hosts):
        dist.init_process_group("gloo")
        group = dist.distributed_c10d._get_default_group()
        found = link_speed.between_and_inside([[0], [1]], group, torch.device("cpu"), 1.0, link_speed.MOST)
        dist.destroy_process_group()
    return found


@needs_lab
def test_the_link_of_a_lab_is_measured_as_it_was_made() -> None:
    link = lab.Link(2, "100mbit", "20ms")
    measured = []
    with lab.network(link) as hosts:
        for _ in range(4):  # a busy machine makes it slower: the best counts, which no link can be faster than
            found, other = run(2, between_hosts, link, hosts, fresh=True)
            assert found == other  # all ranks know the same
            between, inside = found
            assert inside is None
            measured.append((between.bandwidth * cost.FRAME * 8, between.latency))
            if measured[-1][0] > 0.9 * 100e6:
                break
    assert max(rate for rate, _ in measured) == pytest.approx(100e6, rel=0.15)
    assert 0.01 < min(latency for _, latency in measured) < 0.04


def test_one_host_has_the_speed_that_was_measured_inside() -> None:
    inside = LinkSpeed(1e-5, 1e8, MB, 9)
    one_host = probe.Found(["a", "a"], None, inside, [1.0, 1.0], MEASURED, 1.0)
    rows = predicted((), 25 * MB, 25 * MB, one_host.cluster(), None, MEASURED)
    assert rows[0]["communication_seconds"] == pytest.approx(rows[0]["sent_bytes"] / 1e8, rel=0.1)


def test_the_slowest_machine_counts_for_each_codec_and_what_it_measured_survives_json() -> None:
    slow = Measured("another", {**MEASURED.speeds, "int4": Speed(9e-9, (1.0, 2.0), (3.0, 4.0))}, 5e-11)
    read = Measured.from_json(json.loads(json.dumps(slow.to_json())))
    assert read == slow
    worst = Measured.slowest([MEASURED, slow])
    assert worst.speeds["int4"] == slow.speeds["int4"]
    assert worst.speeds["int8"] == FAST
    assert worst.stack == 1e-10


# --- the sentence ------------------------------------------------------------------------------------------------


def said_of(bits: float, step_seconds: float | None, speeds: Mapping[str, Speed] | None = None) -> str:
    """The sentence for 17 million parameters and a link of so many bits a second."""
    measured = Measured("a machine", {**MEASURED.speeds, **(speeds or {})}, 1e-10)
    rows = predicted((*SPECS[1:], *BEYOND), 17_000_000, 25 * MB, Cluster(2, bits / 8), step_seconds, measured)
    return verdict(rows, step_seconds)


def test_the_sentence_turns_with_the_link() -> None:
    slow, fast = said_of(1e8, 0.2), said_of(1e11, 0.2)
    assert slow.startswith("Your network is the bottleneck: plain DDP would spend 5.61 of 5.81 s")
    assert "a step on its exchange; int4 is predicted at " in slow
    assert "commpress.attach(model)" in slow
    assert fast.startswith("Your network is not the bottleneck: plain DDP would spend ")


def test_the_sentence_without_step_seconds_is_about_the_exchange_alone() -> None:
    slow = said_of(1e8, None)
    assert slow.startswith("Your network is the bottleneck of steps that compute for less than 8.")
    assert "plain DDP would exchange for 5.69 s a step; int4 is predicted at " in slow
    slow_codecs = dict.fromkeys((*SPECS[1:], *BEYOND), Speed(1e-7, (1e-7, 0.0), (0.0, 0.0)))
    assert said_of(1e11, None, slow_codecs).startswith("Your network is not the bottleneck: plain DDP would exchange")


def test_a_bottleneck_that_no_spec_removes_is_called_one() -> None:
    slow_codecs = dict.fromkeys((*SPECS[1:], *BEYOND), Speed(1e-6, (1e-6, 0.0), (0.0, 0.0)))
    said = said_of(1e9, 0.2, slow_codecs)
    assert said.startswith(
        "Your network is the bottleneck, but no safe spec is predicted to be faster: plain DDP would"
    )


def test_specs_that_need_an_optimizer_are_named_where_they_matter() -> None:
    assert "topk(0.01)|int4 is predicted at " in said_of(1e8, 0.2)
    assert "compressed optimizer, such as commpress.optim.OneBitAdamW" in said_of(1e8, 0.2)
    assert "optimizer" not in said_of(1e11, 0.2)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.345, "12.3 s"),
        (0.42, "420 ms"),
        (0.0031, "3.10 ms"),
        (1.6e-5, "0.02 ms"),
        (0.0, "0.00 ms"),
        (5690, "5,690 s"),
    ],
)
def test_seconds_are_written_to_be_read(seconds: float, text: str) -> None:
    assert span(seconds) == text


# --- flags -------------------------------------------------------------------------------------------------------


def test_one_rank_has_no_network_to_probe_and_reads_how_to_start_it() -> None:
    done = run_command("probe", "--params", "124m")
    assert done.code == 1
    assert done.err == (
        "error: one rank has no network to probe: start it on all ranks, as in "
        "torchrun --nproc-per-node 2 -m commpress.launch.probe --params 124m\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--params or --model: expected one of them"),
        (("--params", "7b", "--model", "a:b"), "--params 7b --model a:b: expected one of the two"),
        (("--params", "many"), "--params 'many': expected a number of parameters"),
        (("--params", "1e15"), "--params 1e15: makes 1.53e+08 buckets"),
        (("--params", "7b", "--seconds", "0"), "--seconds 0.0: expected a number from 0.1 to 600"),
        (("--params", "7b", "--step-seconds", "-1"), "--step-seconds -1.0: expected a number from 1e-09 to 1e+06"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value(arguments: tuple[str, ...], complaint: str) -> None:
    done = run_command("probe", *arguments)
    assert done.code == 1
    assert f"error: {complaint}" in done.err


def test_a_rank_with_other_flags_ends_all() -> None:
    flags = [(*QUICK, "--params", size) for size in ("2m", "2m", "3m")]
    first, second, third = run(3, probed, flags, ["a", "b", "c"])
    assert [ended.code for ended in (first, second, third)] == [1, 1, 1]
    complaint = "rank 2 (c) has --params 3m, rank 0 has --params 2m: all ranks need the same"
    assert first.err == third.err == f"error: {complaint}\n"
    assert first.out == second.out == second.err == ""


def test_a_rank_with_a_bad_flag_ends_all() -> None:
    flags = [(*QUICK, "--params", size) for size in ("2m", "two")]
    first, second = run(2, probed, flags, ["a", "b"])
    assert (first.code, second.code) == (1, 1)
    assert first.err.startswith("error: rank 1 (b): --params 'two': expected a number of parameters")


# --- a model -----------------------------------------------------------------------------------------------------

MODELS = """
from torch import nn
def big(): return nn.Linear(100_000, 100_000, bias=False)
def half():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].requires_grad_(False)
    return model
def reads():
    model = nn.Linear(3, 5, bias=False)
    assert model.weight.sum().item() < 100
    return model
def frozen(): return nn.Linear(2, 2).requires_grad_(False)
def asks(width): return nn.Linear(width, width)
def words(): return "a model"
class Zoo:
    small = staticmethod(lambda: nn.Linear(2, 3))
size = 3
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of models; it is the current one."""
    (tmp_path / "zoo_of_models.py").write_text(MODELS)
    (tmp_path / "broken_models.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "values"),
    [("half", 64), ("reads", 15), ("Zoo.small", 9), ("big", 10**10)],  # the last one has 40 GB
)
def test_the_trained_parameters_of_a_model_are_counted(zoo: Path, name: str, values: int) -> None:
    assert trained_parameters(f"zoo_of_models:{name}") == values


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("zoo_of_models", "expected module:factory, such as my_project.models:build"),
        ("zoo_of_models:", "expected module:factory"),
        (":big", "expected module:factory"),
        ("no_such_models:big", "no_such_models cannot be imported: ModuleNotFoundError"),
        ("broken_models:big", "broken_models cannot be imported: RuntimeError: no licence"),
        ("zoo_of_models:huge", "zoo_of_models has no huge"),
        ("zoo_of_models:size", "size is a int, expected a function or class"),
        ("zoo_of_models:asks", "the call fails: TypeError: asks() missing 1 required positional argument"),
        ("zoo_of_models:words", "returns a str, expected a torch.nn.Module"),
        ("zoo_of_models:frozen", "the model has no parameter to train"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_by_name(zoo: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^--model") as refused:
        trained_parameters(text)
    assert str(refused.value).startswith(f"--model {text}: {complaint}")


def test_a_model_that_rank_0_cannot_have_ends_all_ranks() -> None:
    first, second = everywhere("--model", "no_such_models:big", hosts=["a", "b"])
    assert (first.code, second.code) == (1, 1)
    assert "rank 0 (a): --model no_such_models:big: no_such_models cannot be imported" in first.err
    assert second.err == ""
    first, second = everywhere("--model", "torch.nn:Identity", hosts=["a", "b"])
    assert "--model torch.nn:Identity: the model has no parameter to train" in first.err
