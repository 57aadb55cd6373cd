"""The network lab really makes hosts and links, and the kernel's counters agree with what the report claims."""

import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hosts import on_host
from ranks import Died, outcome, run
from tiers import slow
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress
from commpress.launch import lab, strategies
from commpress.launch.model import GPT, Shape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
needs_lab = pytest.mark.skipif(bool(lab.missing()), reason=lab.missing())


def namespaces() -> set[str]:
    """Those of labs. Others may come and go, also with labs that run beside the tests."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines()}


def own(process: int) -> set[str]:
    return {name for name in namespaces() if name.startswith((f"cp{process}h", f"cp{process}sw"))}


def inside(namespace: str) -> set[int]:
    """The processes in a namespace."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    return {int(word) for word in done.stdout.split()}


def run_lab(*arguments: str, prefix: Sequence[str] = (), timeout: float = 150) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "commpress.launch.lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def started_lab(*arguments: str) -> "subprocess.Popen[str]":
    """A lab of two hosts whose ranks run."""
    # one write a rank: both write to one pipe
    script = [sys.executable, "-c", r"import os, time; os.write(1, b'up\n'); time.sleep(600)"]
    command = [sys.executable, "-m", "commpress.launch.lab", "2", "100mbit", *arguments, "--", *script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    return process


def transfer(hosts: Sequence[lab.Host]) -> tuple[float, float]:
    """3 MB over TCP from host 0 to host 1, checked there; seconds until the answer, and until a connection stood."""
    script = ["ip", "netns", "exec", hosts[0].namespace, sys.executable, "-IS", "-c", TRANSFER, hosts[1].namespace]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    whole, connection = map(float, done.stdout.split())
    return whole, connection


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("rate", "fast", "such as 10gbit"),
        ("rate", "0mbit", "above 0"),
        ("delay", "soon", "such as 20ms"),
        ("loss", "0.1", "such as 0.1%"),
        ("loss", "100%", "below 100"),
        ("hosts", 0, "1 to 200"),
        ("ranks_per_host", 0, "1 to 200"),
    ],
)
def test_senseless_networks_are_refused_with_the_value(setting: str, value: object, expected: str) -> None:
    sane: dict[str, object] = {"hosts": 2, "rate": "1gbit"}
    with pytest.raises(ValueError, match=f"{value}.*{expected}"):
        lab.Link(**{**sane, setting: value})  # type: ignore[arg-type]


@needs_lab
def test_a_link_has_its_rate() -> None:
    with lab.network(lab.Link(2, "100mbit")) as hosts:
        seconds, _ = transfer(hosts)
        assert hosts[0].counters()[0] > 3_000_000
    assert 20 <= 8 * 3 / seconds <= 110  # Mbit/s; a busy machine can only be slower than the link
    assert not own(os.getpid())


@pytest.mark.slow
@needs_lab
def test_delay_and_loss_are_those_of_a_network() -> None:
    """Delay once each way, from host to host. Single packets are lost, all bytes arrive nevertheless."""
    with lab.network(lab.Link(2, "1gbit", "10ms")) as hosts:
        _, connection = transfer(hosts)
        assert 0.02 <= connection < 0.04  # the best of ten
        assert hosts[0].lost() == hosts[1].lost() == 0
    with lab.network(lab.Link(2, "1gbit", "10ms", "1%")) as hosts:
        transfer(hosts)
        assert 1 <= hosts[1].lost() <= 100  # of about 2,100 packets and as many again
    assert not own(os.getpid())


@needs_lab
def test_a_delay_that_cannot_be_made_at_this_rate_is_refused() -> None:
    with lab.network(lab.Link(1, "1gbit", "1ms")) as hosts:
        relayed = hosts[0].relay > 0
    if not relayed:
        pytest.skip("this kernel delays packets at any rate (sch_netem)")
    with pytest.raises(RuntimeError, match=r"delay 1ms at 10gbit: .*sch_netem.* at most 1gbit"):
        lab.network(lab.Link(2, "10gbit", "1ms")).__enter__()
    assert not own(os.getpid())


@pytest.mark.slow
@needs_lab
def test_ranks_of_one_host_speak_over_its_loopback(tmp_path: Path) -> None:
    """Two hosts of two ranks: 4 MB between the ranks of each host, then 1 MB between the hosts."""
    link = lab.Link(2, "1gbit", ranks_per_host=2)
    with lab.network(link) as hosts:
        assert lab.run([sys.executable, "-c", TWO_LEVELS, str(tmp_path)], link, hosts, timeout=100) == 0
        between, within = hosts[0].counters()[0], hosts[0].counters("lo")[0]
    assert 1e6 <= between < 2e6
    assert within >= 8e6  # each rank's 4 MB
    found = {rank: json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)}
    for rank, environment in found.items():
        assert environment["COMMPRESS_HOST"] == f"host {rank // 2}"
        place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        assert {name: int(environment[name]) for name in place} == place
        assert json.loads(environment["LAB_LINK"]) == {
            **{"hosts": 2, "ranks_per_host": 2, "rate": "1gbit", "delay": "0ms", "loss": "0%"},
            **{"shaped": True, "relayed": False},
        }


