"""The session of replicas: every rank of one process group holds all parameters, and their gradients become one mean."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import require_agreement
from commpress.comm.auto import Auto, budget, compile_loops
from commpress.comm.auto_behind import AutoBehind
from commpress.comm.codecs import AUTO, Codec, parse
from commpress.comm.coding import warm_up
from commpress.comm.collectives import Collectives, GradScaler
from commpress.comm.exchange import Hierarchical
from commpress.comm.masks_index import MaskIndex, in_memory_order, of_pairs
from commpress.comm.optimizer_hooks import OptimizerHooks
from commpress.comm.plan import Plan, require_flat
from commpress.comm.ratio_warmup import ratio_warmup
from commpress.comm.resize import of_replicas
from commpress.comm.rules import Rules, Spec, is_open, rules_for, small_tensors
from commpress.comm.search import PLAIN
from commpress.comm.segments import Segments, sizes
from commpress.comm.session import Masks, Session
from commpress.comm.step_buffer import StepBuffer
from commpress.comm.verify import EVERY, require_interval

Layouts = dict[str, tuple[torch.Size, tuple[int, ...]]]


def replicas_session(
    spec: Spec,
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

    `parameters` are the names and sizes of the exchanged parameters, `layouts` their shapes and strides, `dtypes` those of the
    gradients, if they are known. If the ranks' specs, settings, parameters or library versions differ, all raise ValueError
    with both values. Every `verify` steps (0: never), and in the first three, the ranks compare hashes of the means and of
    `step_buffer.replicas`, and payloads have checksums.
    """
    name = None if optimizer is None else type(optimizer).__name__
    rules = _agreed_rules(spec, parameters, group, device)
    allowed = budget(spec) if rules is None else rules.budget
    warmup = ratio_warmup(spec)
    by_name = PLAIN if rules is not None or allowed is not None else spec if warmup is None else warmup.codec
    assert not isinstance(by_name, Mapping)
    more: dict[str, object] = {"optimizer": name, "grad_scaler": grad_scaler is not None, "verify": verify}
    if by_name is not spec:
        more |= {"spec": str(rules or warmup or AUTO), "error budget": allowed}
    plan = agreed_plan(by_name, exchange, error_feedback, parameters, group, device, more)
    if optimizer is not None and optimizer.masks_momentum and isinstance(plan.exchange, Hierarchical):
        raise ValueError(
            f"exchange {str(plan.exchange)!r}: {name} clears each rank's momentum where that rank has sent, and here a node "
            "sends as one; leave exchange out, or take another optimizer"
        )
    if optimizer is not None and optimizer.needs_feedback and not error_feedback:
        raise ValueError(
            f"error_feedback=False: {name} adds up what it receives, so a later step must send what one left out; leave "
            "error_feedback out"
        )
    if optimizer is not None:
        require_flat(plan.codec, f"{name} sends no gradients, or shares a pass over them")
    behind = () if optimizer is None or allowed is None else optimizer.candidates()
    readable = set(dtypes) | {torch.float32}
    collectives = Collectives(group, device, plan, verify=verify, grad_scaler=grad_scaler, dtypes=readable)
    if collectives.world_size > 1:
        for dtype, codec in product(
            readable,
            {plan.codec, *(() if rules is None else rules.lossy), *(parse(one.spec) for one in behind)},
        ):
            warm_up(codec, device, dtype, prologue=optimizer is not None)
        if allowed is not None and optimizer is None:
            compile_loops(device, set(dtypes))
    auto = None
    if allowed is not None:
        if optimizer is None:
            auto = Auto(collectives, error_feedback, allowed, may_cut=rules is None)
        else:
            auto = AutoBehind(collectives, optimizer)
    named = str(plan.codec) if by_name is spec else str(rules or warmup or AUTO)

    def masks(given: Masks) -> list[MaskIndex]:
        for codec in {plan.codec, *(() if rules is None else rules.lossy)}:
            require_flat(codec, "masks leave no matrices whole")
        return [
            _mask_index(given, {part.name: part.n for part in parameters}, layouts or {}, collectives.pairs, optimizer)
        ]

    return Session(
        collectives,
        spec=named,
        settings={"settings": {**plan.settings(), "codec": named, "optimizer": name}},
        step_buffer=StepBuffer(collectives, optimizer, parameters, auto, rules, warmup),
        auto=auto,
        parameters=parameters,
        masks=masks,
        reshard=of_replicas,
    )


def _agreed_rules(spec: Spec, parameters: Segments, group: dist.ProcessGroup, device: torch.device) -> Rules | None:
    """Return the rules if the spec has patterns, else None. If the spec is wrong it is collective, and all ranks raise."""
    try:
        if isinstance(spec, Mapping):
            return rules_for(spec, [segment.name for segment in parameters], small_tensors(parameters))
        is_open(spec)
        return None
    except (ValueError, TypeError) as error:
        require_agreement({"error": str(error)}, group, device)
        raise


def agreed_plan(
    spec: str | Codec,
    exchange: str | None,
    error_feedback: bool,
    parameters: Segments,
    group: dist.ProcessGroup,
    device: torch.device,
    more: dict[str, object],
) -> Plan:
    """Return the plan, after all ranks of `group` have compared it and `more` settings. Collective.

    Raises ValueError on all ranks if they differ.
    """
    try:
        plan = Plan.of(spec, exchange, error_feedback).on(dist.get_process_group_ranks(group))
        require_interval(more["verify"])
    except (ValueError, TypeError) as error:
        require_agreement({"error": str(error)}, group, device)
        raise
    settings: dict[str, object] = {
        "spec": str(plan.codec),
        "exchange": None if plan.exchange is None else str(plan.exchange),
        "error_feedback": error_feedback,
        "commpress version": version("commpress"),
        "parameters": f"{len(parameters)} with {sum(sizes(parameters))} values",
        **more,
    }
    require_agreement(settings, group, device)
    return plan


def _mask_index(
    masks: Masks, sizes: dict[str, int], layouts: Layouts, pairs: set[str], optimizer: OptimizerHooks | None
) -> MaskIndex:
    """Return the index of the values that masks keep in each parameter. Raises ValueError for a mask that does not fit."""
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
