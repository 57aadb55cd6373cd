"""commpress for the frameworks that train in parallel: one file a framework. `attach` picks by the model's type."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commpress.comm.codecs import Codec
from commpress.comm.session import Session
from commpress.hooks import ddp

__all__ = ["attach"]


def attach(model: nn.Module, spec: str | Codec, **settings: Any) -> Session:
    """Compress a wrapped model's gradient traffic by `spec`, from the next step on. Collective over its ranks.

    `model` is a `DistributedDataParallel`; the settings are those of `commpress.hooks.ddp.attach`.
    Raises TypeError for any other model, ValueError on all ranks if the spec is unknown or the ranks differ.
    """
    if isinstance(model, DistributedDataParallel):
        return ddp.attach(model, spec, **settings)
    raise TypeError(
        f"commpress.attach: expected a torch.nn.parallel.DistributedDataParallel, got {type(model).__name__}; "
        "wrap the model first, then attach, then compile if you compile"
    )
