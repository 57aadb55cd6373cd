"""Names and parameters of a model, whatever wraps it; and which of them DistributedDataParallel exchanges.

DDP leaves out what is named in `_ddp_params_and_buffers_to_ignore`, which the user exchanges, or which differs from rank to
rank; and what was given as `delay_all_reduce_named_params`, which it exchanges by itself, without a hook.
"""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commpress.comm.parameters import COMPILED, bare_name

Named = dict[str, nn.Parameter]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module in what `torch.compile(module)` returned; others as they are."""
    while isinstance(model, nn.Module) and (inner := model._modules.get(COMPILED)) is not None:
        model = inner
    return model


def bare_parameters(module: nn.Module) -> Named:
    """All parameters of a module by their bare names, in its order. A tied one has the first of its names."""
    full = dict(module.named_parameters())
    bare = {bare_name(name): p for name, p in full.items()}
    return bare if len(bare) == len(full) else full  # a module that uses the wrappers' words itself


def exchanged_parameters(ddp: DistributedDataParallel) -> Named:
    """Return what DDP hands to its hook: what required a gradient when it was wrapped, and is neither ignored nor delayed."""
    if getattr(ddp, "_delay_all_reduce_all_params", False):
        return {}  # and it has no buckets
    sent = {
        p
        for place, module in ddp.module.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if f"{place}.{name}" not in ddp.parameters_to_ignore  # as DDP itself asks for it
    }
    if not all(p.requires_grad for p in sent):
        sent = {p for bucket in ddp.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
    return {name: p for name, p in bare_parameters(ddp.module).items() if p in sent}


def replicated_parameters(model: nn.Module) -> Named:
    """Return what all ranks of a model hold alike: under DDP all but what it ignores; else all parameters."""
    model = uncompiled(model)
    if not isinstance(model, DistributedDataParallel):
        return bare_parameters(model)
    delayed = set(delayed_parameters(model))
    ignored = {
        p for name, p in model.module.named_parameters() if name in model.parameters_to_ignore and p not in delayed
    }
    return {name: p for name, p in bare_parameters(model.module).items() if p not in ignored}


def delayed_parameters(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    """Return what DDP exchanges by itself, all of it at once, when the gradient of another parameter is there."""
    return list(getattr(ddp, "_delay_all_reduce_params", ()))  # not public


def not_taken(argument: str, value: object, why: str) -> Exception | None:
    """Return the error for an argument of `attach` that means nothing under a wrapper; None if it was not given."""
    if value is None:
        return None
    return TypeError(f"commpress.attach: {argument}={value!r}: {why}; leave it out")
