"""Ranks compare what they were asked to do before the first byte of a gradient travels."""

import json
import zlib

import torch
import torch.distributed as dist


def gather_settings(
    settings: dict[str, object], group: dist.ProcessGroup, device: torch.device
) -> list[dict[str, object]]:
    """Every rank's settings (JSON values), in the order of the ranks. Collective."""
    world_size = dist.get_world_size(group)
    own = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = max(int(n) for n in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - own.numel())), group=group)
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]


def require_agreement(settings: dict[str, object], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ValueError on every rank, naming both values, if a rank's settings differ from rank 0's. Collective.

    A rank that could not make sense of its arguments passes {"error": text} and all ranks raise that.
    """
    everyone = gather_settings(settings, group, device)
    for rank, other in enumerate(everyone):
        if "error" in other:
            raise ValueError(f"rank {rank}: {other['error']}")
    for rank, other in enumerate(everyone):
        for key in everyone[0]:
            if other.get(key) != everyone[0][key]:
                raise ValueError(
                    f"rank {rank} has {key} {other.get(key)!r}, rank 0 has {everyone[0][key]!r}: "
                    f"all ranks must use the same {key}"
                )


def require_same_names(what: str, names: list[str], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ValueError on every rank if the ranks' lists of names differ; takes one all-reduce of two numbers if not."""
    own = zlib.crc32("\n".join(names).encode())
    ends = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    most, least = ends.tolist()
    if most != -least:
        require_agreement({what: names}, group, device)
