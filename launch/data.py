"""Bytes of real text to train on, with no download: the Python standard library's own source, or your own files.

Every 20th block of 64 KiB is held out, not the last 5 %, since files sorted by name differ from start to end.
"""

import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import gather_settings
from commpress.notice import host_name

BLOCK = 64 * 1024
HOLD_OUT_EVERY = 20
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Folders of the standard library that are not read: installed packages, and tests, which are repetitive."""


@dataclass(frozen=True)
class Text:
    """A text and its two parts, uint8 [n] each. `fingerprint` is (bytes, CRC-32) of the whole."""

    train: Tensor
    validation: Tensor
    source: str
    files: int
    skipped: int
    fingerprint: tuple[int, int]


def load(path: Path | None) -> Text:
    """Read a file, all text files of a folder in sorted order, or (None) the standard library's source.

    Files of a folder that are not UTF-8 text, or cannot be read, are skipped and counted; hidden ones are passed over.
    Raises ValueError if there is nothing to read, or too little to hold any out.
    """
    try:
        return _load(path)
    except OSError as error:
        where = "" if error.filename is None or str(error.filename) == str(path) else f"{error.filename}: "
        raise ValueError(f"cannot read --data {path}: {where}{error.strerror or error}") from error


def _load(path: Path | None) -> Text:
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source, candidates = f"the source of Python's standard library in {root}", sorted(_library(root))
    elif path.is_dir():
        source, candidates = str(path), sorted(_visible(path))
    elif path.is_file():
        source, candidates = str(path), [path]
    else:
        found = "it is no file or folder" if path.exists() else "there is no such file or folder"
        raise ValueError(f"cannot read --data {path}: {found}")
    parts, skipped = [], 0
    for candidate in candidates:
        part = candidate.read_bytes() if candidate == path else _text_of(candidate)
        if part is None:
            skipped += 1
        elif part:
            parts.append(part)
    whole = b"\n".join(parts)
    if len(whole) < HOLD_OUT_EVERY:
        raise ValueError(
            f"--data {source}: expected text, found {len(whole)} bytes in {len(parts)} text files ({skipped} skipped)"
        )
    train, validation = split(torch.frombuffer(bytearray(whole), dtype=torch.uint8))
    return Text(train, validation, source, len(parts), skipped, (len(whole), zlib.crc32(whole)))


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the blocks of uint8 [n] to train on and the held-out ones, each joined. A short text gets shorter blocks."""
    blocks = text.split(max(1, min(BLOCK, len(text) // HOLD_OUT_EVERY)))
    kept = [block for i, block in enumerate(blocks) if i % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1]
    return torch.cat(kept), torch.cat(list(blocks[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]))


def require_context(text: Text, context: int) -> None:
    """Raise ValueError unless a window of `context` bytes and the next byte fit into both parts."""
    for name, part in (("training", text.train), ("validation", text.validation)):
        if len(part) < context + 1:
            raise ValueError(
                f"--data {text.source}: the {name} part has {len(part)} bytes, "
                f"--context {context} needs at least {context + 1}; give more text or a smaller context"
            )


def require_same_data(fingerprint: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError on all ranks if they read different data. Collective."""
    mine = {"bytes": fingerprint[0], "crc": fingerprint[1], "host": host_name()}
    of_all = gather_settings(mine, dist.distributed_c10d._get_default_group(), device)
    first = of_all[0]
    for rank, other in enumerate(of_all):
        if (other["bytes"], other["crc"]) != (first["bytes"], first["crc"]):
            raise ValueError(
                f"rank 0 reads {first['bytes']} bytes (CRC {first['crc']:08x}), rank {rank} ({other['host']}) reads "
                f"{other['bytes']} bytes (CRC {other['crc']:08x}): "
                "all ranks must train on the same data, give --data the same on every host"
            )


def generator(seed: int, rank: int) -> torch.Generator:
    """Return the generator of a rank's windows: each rank draws its own, the same ones in every run with that seed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + rank)


def sample(text: Tensor, batch: int, context: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random windows of uint8 [n]: inputs and the bytes that follow each, int64 [batch, context] both."""
    starts = torch.randint(len(text) - context, (batch,), generator=source, dtype=torch.int64, device="cpu")
    return windows(text, starts, context)


def validation_starts(text: Tensor, count: int, context: int) -> Tensor:
    """Return the starts of `count` fixed windows, evenly spread: int64 [count]."""
    return torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64, device="cpu").long()


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return the windows of uint8 [n] at `starts` [batch]: inputs and the next bytes, int64 [batch, context] both."""
    cut = text[starts[:, None] + torch.arange(context + 1, dtype=torch.int64, device=starts.device)].long()
    return cut[:, :-1], cut[:, 1:]


def _library(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _visible(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _text_of(path: Path) -> bytes | None:
    """Return the bytes of a file if they are text, else None."""
    if not path.is_file():  # a pipe would block
        return None
    try:
        found = path.read_bytes()
        found.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if b"\0" in found else found