@needs_lab
def test_a_failing_rank_ends_the_others_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they hang."""
    monkeypatch.setattr(lab, "PATIENCE", 0.2)
    script = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3); time.sleep(600)"
    link = lab.Link(2, "1gbit")
    with lab.network(link) as hosts:
        assert lab.run([sys.executable, "-c", script], link, hosts, timeout=60) == 3
        assert not inside(hosts[0].namespace)
    assert not own(os.getpid())


@needs_lab
def test_a_network_that_fails_half_way_leaves_nothing() -> None:
    """tc takes no rate that it rounds to 0; by then there are namespaces and links."""
    with pytest.raises(RuntimeError, match=r"tc -n .* rate 1bit"):
        lab.network(lab.Link(2, "1bit")).__enter__()
    assert not own(os.getpid())


@pytest.mark.slow
@needs_lab
def test_sigterm_cleans_up_and_spares_other_labs() -> None:
    process = started_lab()
    try:
        hosts = own(process.pid)
        assert len(hosts) == 3
        ranks = set().union(*map(inside, hosts))
        with lab.network(lab.Link(2, "1gbit")):
            assert own(process.pid) == hosts
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 130
            assert len(own(os.getpid())) == 3
        assert not own(process.pid)
        assert len(ranks) == 2
        assert not any(Path("/proc", str(rank)).exists() for rank in ranks)
    finally:
        process.kill()


@pytest.mark.slow
@needs_lab
def test_the_next_lab_removes_what_a_killed_one_left() -> None:
    process = started_lab("--delay", "1ms")
    process.kill()
    process.wait()
    left = own(process.pid)
    assert len(left) == 3
    running = set().union(*map(inside, left))
    assert len(running) >= 2
    with lab.network(lab.Link(1, "1gbit")):
        assert not own(process.pid)
    deadline = time.monotonic() + 20  # whoever inherited the processes has to collect them
    while any(Path("/proc", str(p)).exists() for p in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path("/proc", str(p)).exists() for p in running)


@pytest.mark.slow
def test_without_rights_the_command_runs_on_loopback_and_it_says_so(tmp_path: Path) -> None:
    prefix: list[str] = [] if lab.missing() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [sys.executable, "-c", TWO_LEVELS, str(tmp_path)]
    done = run_lab("2", "1gbit", "--delay", "20ms", "--", *command, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert "a network lab needs" in done.stderr
    assert "not of 1gbit links" in done.stdout.splitlines()[-1]
    assert json.loads(json.loads((tmp_path / "1").read_text())["LAB_LINK"]) == {
        **{"hosts": 2, "ranks_per_host": 1, "rate": "loopback", "delay": "0ms", "loss": "0%"},
        **{"shaped": False, "relayed": False},
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def local(model: GPT) -> strategies.Strategy:
    return strategies.Local(model, sgd(model), "diloco", "int8", {"every": 2, "fragments": 2})


STRATEGIES: dict[str, Callable[[GPT], strategies.Strategy]] = {
    "ddp": lambda model: strategies.Replicated(model, sgd(model), "int4"),
    "fsdp": lambda model: strategies.Sharded(model, sgd, "int4", "int8"),
    "diloco": local,
}


def counted(action: Callable[[], object]) -> int:
    """What this host's kernel sends while all ranks do it."""
    dist.barrier()
    before = lab.sent_by_kernel()
    action()
    time.sleep(0.2)  # until the last packets have left
    dist.barrier()
    return lab.sent_by_kernel() - before


def steps(spread: strategies.Strategy) -> None:
    tokens = torch.arange(64).view(2, 32)
    for _ in range(4):
        spread.model(tokens).float().square().mean().backward()
        spread.optimizer.step()
        spread.optimizer.zero_grad()


