"""The speed of this machine: seconds a value of each codec, core-seconds a byte of sockets; and the slowest of several."""

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from commpress.comm.codecs import parse
from commpress.comm.cost import Speed
from commpress.comm.speed import measure
from commpress.launch.run_record import machine

SOCKET_BYTES = 2**26


def socket_seconds() -> float:
    """Return the core-seconds to send or to receive a byte on this system, measured over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    chunk = bytearray(2**20)

    def send() -> None:
        for _ in range(SOCKET_BYTES // len(chunk)):
            sender.sendall(chunk)

    with sender, receiver:
        start = time.process_time()
        thread = threading.Thread(target=send)
        thread.start()
        buffer, left = bytearray(2**20), SOCKET_BYTES
        while left:
            left -= receiver.recv_into(buffer, min(left, len(buffer)))
        thread.join()
    return (time.process_time() - start) / SOCKET_BYTES / 2


@dataclass(frozen=True)
class Measured:
    """Measurements of this machine: the speed of `none` and of each spec in seconds a value, and of sockets."""

    device: str
    speeds: dict[str, Speed]
    stack: float

    @classmethod
    def here(cls, specs: Sequence[str], device: torch.device) -> "Measured":
        """Measure this machine."""
        here, threads = machine(device), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            speeds = {spec: measure(parse(spec), device) for spec in ("none", *specs)}
        finally:
            torch.set_num_threads(threads)
        if device.type == "cpu":
            return cls(f"one core of this machine ({here['processor']})", speeds, socket_seconds())
        return cls(f"the {here['accelerator']} of this machine", speeds, 0.0)

    @classmethod
    def slowest(cls, everyone: Sequence["Measured"]) -> "Measured":
        """Return each codec's speed on the slowest machine, and the slowest sockets: all ranks wait for them."""
        speeds = {
            spec: max((one.speeds[spec] for one in everyone), key=lambda speed: speed.encode)
            for spec in everyone[0].speeds
        }
        return cls(everyone[0].device, speeds, max(one.stack for one in everyone))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Measured":
        """Return the object that `to_json` was called on."""
        speeds = {
            spec: Speed(row["encode"], tuple(row["mean"]), tuple(row["recode"]), row["add"])
            for spec, row in said["speeds"].items()
        }
        return cls(said["device"], speeds, said["stack"])
