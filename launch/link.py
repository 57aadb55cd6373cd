"""The link that joins the ranks of a lab, as requested, and as a rank finds it in LAB_LINK."""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commpress.launch import units

BURST, BURST_SECONDS = 72_000, 200e-6
"""tbf's bucket in bytes: a little more than the kernel's largest segment, or what the link carries in that
time, if more: so a link reaches its rate (95 % of it as payload), and no more than a bucket goes out unshaped after a pause."""


@dataclass(frozen=True)
class Link:
    """The link as a rank finds it in LAB_LINK. Raises ValueError for a number, rate, delay or loss that makes no sense."""

    hosts: int
    rate: str
    """Bandwidth of each host's link in each direction, such as 100mbit."""
    delay: str = "0ms"
    """Delay from host to host, one way, such as 20ms."""
    loss: str = "0%"
    """Share of IP packets that do not arrive, such as 0.1%."""
    ranks_per_host: int = 1
    shaped: bool = True
    """False: the machine's own loopback, and the rate is no promise."""

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= 200:
            raise ValueError(f"hosts {self.hosts}: expected 1 to 200")
        if not 1 <= self.ranks_per_host <= 200:
            raise ValueError(f"ranks per host {self.ranks_per_host}: expected 1 to 200")
        if self.shaped:
            units.rate(self.rate)
        units.seconds(self.delay)
        units.share(self.loss)

    @property
    def bits_per_second(self) -> float:
        """Return the rate as a number."""
        return units.rate(self.rate)

    @property
    def burst(self) -> int:
        """Return the bytes that may be sent at once after a pause."""
        return max(BURST, round(self.bits_per_second / 8 * BURST_SECONDS))

    @property
    def delay_seconds(self) -> float:
        """Return the delay as a number."""
        return units.seconds(self.delay)

    @property
    def lost_share(self) -> float:
        """Return the loss as a number in [0, 1)."""
        return units.share(self.loss)


def joining(world_size: int) -> dict[str, Any]:
    """Return the link of this program's ranks: the lab's, from LAB_LINK, else one that says it is not the lab's."""
    elsewhere = {"hosts": None, "ranks_per_host": world_size, "rate": "unshaped", "delay": "0ms", "loss": "0%"}
    elsewhere |= {"shaped": False, "relayed": False}
    said = os.environ.get("LAB_LINK")
    return dict(json.loads(said)) if said else elsewhere


def sent_by_kernel() -> int:
    """Return the bytes that this rank's host has sent over its link, by the kernel's count; 0 where no lab shapes it."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if joining(1)["shaped"] else 0


def free_port() -> int:
    """Return a port of the loopback interface without a listener."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