def kernel_agrees(link: lab.Link, hosts: Sequence[lab.Host], ways: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Some steps of ways to spread a model, or broadcasts: the bytes by the report, and by the kernel."""
    found = {}
    with on_host(link, hosts):
        dist.init_process_group("gloo")
        for way in ways:
            model = GPT(Shape(3, 192, 4, 32))
            if way == "broadcast":
                reports: list[commpress.Report] = []
                kernel = counted(partial(broadcasts, model, reports))
                found[way] = reports[-1].sent_bytes, kernel
            else:
                spread = STRATEGIES[way](model)
                kernel = counted(partial(steps, spread))
                found[way] = spread.session.report().sent_bytes, kernel
        dist.destroy_process_group()
    return found


def broadcasts(model: GPT, reports: list[commpress.Report]) -> None:
    for _ in range(3):
        reports.append(commpress.broadcast_parameters(model, "int8"))


@needs_lab
@pytest.mark.parametrize("ways", [("ddp",), slow(("fsdp", "diloco", "broadcast"))], ids=" and ".join)
def test_the_kernel_agrees_for_every_way_to_spread_a_model(ways: Sequence[str]) -> None:
    """Three hosts, of some MB each: gradients, sharded parameters, outer updates, broadcasts."""
    link = lab.Link(3, "10gbit")
    with lab.network(link) as hosts:
        ranks = run(3, kernel_agrees, link, hosts, ways, fresh=True)
    for way in ways:
        reported, counted_ = (sum(rank[way][i] for rank in ranks) for i in (0, 1))
        assert reported > 1e6
        assert reported == pytest.approx(counted_, rel=0.02), way


def measured(link: lab.Link, hosts: Sequence[lab.Host], arguments: list[str]) -> None:
    """The benchmark of training steps, with a smaller model and fewer steps before it counts."""
    spec = importlib.util.spec_from_file_location("benchmarks_training", BENCHMARKS / "training.py")
    assert spec is not None
    assert spec.loader is not None
    training = importlib.util.module_from_spec(spec)
    sys.path.append(str(BENCHMARKS))
    spec.loader.exec_module(training)
    training.SHAPE, training.WARM_UP = replace(training.SHAPE, layers=3), 2
    with on_host(link, hosts), mock.patch.object(sys, "argv", ["training.py", *arguments]):
        training.main()


@pytest.mark.slow
@needs_lab
def test_the_benchmark_says_what_the_kernel_counts(tmp_path: Path) -> None:
    """At 10 MB a step and more, within 2 %."""
    record = tmp_path / "steps.json"
    arguments = ["--only", "int8", "--rounds", "1", "--steps", "2", "--json", str(record)]
    link = lab.Link(2, "10gbit")
    with lab.network(link) as hosts:
        run(2, measured, link, hosts, arguments, fresh=True, timeout=120)
    rows = {row["name"]: row for row in json.loads(record.read_text())["rows"]}
    assert rows["int8"]["sent_bytes"] > 10e6
    assert rows["int8"]["sent_bytes"] == pytest.approx(rows["int8"]["kernel_bytes"], rel=0.02)
    assert rows["no communication"]["kernel_bytes"] < 0.1e6


def cut_off(link: lab.Link, hosts: Sequence[lab.Host], folder: Path, timeout: float) -> None:
    """The host that keeps the store falls silent, its link cut; the others write down what their backward says."""
    rank, limit = dist.get_rank(), datetime.timedelta(seconds=timeout)
    with on_host(link, hosts):
        dist.init_process_group("gloo", timeout=limit)
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        commpress.attach(model, "int4")
        for _ in range(3):
            model(torch.randn(8, 64)).sum().backward()
        dist.barrier()
        if rank == 0:
            subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
            deadline = time.monotonic() + 3 * timeout
            while len(list(folder.iterdir())) < len(hosts) - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            os._exit(0)
        time.sleep(0.5)
        started = time.monotonic()
        said = outcome(lambda: model(torch.randn(8, 64)).sum().backward())
        (folder / f"{rank}").write_text(json.dumps([said, time.monotonic() - started]))
        os._exit(0)


@pytest.mark.slow
@needs_lab
def test_a_store_that_falls_silent_keeps_nobody_beyond_the_timeout(tmp_path: Path) -> None:
    timeout, link = 4.0, lab.Link(3, "100mbit")
    with lab.network(link) as hosts:
        ends = run(3, cut_off, link, hosts, tmp_path, timeout, fresh=True)
    assert ends == [Died(0)] * 3
    for rank in (1, 2):
        said, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert "rank 0 (host 0) did not answer within the group's timeout" in said
        assert seconds < timeout + 2


TRANSFER = """
import hashlib, socket, subprocess, sys, time
data = hashlib.shake_256(b"seed").digest(3_000_000)
server = '''
import hashlib, socket
for port in range(5000, 5010): socket.create_server(("10.90.0.2", port)).detach()
s = socket.create_server(("10.90.0.2", 6000)); print("up", flush=True); c, _ = s.accept()
got = bytearray()
while len(got) < 3_000_000: got += c.recv(1 << 16)
c.sendall(hashlib.sha256(got).digest())
'''
command = ["ip", "netns", "exec", sys.argv[1], sys.executable, "-IS", "-c", server]
other = subprocess.Popen(command, stdout=subprocess.PIPE)
other.stdout.readline()
connections = []
for port in range(5000, 5010):
    start = time.perf_counter()
    socket.create_connection(("10.90.0.2", port), timeout=20).detach()
    connections.append(time.perf_counter() - start)
start = time.perf_counter()
c = socket.create_connection(("10.90.0.2", 6000), timeout=20)
c.sendall(data)
assert c.recv(32) == hashlib.sha256(data).digest()
print(time.perf_counter() - start, min(connections))
other.wait(timeout=20)
"""

TWO_LEVELS = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, size, local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
hosts = [dist.new_group(list(range(first, first + local))) for first in range(0, size, local)]
dist.all_reduce(torch.ones(1_000_000), group=hosts[rank // local])
leaders = dist.new_group(list(range(0, size, local)))
if rank % local == 0:
    x = torch.ones(250_000)
    dist.all_reduce(x, group=leaders)
    assert x.sum() == 250_000 * size // local
pathlib.Path(sys.argv[1], str(rank)).write_text(json.dumps(dict(os.environ)))
dist.barrier()
dist.destroy_process_group()
"""
