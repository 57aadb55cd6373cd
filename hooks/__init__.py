"""commpress for the frameworks that train in parallel: one file a framework. `attach` picks by the model's type."""

import difflib
import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from commpress.comm.codecs import AUTO, Codec
from commpress.comm.rules import Spec
from commpress.comm.session import Session
from commpress.comm.verify import EVERY
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
"""Modules that are imported on first use: they are slow to import, and most need packages of their own."""
OTHER_WORDS = {"spec": "gradients", "codec": "gradients", "compress": "gradients", "weights": "parameters"}
OTHER_WORDS |= {"params": "parameters", "scaler": "grad_scaler", "feedback": "error_feedback", "check": "verify"}
"""Words that users may write for an argument of `attach`, and that argument."""


def __getattr__(name: str) -> Any:
    if name in FRAMEWORKS:
        return importlib.import_module(f"commpress.hooks.{name}")
    raise AttributeError(f"module 'commpress.hooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *FRAMEWORKS})


def attach(
    model: Any,
    gradients: Spec | None = None,
    *,
    parameters: str | Codec | None = None,
    buffers: str | Codec | None = None,
    optimizer: Any = None,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: Any = None,
    verify: int = EVERY,
    **unknown: object,
) -> Session:
    """Compress a wrapped model's traffic from the next step on. Collective over its ranks.

    `model` is a `DistributedDataParallel`, the root module that was given to `fully_shard`, a DeepSpeed engine, or one of these
    after `torch.compile`. `gradients`, `parameters` and `buffers` are the specs of what is sent: DDP sends gradients and
    buffers, FSDP2 and ZeRO 1 to 3 send gradients and parameters. Without `gradients` a spec is found during training;
    `parameters` may then be `auto`, too. For DDP and ZeRO 0, `gradients` may be a dict of specs by patterns of names.
    `optimizer` is one of `commpress.optim`. `commpress.hooks.ddp.attach`, `commpress.hooks.fsdp.attach` and
    `commpress.hooks.deepspeed.attach` describe all other arguments for their wrapper.

    Raises TypeError for any other model and for an argument that this wrapper does not take, ValueError on all ranks if a spec
    is unknown or the ranks differ.
    """
    for word in unknown:
        raise TypeError(f"commpress.attach: unknown argument {word!r}, {_meant(word)}")
    model = uncompiled(model)
    return _hook_of(model).attach(  # type: ignore[no-any-return]
        model,
        AUTO if gradients is None else gradients,
        parameters=parameters,
        buffers=buffers,
        optimizer=optimizer,
        exchange=exchange,
        error_feedback=error_feedback,
        grad_scaler=grad_scaler,
        verify=verify,
    )


def _hook_of(model: Any) -> Any:
    """Return the module of commpress.hooks for a wrapped model. Raises TypeError for any other."""
    if isinstance(model, DistributedDataParallel):
        return ddp
    sharding = sys.modules.get("torch.distributed.fsdp")  # slow to import; a script with a sharded model has done so
    if sharding is not None and isinstance(model, sharding.FSDPModule):
        return importlib.import_module("commpress.hooks.fsdp")
    engines = sys.modules.get("deepspeed")
    if engines is not None and isinstance(model, engines.DeepSpeedEngine):
        return importlib.import_module("commpress.hooks.deepspeed")
    raise TypeError(
        f"commpress.attach: expected a torch.nn.parallel.DistributedDataParallel, or a model that fully_shard took, got "
        f"{type(model).__name__}; wrap the model first, then attach"
    )


def _meant(word: str) -> str:
    """Return a hint at the argument of `attach` that `word` may stand for."""
    known = [name for name in inspect.signature(attach).parameters if name not in ("model", "unknown")]
    close = [OTHER_WORDS[word]] if word in OTHER_WORDS else difflib.get_close_matches(word, known, n=1)
    return f"expected {close[0]}=" if close else f"known: {', '.join(known)}"
