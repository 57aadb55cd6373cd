"""A relay that holds every frame of a host for a fixed time: the delay of the network lab if the kernel has no sch_netem.

    python relay.py SECONDS PORT PORTS       in the switch's namespace, one process per host; it replaces the bridge

        h0 eth0 ==> p0 [ held for SECONDS ] ==> p1 ==> eth0 h1      port k leads to the host with MAC address mac(k)

Frames move between packet sockets together with their virtio header, which keeps the kernel's 64 KB
segments in one piece: about 2,000 frames a second at 1 Gbit/s. The file needs only Python, so it starts at once.
"""

import collections
import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time

FRAME = 66_000
"""Bytes that hold any frame: 64 KB, its Ethernet header and HEADER."""
HEADER = 10
"""Bytes of the virtio header before each frame."""
BUFFER = 256 << 20
"""Bytes that the kernel may keep for a relay that waits for a core."""
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 6, 15, 23
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_EVERY_PROTOCOL = 3


def mac(port: int) -> str:
    """Return the MAC address of the host at a port."""
    return f"02:00:00:00:{port >> 8:02x}:{port & 255:02x}"


def relay(seconds: float, port: int, ports: int) -> None:
    """Pass frames from `port` to the others of `ports`, each `seconds` after its arrival, without end."""
    source = _socket(port, receives=True)
    sinks = {other: _socket(other, receives=False) for other in range(ports) if other != port}

    def end(signum: int, frame: object) -> None:
        lost = struct.unpack("II", source.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        if lost:
            print(
                f"lab: the relay of host {port} was too slow for {lost} frames; the link was slower than it says",
                file=sys.stderr,
            )
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    print("up", flush=True)
    held: collections.deque[tuple[float, bytes]] = collections.deque()
    while True:
        wait = held[0][0] - time.monotonic() if held else None
        if wait is None or wait > 0:
            select.select([source], [], [], wait)
        for _ in range(16):  # then see what is due, however much comes in
            try:
                held.append((time.monotonic() + seconds, source.recv(FRAME)))
            except BlockingIOError:
                break
        now = time.monotonic()
        while held and held[0][0] <= now:
            frame = held.popleft()[1]
            everyone = frame[HEADER] & 1  # a broadcast or multicast address
            port_of = frame[HEADER + 4] << 8 | frame[HEADER + 5]  # as `mac` made it
            for sink in sinks.values() if everyone else filter(None, [sinks.get(port_of)]):
                with contextlib.suppress(OSError):  # the port's queue is full: a switch drops the frame as well
                    sink.send(frame)


def _socket(port: int, receives: bool) -> socket.socket:
    """Return a packet socket on a port that sends and receives frames with their virtio header."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    made.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)  # what other relays send through this port
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE if receives else _SO_SNDBUFFORCE, BUFFER)
    made.setblocking(False)
    made.bind((f"p{port}", _EVERY_PROTOCOL if receives else 0))
    return made


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("relay: expected SECONDS PORT PORTS; `commpress lab` starts it")
    with contextlib.suppress(PermissionError):
        os.nice(-20)  # a network does not wait for the hosts' cores
    relay(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
