"""Labels of messages, and the header that carries a message's label to its receiver."""

import hashlib
import itertools
import struct
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from commpress.comm.failure import DamagedMessageError, LostPeerError, OtherMessageError, is_lost
from commpress.comm.segments import Segments
from commpress.kernels.cpu.fingerprint import fingerprint

TAGS_PER_BUCKET = 4
HEADER = struct.Struct("<QQQ")
"""The hash of a message's label, its payload's length in bytes, the payload's checksum or 0."""
HALF = 1 << 30
"""Tags of headers lie below it, those of payloads from it on."""


@dataclass(frozen=True)
class Label:
    """A message's number in the session, and its description, both the same on every rank.

    `proven`: its payload has a checksum. `draw`: the number by which the ranks have drawn the values that they sum, which must
    be the same, too.
    """

    tag: int
    text: str
    proven: bool = False
    draw: int = 0

    def second(self) -> "Label":
        """The label of the next message of an exchange that sends several."""
        return replace(self, tag=self.tag + 1)

    def header(self, payload: Tensor, nbytes: int) -> Tensor:
        """Return the header (uint8 [24]) of a payload (uint8, contiguous); `nbytes` is the length of the whole message."""
        packed = HEADER.pack(self.key, nbytes, (fingerprint(payload) or 1) if self.proven else 0)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    @property
    def key(self) -> int:
        """The hash of the label, for a header."""
        return (_hashed(self.text) + self.draw) % 2**64

    def payload_tag(self, nbytes: int) -> int:
        """Return the tag of a payload of this length."""
        return HALF + (_hashed(self.text) + 31 * nbytes + self.tag) % (HALF - 1)  # the last one is `joining.TAG`


@lru_cache(maxsize=4096)
def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass
class Header:
    """A header that is about to arrive from `peer`, for a payload of `nbytes` that goes to `payload`."""

    peer: int
    work: Any
    received: Tensor
    label: Label
    nbytes: int
    payload: Tensor | None = None

    def check(self) -> None:
        """Wait for the header. Raises OtherMessageError if it is not the expected one, LostPeerError if its rank is gone."""
        wait_for(self.peer, self.work)
        label, nbytes, _ = HEADER.unpack(bytes(self.received.tolist()))
        if (label, nbytes) != (self.label.key, self.nbytes):
            drawn = f", draw {self.label.draw}" if self.label.draw else ""
            raise OtherMessageError(self.peer, f"{self.label.text}{drawn}: {self.nbytes} bytes")

    def prove(self) -> None:
        """Compare the arrived payload with the checksum. Raises DamagedMessageError if they differ."""
        _, _, checksum = HEADER.unpack(bytes(self.received.tolist()))
        if checksum and self.payload is not None and checksum != (fingerprint(self.payload) or 1):
            raise DamagedMessageError(
                f"{self.label.text}: the {self.nbytes} bytes from rank {self.peer} are not those that it sent"
            )


class Labels:
    """The labels of a session's exchanges, one after another, the same on every rank."""

    def __init__(self) -> None:
        self.proven = False
        """Whether payloads have checksums from now on."""
        self._tags = itertools.count(0, TAGS_PER_BUCKET)
        self._texts: dict[tuple[object, ...], str] = {}

    def next(self, text: str) -> Label:
        """Return the label of the next message, described by `text`."""
        return Label(next(self._tags), text, self.proven)

    def bucket(self, role: str, segments: Segments, n: int, spec: str, exchange: str) -> Label:
        """Return the label of `n` values of a bucket of these parameters, coded by `spec`."""
        key = (role, segments, n, spec, exchange)
        if (text := self._texts.get(key)) is None:
            first = repr(segments[0].name) if segments else "nothing"
            layout = zlib.crc32(repr(segments).encode())
            text = f"{role} of {first} ({len(segments)} parts, {n} values, layout {layout:08x}) by {spec}, {exchange}"
            self._texts[key] = text
        return self.next(text)


def wait_for(peer: int | None, work: Any) -> None:
    """Wait for a message from or to a rank. Raises LostPeerError if the backend says that it is gone or silent."""
    try:
        work.wait()
    except RuntimeError as error:
        if is_lost(error):
            raise LostPeerError(peer, str(error)) from None  # the cause's frames hold the transfer
        raise
