"""Agreement of the ranks: they compare settings before the first byte of a gradient is sent, and raise the same error."""

import contextlib
import json
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

import torch
import torch.distributed as dist

Settings = dict[str, object]
"""JSON values, by the names that an error gives them."""


def gather_settings(settings: Settings, group: dist.ProcessGroup, device: torch.device) -> list[Settings]:
    """Return every rank's settings (JSON values), in the order of the ranks. Collective."""
    world_size = dist.get_world_size(group)
    own = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([own.numel()], dtype=torch.int64, device=device), group=group)
    longest = max(int(n) for n in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - own.numel())), group=group)
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]


def require_agreement(settings: Settings, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ValueError on every rank, naming both values, if a rank's settings differ from rank 0's. Collective.

    A rank with wrong arguments passes {"error": text}, and all ranks raise that.
    """
    require_equal(gather_settings(settings, group, device))


def require_equal(everyone: Sequence[Settings]) -> None:
    """Raise ValueError, naming both values, if a rank's settings differ from rank 0's; `everyone` has one a rank.

    An "error" of any rank is raised, with the rank.
    """
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
    """Raise ValueError on every rank if the ranks' lists of names differ. Takes an all-reduce of 2 numbers if they agree."""
    own = zlib.crc32("\n".join(names).encode())
    ends = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    most, least = ends.tolist()
    if most != -least:
        require_agreement({what: names}, group, device)


def refuse_on_all(refusal: Exception, group: dist.ProcessGroup, device: torch.device) -> NoReturn:
    """Raise `refusal` here, and its text as a ValueError on the other ranks of `group`. Collective."""
    with contextlib.suppress(ValueError):  # the other ranks raise it
        require_agreement({"error": str(refusal)}, group, device)
    raise refusal


def agree_on_all(
    settings: dict[str, object], groups: Sequence[dist.ProcessGroup], device: torch.device, refusal: Exception | None
) -> None:
    """Raise on every rank the refusal of any rank, or an error for settings that differ. Collective.

    The groups compare one after another, and each passes its result on, so it reaches all ranks of a mesh.
    """
    error = refusal
    settings = {**settings, "commpress version": version("commpress")}
    for group in groups:
        try:
            require_agreement(settings if error is None else {"error": str(error)}, group, device)
        except ValueError as found:
            error = error or found
    if error is not None:
        raise error
