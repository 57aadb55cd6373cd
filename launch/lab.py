"""A network of any speed on one machine: hosts as Linux network namespaces, joined by a switch over shaped links.

    commpress lab 2 1gbit --ranks-per-host 2 --delay 10ms --loss 0.1% -- python benchmarks/training.py

         h0 [ rank 0  rank 1 ] eth0 ===\\          each === is a veth pair; both of its ends send through `tc tbf`
         h1 [ rank 2  rank 3 ] eth0 ====[switch]   at the rate. Ranks of one host share its namespace: they
         h2 [ rank 4  rank 5 ] eth0 ===/           talk over its loopback, unshaped, as inside a node.

The command runs once per rank, with torchrun's environment and the network in LAB_LINK (JSON). Delay and loss are from
host to host, one way. If the kernel has no sch_netem, `relay.py` makes the delay and replaces the switch. Loss is
a packet filter before each host, after the kernel has cut its segments into packets of 1,500 bytes.

Needs root, `ip` and `tc` (Debian: iproute2); else the command runs on the machine's own loopback. Namespaces and processes
are removed at the end, also on Ctrl-C, SIGTERM and errors; the next lab removes those of a killed one.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from commpress import extras
from commpress.launch import relay
from commpress.launch.link import Link as Link
from commpress.launch.link import free_port
from commpress.launch.link import joining as joining
from commpress.launch.link import sent_by_kernel as sent_by_kernel

try:
    from tyro.conf import arg

    from commpress.launch import command_line
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.lab", error, "launch") from None

PORT = 29511
PATIENCE = 20.0
"""Seconds for the other ranks to fail by themselves, and to say why, after one has failed."""
FAREWELL = 5.0
"""Seconds between SIGTERM and SIGKILL for a rank that is to end."""
MTU = 1500
RELAY_LIMIT = 1e9
"""The highest rate of a relay, in bits a second. On 2 busy cores of an AMD EPYC, one on each of two links and both directions
at once, it carried 0.9 of 1 Gbit/s for a fifth of a core a host, but only 1.5 of 2 Gbit/s, where the bridge carries 1.8."""
_CAPABILITIES = 1 << 12 | 1 << 21
"""CAP_NET_ADMIN and CAP_SYS_ADMIN."""
_OWN = re.compile(r"cp(\d+)(?:sw|h\d+)")
"""Names of a lab's namespaces; the number is the process that made them."""


