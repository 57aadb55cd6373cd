"""Steps of torch's own AdamW and SGD on uncompressed gradients, for the parameters of one group.

The compressed optimizers use them for parameters that no session exchanges, and AdamW in the warm-up. The state has torch's
keys.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

State = MutableMapping[Tensor, dict[str, Any]]


def step_adamw(parameters: Sequence[Tensor], group: dict[str, Any], states: State, fused: bool = False) -> None:
    """Step `parameters`, which all have a dense `grad`, as torch.optim.AdamW does; bit for bit unless `fused`.

    Reads lr, betas, eps and weight_decay of the group; keeps `step`, `exp_avg` and `exp_avg_sq` of each.
    """
    for p in parameters:
        state = states[p]
        if "exp_avg" not in state:
            begin_adamw(p, state, fused)
        elif fused and state["step"].device != p.device:
            state["step"] = state["step"].to(p.device)
    kept = {key: [states[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step")}
    adamw(
        list(parameters),
        [p.grad for p in parameters if p.grad is not None],
        kept["exp_avg"],
        kept["exp_avg_sq"],
        [],
        kept["step"],
        fused=(parameters[0].device.type in ("cpu", "cuda")) if fused else None,
        has_complex=any(p.is_complex() for p in parameters),
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        **{key: group[key] for key in ("lr", "weight_decay", "eps")},
    )


def begin_adamw(p: Tensor, state: dict[str, Any], fused: bool = True) -> None:
    """Make the initial state that `step_adamw` keeps of a parameter."""
    device = p.device if fused else torch.device("cpu")  # torch keeps `step` there, too
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)


def step_sgd(parameters: Sequence[Tensor], group: dict[str, Any], states: State) -> None:
    """Step `parameters`, which all have a `grad`, as torch.optim.SGD does, bit for bit.

    Reads lr, momentum, weight_decay and nesterov of the group; keeps `momentum_buffer` of each if there is momentum.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    buffers = [states[p].get("momentum_buffer") for p in parameters] if group["momentum"] else []
    sgd(
        list(parameters),
        gradients,
        buffers,
        has_sparse_grad=any(g.is_sparse for g in gradients),
        dampening=0.0,
        maximize=False,
        **{key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")},
    )
    for p, buffer in zip(parameters, buffers, strict=False):
        states[p]["momentum_buffer"] = buffer
