"""State of each rank for `torch.distributed.checkpoint`: a table of bytes with one row per rank.

    by hand   session.state_dict()                       a dict of this rank's, one file a rank
    DCP       {"commpress": session}   key "commpress.ranks":  uint8 [W, L], rank r writes row r
              loaded by W' ranks       rank r reads rows r, r + W', r + 2 W', ...
                                                       key "commpress.shared": what all ranks have alike, written by rank 0

DCP takes a plain tensor under one key for the same on all ranks and keeps one of them, so the parts have to be told apart; and
it wants to know what it shall load before it reads, when nobody knows yet how many ranks have saved. What stands in for a
tensor here is the protocol that DTensor has for that, which torch keeps private (`torch/distributed/_checkpointable.py`).

A row is `torch.save` of the dict, read by `weights_only`, filled up to one length for all ranks.
"""

import copy
import io
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_RANKS = 1 << 14
"""Rows that a table may have."""
WIDE = 1 << 62
"""Columns that a row is asked for; it has fewer."""
HEAD = 16
"""Bytes for the length and the checksum of what a row holds."""
SLACK = 1 << 16
"""Bytes for what is not a tensor, and for chunks of a bucket that are not of one length."""


class RankState(dict[str, Any]):
    """One rank's state. To DCP, which calls `items`, it is a row of a table; all else sees the dict."""

    def __init__(self, content: Mapping[str, Any], values: int, shared: Mapping[str, Any] | None = None) -> None:
        super().__init__(content)
        self._rows = Rows.of(self, values)
        self._shared = None if shared is None else Rows.of(dict(shared), values, shared=True)

    def items(self) -> Any:
        """Return what DCP saves, or loads into."""
        return ({"ranks": self._rows} | ({} if self._shared is None else {"shared": self._shared})).items()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(dict(self).items())  # by hand: what `weights_only` loads

    def __deepcopy__(self, memo: Any) -> "RankState":  # as DCP's asynchronous save makes one
        shared = None if self._shared is None else copy.deepcopy(self._shared.content, memo)
        return RankState(copy.deepcopy(dict(self), memo), self._rows.room, shared)

    @property
    def loaded(self) -> list[dict[str, Any]] | None:
        """The states that DCP has read for this rank; None if it has not read any table."""
        return self._rows.states()

    @property
    def loaded_shared(self) -> dict[str, Any] | None:
        """Return what DCP has read of what all ranks have alike."""
        states = None if self._shared is None else self._shared.states()
        return states[0] if states else None


class Rows(Tensor):
    """This rank's row of the table, and the rows that were read. A shared one is one row, which all read."""

    size: Any = None  # so DCP does not compare the table that was saved with one of as many rows as now

    content: dict[str, Any]
    room: int
    read: dict[int, Tensor]
    asked: bool
    shared: bool

    @classmethod
    def of(cls, content: dict[str, Any], values: int, shared: bool = False) -> "Rows":
        """The row of a state; `values` is about how many a loaded one may hold."""
        rows: Rows = torch.empty(0, dtype=torch.uint8, device="cpu").as_subclass(cls)
        rows.content, rows.room, rows.read, rows.asked, rows.shared = content, values, {}, False, shared
        return rows

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        rank, world_size = _place()
        if self.shared and rank > 0:
            return []
        if self.shared:
            world_size = 1
        offsets, length = torch.Size([rank, 0]), self._row().numel()
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([1, length]))
        data = TensorWriteData(chunk, TensorProperties(torch.uint8), torch.Size([world_size, length]))
        return [WriteItem(index=MetadataIndex(fqn, offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        rank, world_size = (0, MOST_RANKS) if self.shared else _place()
        self.asked = True
        sizes = torch.Size([1, WIDE])
        return [ChunkStorageMetadata(torch.Size([row, 0]), sizes) for row in range(rank, MOST_RANKS, world_size)]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        row = int(index.offset[0])
        if not self.asked:
            return self._row()
        if row not in self.read:  # memory that nothing is read into is never touched
            most = SLACK + 64 * self.room
            self.read[row] = torch.empty(1, most, dtype=torch.uint8, device="cpu")
        return self.read[row]

    def _row(self) -> Tensor:
        saved = _saved(self.content)
        return _row(saved, HEAD + len(saved) if self.shared else row_bytes(self.content))

    def states(self) -> list[dict[str, Any]] | None:
        """The states in the rows that were read; None if none was asked for. Raises ValueError for a damaged one."""
        return [_state(self.read[row], row) for row in sorted(self.read)] if self.asked else None


def row_bytes(state: Mapping[str, Any]) -> int:
    """The length of a row: the same on all ranks, whose states differ in numbers and in the lengths of their chunks."""
    world_size = int(state["world_size"])

    def most(value: Any, key: str, beside: Any) -> int:
        if isinstance(value, Tensor):
            whole, share = beside.get("residual"), world_size
            whole = whole.numel() if isinstance(whole, Tensor) else 0
            if place := beside.get("node_slice"):
                whole, share = place[-1], place[-2] if key == "slice_residual" else world_size
            chunk = whole and key in ("owner_residual", "slice_residual")
            n = -(-whole // share) + SLACK // 8 if chunk else value.numel()
            return n * value.element_size() + 1024
        if isinstance(value, Mapping):
            return sum(most(inner, str(name), value) + len(str(name)) + 16 for name, inner in dict(value).items())
        if isinstance(value, list | tuple):
            return sum(most(inner, key, {}) for inner in value) + 16
        return len(value) + 16 if isinstance(value, str) else 64

    return -(-(SLACK + most(state, "", {})) // 64) * 64


def _saved(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def _row(saved: bytes, length: int) -> Tensor:
    """The bytes of a state: its length and checksum, `torch.save` of it, zeros up to this length."""
    row = torch.zeros(1, length, dtype=torch.uint8, device="cpu")
    head = torch.tensor([len(saved), zlib.crc32(saved)], dtype=torch.int64, device="cpu").view(torch.uint8)
    if head.numel() + len(saved) > row.numel():
        raise ValueError(f"a state of {len(saved)} bytes, expected at most {row.numel() - head.numel()}")
    row[0, : head.numel()] = head
    row[0, head.numel() : head.numel() + len(saved)] = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
    return row


def _state(row: Tensor, number: int) -> dict[str, Any]:
    flat = row.view(-1)
    length, checksum = flat[:HEAD].view(torch.int64).tolist()
    saved = bytes(flat[HEAD : HEAD + length].numpy()) if 0 <= length <= flat.numel() - HEAD else b""
    if zlib.crc32(saved) != checksum or not saved:
        raise ValueError(f"cannot restore: what rank {number} saved is damaged in the checkpoint")
    file = io.BytesIO(saved)
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _place() -> tuple[int, int]:
    """This rank among all that write a checkpoint."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