@dataclass(frozen=True)
class Host:
    """One host of the lab: its place in the list, its namespace and address. Without a namespace it is this machine."""

    index: int
    namespace: str
    address: str
    relay: int = 0
    """The process that delays what it sends; 0 if there is none."""

    def counters(self, device: str = "eth0") -> tuple[int, int]:
        """Return the bytes that its interface has sent and received, by the kernel; `lo` counts those inside the host."""
        text = _run("ip", "-n", self.namespace, "-s", "-j", "link", "show", device)
        stats = json.loads(text)[0]["stats64"]
        return int(stats["tx"]["bytes"]), int(stats["rx"]["bytes"])

    def lost(self) -> int:
        """Return the packets that were lost on the way to it, by the kernel's count."""
        queues = json.loads(_run("tc", "-n", self.namespace, "-s", "-j", "qdisc", "show", "dev", "eth0"))
        return sum(int(queue["drops"]) for queue in queues if queue["kind"] == "clsact")

    def relay_seconds(self) -> float:
        """Return the core-seconds of its relay so far."""
        if not self.relay:
            return 0.0
        fields = Path(f"/proc/{self.relay}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def missing() -> str:
    """Return why no lab can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "a network lab needs root, for network namespaces"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"a network lab needs {' and '.join(absent)} (Debian: apt-get install iproute2)"
    held = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if held and int(held[1], 16) & _CAPABILITIES != _CAPABILITIES:
        return "a network lab needs the capabilities NET_ADMIN and SYS_ADMIN, which this container's root does not have"
    return ""


@contextlib.contextmanager
def network(link: Link) -> Iterator[list[Host]]:
    """Make the hosts of `link`, joined by its links, while the block runs.

    Raises RuntimeError without root or tools, for what this kernel cannot do, and for a rate that the relay cannot carry.
    """
    if reason := missing():
        raise RuntimeError(reason)
    remove_orphans()
    tag = f"cp{os.getpid()}"
    switch, hosts = f"{tag}sw", [Host(i, f"{tag}h{i}", f"10.90.0.{i + 1}") for i in range(link.hosts)]
    relays: list[subprocess.Popen[str]] = []
    try:
        _run("ip", "netns", "add", switch)
        relayed = link.delay_seconds > 0 and not _has_netem(switch)
        if relayed and link.bits_per_second > RELAY_LIMIT:
            raise RuntimeError(
                f"delay {link.delay} at {link.rate}: this kernel cannot delay packets (no sch_netem), and the relay that "
                f"does it instead carries at most {RELAY_LIMIT / 1e9:g}gbit"
            )
        if not relayed:
            _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in hosts:
            _connect(host, switch, link, relayed)
        if relayed:
            relays.extend(_relays(switch, link))
            hosts = [replace(host, relay=process.pid) for host, process in zip(hosts, relays, strict=True)]
        yield hosts
    finally:
        with _undisturbed():
            for process in relays:
                process.terminate()
            for process in relays:
                process.wait()
            for name in (*(host.namespace for host in hosts), switch):
                _remove(name)


def run(command: Sequence[str], link: Link, hosts: Sequence[Host], timeout: float | None = None) -> int:
    """Run `command` on `hosts` as the ranks of `link`; returns the worst exit code. A rank that fails ends the others."""
    ranks: list[subprocess.Popen[bytes]] = []
    deadline = None if timeout is None else time.monotonic() + timeout
    shared = {
        **{"WORLD_SIZE": link.hosts * link.ranks_per_host, "LOCAL_WORLD_SIZE": link.ranks_per_host},
        **{"MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT if link.shaped else free_port()},
        **{
            "GLOO_SOCKET_IFNAME": "eth0" if link.shaped else _loopback(),
            "LAB_LINK": json.dumps({**asdict(link), "relayed": hosts[0].relay > 0}),
        },
    }
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]}: there is no such command")
    try:
        for number in range(link.hosts * link.ranks_per_host):
            index, local_rank = divmod(number, link.ranks_per_host)
            place = {**shared, "RANK": number, "LOCAL_RANK": local_rank, "COMMPRESS_HOST": f"host {index}"}
            environment = {"OMP_NUM_THREADS": "1", **os.environ, **{k: str(v) for k, v in place.items()}}
            namespace = hosts[index].namespace
            inside = ["ip", "netns", "exec", namespace, *command] if namespace else command
            ranks.append(subprocess.Popen(inside, env=environment, start_new_session=True))
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes):
                _wait(ranks, PATIENCE)
                break
            if deadline is not None and time.monotonic() > deadline:
                print(f"lab: not done after {timeout} s, ending all ranks", file=sys.stderr)
                return 124
            time.sleep(0.05)
        return max(1 if rank.poll() is None else abs(rank.returncode) for rank in ranks)
    finally:
        with _undisturbed():
            for sign, seconds in ((signal.SIGTERM, FAREWELL), (signal.SIGKILL, None)):
                for rank in ranks:
                    if rank.poll() is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(rank.pid, sign)
                _wait(ranks, seconds)


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], seconds: float | None) -> None:
    """Wait until all have ended, `seconds` at most."""
    deadline = None if seconds is None else time.monotonic() + seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        for rank in ranks:
            rank.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))


def _connect(host: Host, switch: str, link: Link, relayed: bool) -> None:
    """Make a veth pair from a host to the switch, shaped at both ends; packets to the host are delayed and dropped."""
    port = f"p{host.index}"
    inside, outside = ("ip", "-n", host.namespace), ("ip", "-n", switch)
    address = relay.mac(host.index)
    _run("ip", "netns", "add", host.namespace)
    _run(*inside, "link", "add", "eth0", "address", address, "type", "veth", "peer", "name", port, "netns", switch)
    _run(*inside, "addr", "add", f"{host.address}/16", "dev", "eth0")
    _run(*inside, "link", "set", "lo", "up")
    _run(*inside, "link", "set", "eth0", "up")
    if not relayed:
        _run(*outside, "link", "set", port, "master", "br0")
    _run(*outside, "link", "set", port, "up")
    for namespace, device in ((host.namespace, "eth0"), (switch, port)):
        shape = ("root", "handle", "1:", "tbf", "rate", link.rate, "burst", str(link.burst), "latency", "100ms")
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *shape)
    if link.delay_seconds and not relayed:
        late = ("parent", "1:1", "handle", "10:", "netem", "delay", link.delay, "limit", "100000")
        _run("tc", "-n", switch, "qdisc", "add", "dev", port, *late)
    if link.lost_share:
        # the kernel cuts its segments of 64 KB behind the shaping, so that single packets arrive and are lost
        _run(*outside, "link", "set", port, "gso_max_size", str(MTU))
        # load 32 random bits (SKF_AD_RANDOM); below the threshold: drop (TC_ACT_SHOT), else: let pass (TC_ACT_UNSPEC)
        program = f"4,32 0 0 4294963256,53 0 1 {round(link.lost_share * 2**32)},6 0 0 4294967295,6 0 0 2"
        filter_ = ("filter", "add", "dev", "eth0", "ingress", "protocol", "ip", "bpf", "da", "bytecode", program)
        _run("tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", "clsact")
        try:
            _run("tc", "-n", host.namespace, *filter_)
        except RuntimeError as error:
            raise RuntimeError(f"loss {link.loss}: this kernel cannot drop packets (no cls_bpf): {error}") from None


def _has_netem(switch: str) -> bool:
    """Return whether this kernel can delay packets by itself. It tries on the switch's own loopback, which nothing uses."""
    probe = ("qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    return subprocess.run(["tc", "-n", switch, *probe], stderr=subprocess.DEVNULL, check=False).returncode == 0


def _relays(switch: str, link: Link) -> Iterator["subprocess.Popen[str]"]:
    """Start the relays, one per host; they end with the switch at the latest."""
    python = ("ip", "netns", "exec", switch, sys.executable, "-IS", relay.__file__)
    for index in range(link.hosts):
        command = [*python, str(link.delay_seconds), str(index), str(link.hosts)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        yield process
        if process.stdout is None or process.stdout.readline() != "up\n":
            raise RuntimeError(f"delay {link.delay}: the relay of host {index} did not start")


def remove_orphans() -> None:
    """Remove the namespaces of labs that have ended."""
    for entry in Path("/var/run/netns").glob("cp*"):
        if (own := _OWN.fullmatch(entry.name)) and not Path("/proc", own[1]).exists():
            _remove(entry.name)


def _remove(namespace: str) -> None:
    """End all processes in a namespace and delete it. Nothing happens if there is none of that name."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for process in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM until the block is done, also in programs that it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loopback() -> str:
    """Return the name of this machine's loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Lab:
    """Run a command as the ranks of several hosts, joined by links of a given speed."""

    hosts: int
    """Number of hosts."""
    rate: str
    """Speed of each link: 100mbit, 1gbit, ..."""
    command: Annotated[list[str], arg(help_behavior_hint="(required)")]
    """The command that each rank runs, after --."""
    delay: str = "0ms"
    """Delay from host to host, one way: 20ms, ..."""
    loss: str = "0%"
    """Share of packets that are lost: 0.1%, ..."""
    ranks_per_host: int = 1
    """Ranks that share a host and its link."""

    def run(self) -> None:
        """Run the command, and end the program with its worst exit code."""

        def end(number: int, frame: object) -> None:
            raise KeyboardInterrupt  # SIGTERM too cleans up

        signal.signal(signal.SIGTERM, end)
        try:
            if not self.command:
                raise ValueError("expected a command after --, such as: -- python train.py")
            link, reason = Link(self.hosts, self.rate, self.delay, self.loss, self.ranks_per_host), missing()
            code = _on_loopback(self.command, link, reason) if reason else _on_network(self.command, link)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"lab: {str(error).splitlines()[0]}", file=sys.stderr)  # tc goes on with how it is used
            code = 2
        except KeyboardInterrupt:
            print("lab: interrupted", file=sys.stderr)
            code = 130
        sys.exit(code)


def _on_network(command: Sequence[str], link: Link) -> int:
    with network(link) as hosts:
        if hosts[0].relay:
            print("lab: no sch_netem in this kernel; a relay in user space makes the delay", file=sys.stderr)
        code = run(command, link, hosts)
        for host in hosts:
            sent, received = host.counters()
            line = f"host {host.index}: {sent / 1e6:.2f} MB sent, {received / 1e6:.2f} MB received, by the kernel"
            line += f"; {host.lost()} packets lost on their way to it" if link.lost_share else ""
            print(line + (f"; its relay took {host.relay_seconds():.1f} s of a core" if host.relay else ""))
    return code


def _on_loopback(command: Sequence[str], wanted: Link, reason: str) -> int:
    link = Link(wanted.hosts, "loopback", ranks_per_host=wanted.ranks_per_host, shaped=False)
    ranks = link.hosts * link.ranks_per_host
    print(f"lab: {reason}; the command runs as {ranks} ranks on this machine's loopback, unshaped", file=sys.stderr)
    code = run(command, link, [Host(index, "", "127.0.0.1") for index in range(link.hosts)])
    print(f"{ranks} ranks on loopback: figures above are those of this machine, not of {wanted.rate} links ({reason})")
    return code


if __name__ == "__main__":
    command_line.read(Lab, "python -m commpress.launch.lab").run()
