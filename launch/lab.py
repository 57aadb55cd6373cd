"""A network of any speed on one machine: N hosts as Linux network namespaces, joined by a bridge over shaped links.

    python -m commpress.launch.lab 2 1gbit -- python benchmarks/step_time.py

         h0 eth0 ===\\          each === is a veth pair; both of its ends send through `tc tbf` at the rate,
         h1 eth0 ====[bridge]   and through `netem` if there is a delay. The command runs once on every host
         h2 eth0 ===/           as one rank, with torchrun's environment. The kernel counts the bytes.

Needs root, `ip` and `tc` (Debian: iproute2). Namespaces and processes are gone afterwards, also on Ctrl-C and errors.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

PORT = 29511
BURST = "256kb"
"""tbf's bucket: a little more than the largest segment that the kernel hands down, so that a link reaches its rate."""
_RATE = re.compile(r"\d+(\.\d+)?[kmg]?bit")
_DELAY = re.compile(r"\d+(\.\d+)?(us|ms|s)")


@dataclass(frozen=True)
class Host:
    """One host of the lab: its rank, its namespace and its address."""

    rank: int
    namespace: str
    address: str

    def counters(self) -> tuple[int, int]:
        """Bytes that its interface has sent and received, by the kernel's count."""
        text = _run("ip", "-n", self.namespace, "-s", "-j", "link", "show", "eth0")
        stats = json.loads(text)[0]["stats64"]
        return int(stats["tx"]["bytes"]), int(stats["rx"]["bytes"])


def missing() -> str:
    """Why no lab can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "a network lab needs root, for network namespaces"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"a network lab needs {' and '.join(absent)} (Debian: apt-get install iproute2)" if absent else ""


@contextlib.contextmanager
def network(hosts: int, rate: str, delay: str = "0ms") -> Iterator[list[Host]]:
    """Hosts joined by links of `rate` (as 100mbit, 1gbit) with `delay` (as 20ms) in each direction, while the block runs.

    Raises ValueError for a rate, delay or number that makes no sense, RuntimeError without root or tools.
    """
    if hosts < 1 or hosts > 200:
        raise ValueError(f"hosts {hosts}: expected 1 to 200")
    if not _RATE.fullmatch(rate):
        raise ValueError(f"rate {rate!r}: expected a number and kbit, mbit or gbit, such as 1gbit")
    if not _DELAY.fullmatch(delay):
        raise ValueError(f"delay {delay!r}: expected a number and us, ms or s, such as 20ms")
    if reason := missing():
        raise RuntimeError(reason)
    tag = f"cp{os.getpid()}"
    switch, made = f"{tag}sw", [Host(r, f"{tag}h{r}", f"10.90.0.{r + 1}") for r in range(hosts)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in made:
            _connect(host, switch, rate, delay)
        yield made
    finally:
        for name in (*(h.namespace for h in made), switch):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def run(command: Sequence[str], hosts: Sequence[Host], timeout: float | None = None) -> int:
    """Run `command` as one rank on each host; returns the worst exit code. A rank that fails ends the others."""
    ranks: list[subprocess.Popen[bytes]] = []
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        for host in hosts:
            place = {"RANK": host.rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            meeting = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0"}
            environment = {"OMP_NUM_THREADS": "1", **os.environ, **{k: str(v) for k, v in (place | meeting).items()}}
            inside = ["ip", "netns", "exec", host.namespace, *command]
            ranks.append(subprocess.Popen(inside, env=environment, start_new_session=True))
        while any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks if rank.poll() is not None):
                with contextlib.suppress(subprocess.TimeoutExpired):  # the others should fail by themselves and say why
                    for rank in ranks:
                        rank.wait(timeout=20)
                break
            if deadline is not None and time.monotonic() > deadline:
                print(f"lab: not done after {timeout} s, ending all ranks", file=sys.stderr)
                return 124
            time.sleep(0.05)
        return max((abs(rank.poll() or 0) if rank.poll() is not None else 1) for rank in ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()


def _connect(host: Host, switch: str, rate: str, delay: str) -> None:
    """A veth pair from a host to the switch, shaped at both ends."""
    port = f"p{host.rank}"
    _run("ip", "netns", "add", host.namespace)
    _run("ip", "link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/16", "dev", "eth0")
    _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
    _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
    _run("ip", "-n", switch, "link", "set", port, "master", "br0")
    _run("ip", "-n", switch, "link", "set", port, "up")
    for namespace, device in ((host.namespace, "eth0"), (switch, port)):
        shape = ("tc", "-n", namespace, "qdisc", "add", "dev", device)
        _run(*shape, "root", "handle", "1:", "tbf", "rate", rate, "burst", BURST, "latency", "100ms")
        if not re.fullmatch(r"0(\.0+)?(us|ms|s)", delay):
            try:
                _run(*shape, "parent", "1:1", "handle", "10:", "netem", "delay", delay, "limit", "10000")
            except RuntimeError as error:
                raise RuntimeError(f"delay {delay}: this kernel cannot delay packets (no sch_netem): {error}") from None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def main(
    hosts: Annotated[int, typer.Argument(help="how many hosts, one rank on each")],
    rate: Annotated[str, typer.Argument(help="speed of each link: 100mbit, 1gbit, ...")],
    command: Annotated[list[str], typer.Argument(help="after --, the command that each host runs")],
    delay: Annotated[str, typer.Option(help="one-way delay of each link")] = "0ms",
) -> None:
    """Run a command as one rank on each of several hosts joined by links of a given speed, and count the bytes."""

    def end(signum: int, frame: object) -> None:
        raise KeyboardInterrupt  # SIGTERM too cleans up

    signal.signal(signal.SIGTERM, end)
    try:
        with network(hosts, rate, delay) as made:
            code = run(command, made)
            for host in made:
                sent, received = host.counters()
                print(f"host {host.rank}: {sent / 1e6:.2f} MB sent, {received / 1e6:.2f} MB received, by the kernel")
    except (ValueError, RuntimeError) as error:
        print(f"lab: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        code = 130
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
