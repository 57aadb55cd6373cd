"""What each rank alone has to save, as `torch.distributed.checkpoint` can: one row a rank of a table of bytes.

    by hand   session.state_dict()                       a dict of this rank's, one file a rank
    DCP       {"commpress": session}   key "commpress.ranks":  uint8 [W, L], rank r writes row r
              loaded by W' ranks       rank r reads rows r, r + W', r + 2 W', ...

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
SLACK = 1 << 16
"""Bytes for what is not a tensor, and for chunks of a bucket that are not of one length."""
KEY = "ranks"


class RankState(dict[str, Any]):
    """One rank's state. To DCP, which calls `items`, it is a row of a table; all else sees the dict."""

    def __init__(self, content: Mapping[str, Any], values: int) -> None:
        super().__init__(content)
        self._rows = Rows.of(self, values)

    def items(self) -> Any:
        """What DCP saves, or loads into."""
        return {KEY: self._rows}.items()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(dict(self).items())  # by hand: what `weights_only` loads

    def __deepcopy__(self, memo: Any) -> "RankState":  # as DCP's asynchronous save makes one
        return RankState(copy.deepcopy(dict(self), memo), self._rows.room)

    @property
    def loaded(self) -> list[dict[str, Any]] | None:
        """The states that DCP has read for this rank; None if it has not read any table."""
        return self._rows.states()


class Rows(Tensor):
    """This rank's row of the table, and the rows that were read."""

    size: Any = None  # so DCP does not compare the table that was saved with one of as many rows as now

    content: dict[str, Any]
    room: int
    read: dict[int, Tensor]
    asked: bool

    @classmethod
    def of(cls, content: dict[str, Any], values: int) -> "Rows":
        """The row of a state; `values` is about how many a loaded one may hold."""
        rows: Rows = torch.empty(0, dtype=torch.uint8, device="cpu").as_subclass(cls)
        rows.content, rows.room, rows.read, rows.asked = content, values, {}, False
        return rows

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        rank, world_size = _place()
        offsets, length = torch.Size([rank, 0]), row_bytes(self.content)
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([1, length]))
        data = TensorWriteData(chunk, TensorProperties(torch.uint8), torch.Size([world_size, length]))
        return [WriteItem(index=MetadataIndex(fqn, offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        rank, world_size = _place()
        self.asked = True
        sizes = torch.Size([1, WIDE])
        return [ChunkStorageMetadata(torch.Size([row, 0]), sizes) for row in range(rank, MOST_RANKS, world_size)]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        row = int(index.offset[0])
        if not self.asked:
            return _row(self.content)
        if row not in self.read:  # memory that nothing is read into is never touched
            most = SLACK + 64 * self.room
            self.read[row] = torch.empty(1, most, dtype=torch.uint8, device="cpu")
        return self.read[row]

    def states(self) -> list[dict[str, Any]] | None:
        """The states in the rows that were read; None if none was asked for. Raises ValueError for a damaged one."""
        return [_state(self.read[row], row) for row in sorted(self.read)] if self.asked else None


def row_bytes(state: Mapping[str, Any]) -> int:
    """The length of a row: the same on all ranks, whose states differ in numbers and in the lengths of their chunks."""
    world_size = int(state["world_size"])

    def most(value: Any, key: str, beside: Any) -> int:
        if isinstance(value, Tensor):
            chunk = key == "second" and isinstance(beside.get("residual"), Tensor)
            n = -(-beside["residual"].numel() // world_size) + SLACK // 8 if chunk else value.numel()
            return n * value.element_size() + 1024
        if isinstance(value, Mapping):
            return sum(most(inner, str(name), value) + len(str(name)) + 16 for name, inner in dict(value).items())
        if isinstance(value, list | tuple):
            return sum(most(inner, key, {}) for inner in value) + 16
        return len(value) + 16 if isinstance(value, str) else 64

    return -(-(SLACK + most(state, "", {})) // 64) * 64


def _row(state: dict[str, Any]) -> Tensor:
    """The bytes of a state: its length and checksum, `torch.save` of it, zeros."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    saved, row = file.getvalue(), torch.zeros(1, row_bytes(state), dtype=torch.uint8, device="cpu")
    head = torch.tensor([len(saved), zlib.crc32(saved)], dtype=torch.int64, device="cpu").view(torch.uint8)
    if head.numel() + len(saved) > row.numel():
        raise ValueError(f"a state of {len(saved)} bytes, expected at most {row.numel() - head.numel()}")
    row[0, : head.numel()] = head
    row[0, head.numel() : head.numel() + len(saved)] = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
    return row


def _state(row: Tensor, number: int) -> dict[str, Any]:
    flat = row.view(-1)
    length, checksum = flat[:16].view(torch.int64).tolist()
    saved = bytes(flat[16 : 16 + length].numpy()) if 0 <= length <= flat.numel() - 16 else b""
    if zlib.crc32(saved) != checksum or not saved:
        raise ValueError(f"cannot restore: what rank {number} saved is damaged in the checkpoint")
    state: dict[str, Any] = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    return state


def _place() -> tuple[int, int]:
    """This rank among all that write a checkpoint."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
