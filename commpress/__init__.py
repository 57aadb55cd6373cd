"""commpress: distributed training in PyTorch that sends 204 times fewer bytes after a warm-up, at 0.2 % more loss.

optimizer = commpress.optim.ZeroOneAdamW(model.parameters(), lr=1e-3, warmup_steps=2000, sync_every=4)
session = commpress.attach(ddp_model, "topk(0.1)|sign", optimizer=optimizer)
...                                # train as before
print(session.report())            # bytes and seconds, against a dense exchange

The figure is of a small GPT, in the README's table "Loss beside speed" and in docs/adam.md. Without a spec, `attach(ddp_model)`
finds one for any optimizer.
"""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commpress import optim
from commpress.comm.codecs import Codec, parse
from commpress.comm.meter import Report
from commpress.comm.plan import Plan
from commpress.comm.session import Session

if TYPE_CHECKING:
    from commpress import files as files
    from commpress import hooks as hooks
    from commpress import launch as launch
    from commpress import model as model
    from commpress.hooks import attach as attach
    from commpress.hooks import broadcast_parameters as broadcast_parameters
    from commpress.hooks import diloco as diloco
    from commpress.hooks import local_sgd as local_sgd

_root = Path(__file__).parents[1]
if _root.joinpath("launch", "cli.py").is_file() and not Path(__file__).with_name("launch").is_dir():
    # a program that is started in a clone finds the clone's commpress/, which has hooks/ and launch/ beside it
    __path__.append(str(_root))

__version__ = version("commpress")
HOOKS = ("attach", "broadcast_parameters", "diloco", "local_sgd")
PACKAGES = ("files", "hooks", "launch", "model")
"""Modules that are imported on first use: the library does not need them, and two of them need packages of their own."""
__all__ = ["Codec", "Plan", "Report", "Session", "__version__", *HOOKS, "optim", "parse"]


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(f"commpress.{name}")
    if name in HOOKS:
        return getattr(importlib.import_module("commpress.hooks"), name)
    raise AttributeError(f"module 'commpress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOOKS, *PACKAGES})
