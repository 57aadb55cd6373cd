"""Names and parameters of a model under any wrapper, and which of them DistributedDataParallel exchanges by its hook.

Two kinds are left out. Names in `_ddp_params_and_buffers_to_ignore`: the user exchanges these parameters, or they differ from
rank to rank. Parameters in `delay_all_reduce_named_params`: DDP exchanges them itself, without calling a hook.
"""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commpress.comm.parameters import COMPILED, bare_name

Named = dict[str, nn.Parameter]


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside the one that `torch.compile` returned; any other module as it is."""
    while isinstance(model, nn.Module) and (inner := model._modules.get(COMPILED)) is not None:
        model = inner
    return model


def bare_parameters(module: nn.Module) -> Named:
    """Return all parameters of a module by their bare names, in its order. A tied parameter has the first of its names."""
    full = dict(module.named_parameters())
    bare = {bare_name(name): p for name, p in full.items()}
    return (
        bare if len(bare) == len(full) else full
    )  # else two names became one: the module itself uses a wrapper's prefix


def exchanged_parameters(ddp: DistributedDataParallel) -> Named:
    """Return the parameters that DDP gives to its hook, by bare name.

    These required a gradient when the module was wrapped, and are neither ignored nor delayed.
    """
    if getattr(ddp, "_delay_all_reduce_all_params", False):
        return {}  # there are no buckets
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
    """Return the parameters that are equal on all ranks, by bare name: all of them, but under DDP without the ignored ones."""
    model = uncompiled(model)
    if not isinstance(model, DistributedDataParallel):
        return bare_parameters(model)
    delayed = set(delayed_parameters(model))
    ignored = {
        p for name, p in model.module.named_parameters() if name in model.parameters_to_ignore and p not in delayed
    }
    return {name: p for name, p in bare_parameters(model.module).items() if p not in ignored}


def delayed_parameters(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters that DDP itself exchanges, all at once, when the gradient of one chosen parameter arrives."""
    return list(getattr(ddp, "_delay_all_reduce_params", ()))  # not public


def not_taken(argument: str, value: object, why: str) -> Exception | None:
    """Return the error for an argument of `attach` that means nothing under a wrapper; None if it was not given."""
    if value is None:
        return None
    return TypeError(f"commpress.attach: {argument}={value!r}: {why}; leave it out")
