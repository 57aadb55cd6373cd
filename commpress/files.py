"""Files that are written whole or not at all, and whose damage is noticed. All files of the library are written here.

A state is a file of `torch.save` with 16 more bytes at its end, which `torch.load` ignores:

    [torch.save's archive] [b"commpress-1 "] [CRC-32 of the archive, 4 bytes, little-endian]

The archive has CRC-32s of its records, which `torch.load` does not check. CRC-32 finds every flipped bit and misses one in 4
billion other damages; it runs at 1 to 2 GB/s on one core, about as fast as copying.
"""

import contextlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAGIC = b"commpress-1 "
AT_ONCE = 1 << 24
"""Bytes that are read and summed at once."""


class DamagedFileError(ValueError):
    """A file that is damaged, cut short, or from another program or version. The text names the file."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. After the block it replaces `path`, or is removed if the block raised.

    Until then a reader of `path` reads the old file, which also stays if the machine stops. An OSError names `path`.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with beside.open("rb") as f:
            os.fsync(f.fileno())
        beside.replace(path)
        _keep_names(path.parent)
    except OSError as error:
        if error.filename is not None and str(error.filename) == str(beside):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all; `write` gets the open file."""
    with replacing(path) as beside, beside.open("wb") as f:
        write(f)


def save_state(path: Path, state: Any) -> None:
    """Write a state, which `torch.load(weights_only=True)` must be able to read, and its checksum, whole or not at all."""
    write_atomically(path, lambda f: _write_state(f, state))


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote, on the CPU. Raises DamagedFileError, or OSError if the file cannot be read."""
    with path.open("rb") as f:
        _require_checksum(f, os.fstat(f.fileno()).st_size, path)
    return _loaded(path, path)


def pack_state(state: Any) -> Tensor:
    """Return the bytes of a state's file, uint8 [n], to be put into a file that another library writes."""
    f = io.BytesIO()
    _write_state(f, state)
    return torch.frombuffer(f.getbuffer(), dtype=torch.uint8)


def unpack_state(packed: Any, path: Path | str) -> Any:
    """Return the state that `pack_state` packed, on the CPU. Raises DamagedFileError, which names the file `path`."""
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise DamagedFileError(f"{path}: damaged, or not written by this version: no bytes with a checksum in it")
    f = io.BytesIO(packed.numpy().data)
    _require_checksum(f, packed.numel(), path)
    f.seek(0)
    return _loaded(f, path)


def _write_state(f: BinaryIO, state: Any) -> None:
    summed = _Summed(f)
    torch.save(state, summed)  # type: ignore[arg-type]  # it calls only `write` and `flush`
    f.write(MAGIC + summed.crc.to_bytes(4, "little"))


def _require_checksum(f: BinaryIO, size: int, path: Path | str) -> None:
    """Raise DamagedFileError unless a file, open at its start, ends with the checksum of the bytes before it."""
    end = size - len(MAGIC) - 4
    found = checksum(f, max(end, 0))
    if end < 0 or f.read(len(MAGIC)) != MAGIC:
        raise DamagedFileError(f"{path}: no checksum at its end: cut short, damaged, or not written by this version")
    if found != (expected := int.from_bytes(f.read(4), "little")):
        raise DamagedFileError(f"{path}: damaged, its checksum is {found:08x}, expected {expected:08x}")


def _loaded(f: BinaryIO | Path, path: Path | str) -> Any:
    try:
        return torch.load(f, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the checksum fits but the archive does not: torch raises various errors
        raise DamagedFileError(f"{path}: damaged: {error}") from error


def checksum(file: BinaryIO, count: int, crc: int = 0) -> int:
    """Return the CRC-32 of the next `count` bytes of a file, continued from `crc`, that of the bytes before."""
    buffer = memoryview(bytearray(min(count, AT_ONCE)))
    while count > 0 and (read := file.readinto(buffer[:count])):  # type: ignore[attr-defined]
        crc = zlib.crc32(buffer[:read], crc)
        count -= read
    return crc


class _Summed:
    """A file to write to that computes the checksum of its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc = 0

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _keep_names(folder: Path) -> None:
    """Flush a folder's entries to disk, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
