"""State of each rank for `torch.distributed.checkpoint`: a table of bytes with one row per rank.

    by hand   session.state_dict()                       this rank's dict, one file a rank
    DCP       {"commpress": session}   key "commpress.ranks":  uint8 [W, L], rank r writes row r
              loaded by W' ranks       rank r reads rows r, r + W', r + 2 W', ...
                                                       key "commpress.shared": equal on all ranks, written by rank 0

DCP assumes that a plain tensor under one key is equal on all ranks, and keeps one of them, so the ranks' parts need a mark. It
also needs to know what to load before it reads, when the number of ranks that have saved is still unknown. The classes here
follow the protocol by which DTensor solves both, which torch keeps private (`torch/distributed/_checkpointable.py`).

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
"""The largest number of rows in a table."""
WIDE = 1 << 62
"""The number of columns with which a row is requested; it has fewer."""
HEAD = 16
"""Bytes for the length and the checksum of a row's content."""
SLACK = 1 << 16
"""Bytes for values that are not tensors, and for differences in the lengths of a bucket's chunks."""


class RankState(dict[str, Any]):
    """One rank's state. DCP, which calls `items`, sees a row of a table; everything else sees the dict."""

    def __init__(self, content: Mapping[str, Any], values: int, shared: Mapping[str, Any] | None = None) -> None:
        super().__init__(content)
        self._rows = Rows.of(self, values)
        self._shared = None if shared is None else Rows.of(dict(shared), values, shared=True)

    def items(self) -> Any:
        """Return the entries that DCP saves, or loads into."""
        return ({"ranks": self._rows} | ({} if self._shared is None else {"shared": self._shared})).items()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(dict(self).items())  # a plain dict, which `weights_only` loads

    def __deepcopy__(self, memo: Any) -> "RankState":  # as DCP's asynchronous save makes one
        shared = None if self._shared is None else copy.deepcopy(self._shared.content, memo)
        return RankState(copy.deepcopy(dict(self), memo), self._rows.room, shared)

    @property
    def loaded(self) -> list[dict[str, Any]] | None:
        """The states that DCP has read for this rank; None if it has not read any table."""
        return self._rows.states()

    @property
    def loaded_shared(self) -> dict[str, Any] | None:
        """Return the shared state that DCP has read, which is equal on all ranks; None if it has not read any."""
        states = None if self._shared is None else self._shared.states()
        return states[0] if states else None


class Rows(Tensor):
    """This rank's row of the table, and the rows that were read. A shared table has one row, which all ranks read."""

    size: Any = None  # else DCP would compare the saved table with one that has as many rows as there are ranks now

    content: dict[str, Any]
    room: int
    read: dict[int, Tensor]
    asked: bool
    shared: bool

    @classmethod
    def of(cls, content: dict[str, Any], values: int, shared: bool = False) -> "Rows":
        """Return the row of a state; `values` is the approximate number of values that a loaded one may hold."""
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
        if row not in self.read:  # `empty` maps memory, but does not touch it: rows that are not read cost none
            most = SLACK + 64 * self.room
            self.read[row] = torch.empty(1, most, dtype=torch.uint8, device="cpu")
        return self.read[row]

    def _row(self) -> Tensor:
        saved = _saved(self.content)
        return _row(saved, HEAD + len(saved) if self.shared else row_bytes(self.content))

    def states(self) -> list[dict[str, Any]] | None:
        """Return the states in the rows that were read; None if no row was requested. Raises ValueError for a damaged row."""
        return [_state(self.read[row], row) for row in sorted(self.read)] if self.asked else None


def row_bytes(state: Mapping[str, Any]) -> int:
    """Return the length of a row in bytes. It is equal on all ranks, though their numbers and chunk lengths differ."""
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
    """Return the bytes of a state: its length, its checksum, `torch.save` of it, and zeros up to `length`."""
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
    """Return this rank's number among the ranks that write a checkpoint, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
