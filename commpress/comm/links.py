"""What the links do, for `auto`: measured once by messages, and in plain steps by the kernel's counters.

at the start     latency and bandwidth, between hosts apart from inside a host      `link_speed.py`
plain steps      bytes out and in of this host, by the kernel, less those of the exchange: the load of other programs
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from commpress.comm.exchange import Wire
from commpress.comm.failure import is_lost
from commpress.comm.link_speed import LinkSpeed, between_and_inside, by_host

SECONDS = 0.2
"""How long messages measure the links; longer where a few messages take longer."""
MOST = 2**22
"""Bytes of the largest of these messages."""
COUNTERS = "/sys/class/net/{}/statistics"
Counted = tuple[float, float] | None
"""Bytes a second that the kernel has counted for this host, out and in."""


def link_bytes(direction: str = "tx") -> int | None:
    """Return the kernel's count of bytes sent (tx) or received (rx) on the interface that Gloo was set to use; None if it is
    not set, or is lo."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    counter = Path(COUNTERS.format(name)) / f"{direction}_bytes"
    return int(counter.read_text()) if name not in ("", "lo") and counter.exists() else None


@dataclass(frozen=True)
class Links:
    """The links of a group's ranks, the same on all ranks."""

    between: LinkSpeed | None = None
    """A host's link to the others; None if there is one host, or if it was not measured."""
    inside: LinkSpeed | None = None
    """A rank's link to another on its host; None if each has its own host, or if it was not measured."""
    load: Counted = None
    """Bytes a second of other programs, the largest of all hosts, out and in; None if not known."""

    @classmethod
    def measured(cls, wire: Wire) -> "Links":
        """Measure the links of a wire's ranks. On an accelerator they are not: the host does not see how long exchanges take.
        Collective. Raises ExchangeError, with the rank, if another rank is gone.
        """
        if not wire.by_message:
            return cls()
        try:
            return cls(*between_and_inside(by_host(wire.board.hosts), wire.open_group(), wire.device, SECONDS, MOST))
        except RuntimeError as error:
            if is_lost(error):
                raise wire.board.explain(wire.lost_peer(str(error))) from None
            raise

    @property
    def latency(self) -> float:
        """Return the seconds from host to host, one way; 0.0 if they are not known."""
        return 0.0 if self.between is None else self.between.latency

    def with_load(self, counted: Sequence[Counted], own: float) -> "Links":
        """Return the links with the load of other programs, from each rank's counters and the exchange's bytes a second."""
        known = [one for one in counted if one is not None]
        if not known:
            return replace(self, load=None)
        out, into = (max(0.0, max(of) - own) for of in zip(*known, strict=True))
        return replace(self, load=(out, into))

    def __str__(self) -> str:
        said = []
        if self.between is not None:
            said.append(f"between hosts {_mbit(self.between.bandwidth)} each way, {_ms(self.between.latency)}")
        if self.inside is not None:
            said.append(f"inside a host {self.inside.bandwidth / 1e9:.2g} GB/s, {_ms(self.inside.latency)}")
        if self.load is not None:
            out, into = map(_mbit, self.load)
            said.append(f"other traffic in the plain steps {out} out, {into} in")
        return f"links: {'; '.join(said)}\n" if said else ""


class LinkCounter:
    """The kernel's counters since `start`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self._began, self._bytes = time.perf_counter(), (link_bytes("tx"), link_bytes("rx"))

    def sent(self) -> int | None:
        """Return the bytes sent since the start; None if the kernel's counters are not known."""
        before, now = self._bytes[0], link_bytes()
        return None if before is None or now is None else now - before

    def rates(self) -> Counted:
        """Return the bytes a second since the start, out and in; None if the kernel's counters are not known."""
        seconds = time.perf_counter() - self._began
        before, now = self._bytes, (link_bytes("tx"), link_bytes("rx"))
        if None in (*before, *now) or not seconds:
            return None
        out, into = ((b - a) / seconds for a, b in zip(before, now, strict=True))  # type: ignore[operator]
        return out, into


def _mbit(rate: float) -> str:
    return f"{rate * 8 / 1e6:,.3g} Mbit/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms one way"
