"""The session of replicas: every rank of one process group holds all parameters, and their gradients become one mean."""

from collections.abc import Iterable
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.auto import Auto
from commpress.comm.codecs import AUTO, Codec
from commpress.comm.coding import warm_up
from commpress.comm.collectives import Collectives, GradScaler
from commpress.comm.feedback import Segments
from commpress.comm.masks_index import MaskIndex, in_memory_order, of_pairs
from commpress.comm.optimizer_hooks import OptimizerHooks
from commpress.comm.plan import Plan
from commpress.comm.resize import of_replicas
from commpress.comm.search import PLAIN
from commpress.comm.session import Masks, Session
from commpress.comm.step_buffer import StepBuffer
from commpress.comm.verify import EVERY, require_interval

Layouts = dict[str, tuple[torch.Size, tuple[int, ...]]]


def replicas_session(
    spec: str | Codec,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: GradScaler | None = None,
    parameters: Segments = (),
    layouts: Layouts | None = None,
    optimizer: OptimizerHooks | None = None,
    verify: int = EVERY,
    dtypes: Iterable[torch.dtype] = (),
) -> Session:
    """Make the session of the data-parallel ranks of `group`, whose gradients live on `device`. Collective.

    `parameters` are names and sizes of what is exchanged, `layouts` their shapes and strides, `dtypes` those of the gradients,
    where they are known. Ranks whose spec, settings, parameters or library version differ all raise ValueError with both
    values. Every `verify` steps (0: never), and in the first three, the ranks compare hashes of the means and of
    `step_buffer.replicas`, and payloads have checksums.
    """
    name = None if optimizer is None else type(optimizer).__name__
    chosen_here = str(spec) == AUTO
    more: dict[str, object] = {"optimizer": name, "grad_scaler": grad_scaler is not None, "verify": verify}
    if chosen_here:
        more["spec"] = AUTO
    plan = agreed_plan(PLAIN if chosen_here else spec, exchange, error_feedback, parameters, group, device, more)
    collectives = Collectives(group, device, plan, verify=verify, grad_scaler=grad_scaler)
    if collectives.world_size > 1:
        for dtype in set(dtypes) | {torch.float32}:
            warm_up(plan.codec, device, dtype, prologue=optimizer is not None)

    auto = Auto(collectives, error_feedback) if chosen_here else None

    def masks(given: Masks) -> list[MaskIndex]:
        return [_mask_index(given, dict(parameters), layouts or {}, collectives.pairs, optimizer)]

    return Session(
        collectives,
        spec=AUTO if chosen_here else str(plan.codec),
        settings={"settings": {**plan.settings(), **({"codec": AUTO} if chosen_here else {}), "optimizer": name}},
        step_buffer=StepBuffer(collectives, optimizer, parameters, auto),
        parameters=parameters,
        masks=masks,
        reshard=of_replicas,
    )


def agreed_plan(
    spec: str | Codec,
    exchange: str | None,
    error_feedback: bool,
    parameters: Segments,
    group: dist.ProcessGroup,
    device: torch.device,
    more: dict[str, object],
) -> Plan:
    """The plan that all ranks of `group` have asked for, `more` settings alike. Collective. Raises ValueError on all ranks."""
    try:
        plan = Plan.of(spec, exchange, error_feedback)
        require_interval(more["verify"])
    except (ValueError, TypeError) as error:
        require_agreement({"error": str(error)}, group, device)
        raise
    settings: dict[str, object] = {
        "spec": str(plan.codec),
        "exchange": plan.settings()["exchange"],
        "error_feedback": error_feedback,
        "commpress version": version("commpress"),
        "parameters": f"{len(parameters)} with {sum(n for _, n in parameters)} values",
        **more,
    }
    require_agreement(settings, group, device)
    return plan


def _mask_index(
    masks: Masks, sizes: dict[str, int], layouts: Layouts, pairs: set[str], optimizer: OptimizerHooks | None
) -> MaskIndex:
    """Where what masks keep lies in each parameter. Raises ValueError for a mask that does not fit."""
    if optimizer is not None and not optimizer.may_be_masked:
        raise ValueError(f"{type(optimizer).__name__} keeps the momentum of all values: expected SGD for masks")
    flat: dict[str, Tensor] = {}
    for name, mask in masks.items():
        n, each = sizes.get(name), 2 if name in pairs else 1
        if n != each * mask.numel():
            known = "no such parameter" if n is None else n // each
            raise ValueError(f"mask of {name!r}: {mask.numel()} values, the session has {known}")
        if (mask.shape, mask.stride()) != (laid := layouts.get(name, (mask.shape, mask.stride()))):
            raise ValueError(
                f"mask of {name!r}: shape {tuple(mask.shape)}, strides {mask.stride()}; the parameter has "
                f"{tuple(laid[0])}, {laid[1]}"
            )
        kept = in_memory_order(mask)
        flat[name] = of_pairs(kept) if name in pairs else kept
    return MaskIndex(flat)
