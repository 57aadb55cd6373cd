"""commpress for the frameworks that train in parallel: one file a framework. `attach` picks by the model's type."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from commpress.comm.codecs import Codec
from commpress.comm.session import Session
from commpress.hooks import ddp
from commpress.hooks.broadcast import broadcast_parameters
from commpress.hooks.outer import diloco, local_sgd
from commpress.hooks.parameters import uncompiled

if TYPE_CHECKING:
    from commpress.hooks import accelerate as accelerate
    from commpress.hooks import deepspeed as deepspeed
    from commpress.hooks import fsdp as fsdp
    from commpress.hooks import lightning as lightning
    from commpress.hooks import transformers as transformers

__all__ = ["attach", "broadcast_parameters", "diloco", "local_sgd"]
FRAMEWORKS = ("accelerate", "deepspeed", "fsdp", "lightning", "transformers")
"""Imported when they are first asked for: slow, and most need packages of their own."""


def __getattr__(name: str) -> Any:
    if name in FRAMEWORKS:
        return importlib.import_module(f"commpress.hooks.{name}")
    raise AttributeError(f"module 'commpress.hooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *FRAMEWORKS})


def attach(model: Any, spec: str | Codec | None = None, **settings: Any) -> Session:
    """Compress a wrapped model's traffic, from the next step on. Collective over its ranks.

    `model` is a `DistributedDataParallel`, whose gradients travel by `spec` (settings: `commpress.hooks.ddp.attach`), or the
    root of what `fully_shard` took: `attach(model, gradients="int4", parameters="int8")` (`commpress.hooks.fsdp.attach`),
    or a DeepSpeed engine: `attach(engine, "int4", parameters="int8")` (`commpress.hooks.deepspeed.attach`); or what
    `torch.compile` made of one of these.
    Raises TypeError for any other model, ValueError on all ranks if a spec is unknown or the ranks differ.
    """
    model = uncompiled(model)
    if isinstance(model, DistributedDataParallel):
        if spec is None:
            raise TypeError('commpress.attach: expected a spec, as in attach(ddp_model, "int4"), got none')
        return ddp.attach(model, spec, **settings)
    sharding = sys.modules.get("torch.distributed.fsdp")  # slow to import; who has a sharded model has done so
    if sharding is not None and isinstance(model, sharding.FSDPModule):
        if spec is not None or "gradients" not in settings:
            raise TypeError(
                "commpress.attach: a sharded model has gradients and parameters on the network, expected a spec for each: "
                f'attach(model, gradients="{spec or "int4"}", parameters="int8")'
            )
        from commpress.hooks import fsdp

        return fsdp.attach(model, **settings)
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        if spec is None:
            raise TypeError(
                'commpress.attach: expected a spec, as in attach(engine, "int4", parameters="int8"), got none'
            )
        from commpress.hooks import deepspeed as engines

        return engines.attach(model, spec, **settings)
    raise TypeError(
        f"commpress.attach: expected a torch.nn.parallel.DistributedDataParallel, or a model that fully_shard took, got "
        f"{type(model).__name__}; wrap the model first, then attach"
    )
