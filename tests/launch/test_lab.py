"""The network lab really makes hosts and links, and the kernel's counters agree with what the report claims."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commpress.launch import lab

ROOT = Path(__file__).parents[2]
needs_lab = pytest.mark.skipif(bool(lab.missing()), reason=lab.missing())


def namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines()]


def run_lab(*arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "commpress.launch.lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(("hosts", "rate", "delay"), [(2, "fast", "0ms"), (2, "1gbit", "soon"), (0, "1gbit", "0ms")])
def test_senseless_networks_are_refused_with_the_value(hosts: int, rate: str, delay: str) -> None:
    value = next(v for v, sane in ((rate, "1gbit"), (delay, "0ms"), (str(hosts), "2")) if v != sane)
    with pytest.raises(ValueError, match=value), lab.network(hosts, rate, delay):
        pass


@needs_lab
def test_a_link_has_its_rate() -> None:
    before = namespaces()
    with lab.network(2, "100mbit") as hosts:
        transfer = ["ip", "netns", "exec", hosts[0].namespace, sys.executable, "-c", TRANSFER, hosts[1].namespace]
        done = subprocess.run(transfer, capture_output=True, text=True, timeout=60, check=True)
        assert hosts[0].counters()[0] > 3_000_000
    assert 0 < float(done.stdout) <= 110  # a busy machine can only be slower than the link
    assert namespaces() == before


@needs_lab
def test_a_delay_is_there_or_refused() -> None:
    """Kernels without netem exist; then the lab says so instead of leaving the delay out."""
    before = namespaces()
    refusal = ""
    try:
        with lab.network(2, "100mbit", "20ms") as hosts:
            transfer = ["ip", "netns", "exec", hosts[0].namespace, sys.executable, "-c", TRANSFER, hosts[1].namespace]
            done = subprocess.run(transfer, capture_output=True, text=True, timeout=60, check=True)
            megabits = float(done.stdout)
    except RuntimeError as error:
        refusal = str(error)
    # four delays pass before the answer to the last byte is here
    assert "no sch_netem" in refusal if refusal else megabits <= 8 * 3 / 0.08
    assert namespaces() == before


@needs_lab
def test_a_failing_rank_ends_the_others_and_leaves_nothing() -> None:
    before = namespaces()
    script = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3); time.sleep(1)"
    done = run_lab("2", "1gbit", "--", sys.executable, "-c", script)
    assert done.returncode == 3
    assert namespaces() == before


@needs_lab
def test_the_report_says_what_the_kernel_counts(tmp_path: Path) -> None:
    """At 10 MB a step and more, within 2 %."""
    record = tmp_path / "steps.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "step_time.py"), "int8", "--json", str(record)]
    done = run_lab("2", "10gbit", "--", *script, "--rounds", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    rows = {row["spec"]: row for row in json.loads(record.read_text())["rows"]}
    assert rows["int8"]["sent_bytes"] > 10e6
    assert rows["int8"]["sent_bytes"] == pytest.approx(rows["int8"]["kernel_bytes"], rel=0.02)
    assert rows["noop"]["kernel_bytes"] < 0.1e6


TRANSFER = """
import socket, subprocess, sys, time
server = '''
import socket
s = socket.create_server(("10.90.0.2", 5000)); print("up", flush=True); c, _ = s.accept()
got = 0
while got < 3_000_000: got += len(c.recv(1 << 16))
c.sendall(b"!")
'''
other = subprocess.Popen(["ip", "netns", "exec", sys.argv[1], sys.executable, "-c", server], stdout=subprocess.PIPE)
other.stdout.readline()
start = time.perf_counter()
c = socket.create_connection(("10.90.0.2", 5000), timeout=20)
c.sendall(bytes(3_000_000)); c.recv(1)
print(8 * 3 / (time.perf_counter() - start))
other.wait(timeout=20)
"""
