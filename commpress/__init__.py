"""commpress: distributed training in PyTorch that sends 10 to 1000 times fewer bytes.

session = commpress.attach(ddp_model, "topk(0.01)|int4")
...                                # train as before
print(session.report())            # bytes and seconds, against a dense exchange
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from commpress import optim
from commpress.comm.codecs import Codec, parse
from commpress.comm.meter import Report
from commpress.comm.plan import Plan
from commpress.comm.session import Session

if TYPE_CHECKING:
    from commpress.hooks import attach as attach
    from commpress.hooks import broadcast_parameters as broadcast_parameters
    from commpress.hooks import diloco as diloco
    from commpress.hooks import local_sgd as local_sgd

__version__ = version("commpress")
HOOKS = ("attach", "broadcast_parameters", "diloco", "local_sgd")
__all__ = ["Codec", "Plan", "Report", "Session", "__version__", *HOOKS, "optim", "parse"]


def __getattr__(name: str) -> Any:
    # the library does not know the hooks; only these names lead there, when they are asked for
    if name in HOOKS:
        from commpress import hooks

        return getattr(hooks, name)
    raise AttributeError(f"module 'commpress' has no attribute {name!r}")
