"""Warnings that one rank gives for all of them."""

import warnings

import torch.distributed as dist


def speaks(*groups: dist.ProcessGroup) -> bool:
    """Whether this rank, the first one of each of these groups, is the one that warns."""
    return all(dist.get_rank(group) == 0 for group in groups)


def warn(speaks: bool, message: str) -> None:
    """Warn on the rank that speaks; on the others do nothing."""
    if speaks:
        warnings.warn(message, stacklevel=3)
