"""Local SGD and DiLoCo, by the optimizer's step hook: after each local step the outer syncs that are due run.

    outer = commpress.diloco(model, optimizer, every=30)        # then train as before
    with outer.synced(): validate(model)

torch calls the hook (`register_step_post_hook`) after every `optimizer.step`; a step that a GradScaler skips does not count.
If several optimizers train a model, a local step is over when each of them has stepped. Between syncs the replicas differ,
and nothing is sent. torch copies and saves an optimizer without its hooks, but with its `defaults`. They are marked by a class
of their own, so a copy is recognised and warns that it has no syncs.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from commpress.comm.agreement import refuse_on_all
from commpress.comm.codecs import Codec
from commpress.comm.parameters import unfit_dtype
from commpress.hooks.parameters import replicated_parameters, uncompiled
from commpress.notice import warn
from commpress.optim.base import CompressedOptimizer
from commpress.optim.outer import Outer, OuterSettings

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def local_sgd(
    model: nn.Module,
    optimizer: Optimizers,
    spec: str | Codec = "int8",
    *,
    every: int,
    fragments: int = 1,
    delay: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Outer:
    """Train by local SGD (Stich, arXiv:1805.09767): every `every` steps of `optimizer`, average the parameters.

    Each rank sends its compressed difference from the last average. `optimizer` is one of torch's own, an EF21Muon that is not
    attached, or a list such as `[muon, adamw]` whose members together hold all trained parameters; a step is then over when
    each of them has stepped, in any order. Optimizer state is never exchanged. `model` is a plain module, an FSDP2 one, or a
    DDP whose process group is one worker (a node): then `group` holds the ranks at the same place in all workers, and
    parameters that DDP ignores are left alone. `fragments` and `delay` are as in `diloco`. Collective over all ranks.

    Raises ValueError on all ranks of `group` for a bad spec or setting, if the ranks differ, if ranks of `group` share a DDP or
    one model's shards, for an optimizer that has outer syncs, is attached to a session or clips by `max_norm`, and if the
    optimizers do not hold every trained parameter; TypeError for another optimizer of `commpress.optim`. A parameter that is
    unfrozen later is a RuntimeError in the optimizer's next step.
    """
    return _attach(model, optimizer, spec, group, every=every, fragments=fragments, delay=delay)


def diloco(
    model: nn.Module,
    optimizer: Optimizers,
    spec: str | Codec = "topk(0.03)|int2",
    *,
    every: int,
    lr: float = 0.7,
    momentum: float = 0.6,
    decay: float = 1.0,
    fragments: int = 1,
    delay: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Outer:
    """Train by DiLoCo (Douillard et al., arXiv:2311.08105): an outer Nesterov step on the workers' mean update, every `every`
    steps.

    `lr` and `momentum` are those of the outer step; `decay` multiplies the residual that error feedback adds to the next sync.
    `momentum=0`, `lr=1` and `decay=0.95` give SparseLoCo (arXiv:2508.15706). `fragments` is the number of parts of the model
    that sync at different steps; `delay` is the number of steps that training continues while a part is being sent (Streaming
    DiLoCo, arXiv:2501.18512). With Muon as `optimizer` it is MuLoCo (arXiv:2505.23725). `model`, `optimizer`, `group` and
    errors are as in `local_sgd`.
    """
    settings = {"every": every, "lr": lr, "momentum": momentum, "decay": decay, "fragments": fragments, "delay": delay}
    return _attach(model, optimizer, spec, group, **settings)


def _attach(
    model: nn.Module,
    optimizer: Optimizers,
    spec: str | Codec,
    group: dist.ProcessGroup | None,
    **settings: Any,
) -> Outer:
    outer_group = group or dist.distributed_c10d._get_default_group()
    module = uncompiled(model)
    inner = module.process_group if isinstance(module, DistributedDataParallel) else None
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(dict.fromkeys(optimizer))
    # names of the bare module, so that a checkpoint does not depend on the wrapper
    trained = {name: p for name, p in replicated_parameters(module).items() if p.requires_grad}
    try:
        chosen = OuterSettings(**settings)
        _check_model(trained, outer_group, inner)
        _check_optimizers(trained, optimizers)
    except (ValueError, TypeError) as error:
        device = next((x.device for x in module.parameters()), torch.device("cpu"))
        refuse_on_all(error, outer_group, device)
    held = {name: _local(p) for name, p in trained.items()}
    outer = Outer(held, spec, chosen, outer_group, inner, owners=trained)
    stepped = _Stepped(outer, module, {*trained.values(), *_trained_by(optimizers)}, optimizers)
    for one in optimizers:
        if isinstance(one, CompressedOptimizer):
            one.step_alone()
        one.register_step_post_hook(stepped)
        one.defaults = _local_steps(one.defaults)
    return outer


class _Stepped:
    """The hook that optimizers call after each step. `known` holds the parameters that were trained when the syncs began."""

    def __init__(
        self, outer: Outer, module: nn.Module, known: set[Tensor], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._outer, self._module, self._known = outer, weakref.ref(module), known
        self._taken = dict.fromkeys(map(id, optimizers), 0)
        """Steps of each optimizer since the last local step ended."""

    def __call__(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if late := [p for p in _trained_by([optimizer]) if p not in self._known]:
            self._refuse(late, type(optimizer).__name__)
        self._taken[id(optimizer)] += 1
        if min(self._taken.values()) > 0:
            self._taken = dict.fromkeys(self._taken, 0)  # a scaler may have skipped one of them
            self._outer.step()
        elif (ahead := self._taken[id(optimizer)]) > self._outer.settings.every:
            raise RuntimeError(
                f"commpress: {type(optimizer).__name__} has taken {ahead} steps, another optimizer of the same outer syncs "
                "none: expected all of them to step in each local step"
            )

    def _refuse(self, late: list[Tensor], optimizer: str) -> None:
        """Raise RuntimeError if one of the parameters `late` is the model's: no sync would exchange it."""
        module = self._module()
        for name, p in {} if module is None else replicated_parameters(module).items():
            if any(p is one for one in late):
                raise RuntimeError(
                    f"commpress: parameter {name!r} requires a gradient, but did not when the outer syncs began, and would "
                    f"differ from rank to rank. Expected a new {optimizer}, and commpress.diloco or local_sgd for it, once "
                    "the parameter is to be trained"
                )
        self._known.update(late)  # parameters of another model


def _trained_by(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    return [p for one in optimizers for group in one.param_groups for p in group["params"] if p.requires_grad]


class _LocalSteps(dict[str, Any]):
    """The defaults of an optimizer with outer syncs, and of every copy of it, pickled or not."""

    def __reduce__(self) -> Any:
        return _local_steps, (dict(self),)


_watching: list[Any] = []
"""The handle of the global step hook that looks for copies; empty until the first optimizer has outer syncs."""
_told: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()
"""Copies that have warned that they are copies."""


def _local_steps(defaults: Mapping[str, Any]) -> _LocalSteps:
    """Mark an optimizer's defaults, and watch for copies of it from now on."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_say_copy))
    return _LocalSteps(defaults)


def _say_copy(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """Warn on rank 0, once for each copy that has taken a step, that it is a copy."""
    if not isinstance(optimizer.defaults, _LocalSteps) or _has_syncs(optimizer) or optimizer in _told:
        return
    _told.add(optimizer)
    warn(
        f"commpress: this {type(optimizer).__name__} is a copy of one that had outer syncs. It has none, so each rank goes its "
        "own way: call commpress.diloco or commpress.local_sgd with its model before it steps"
    )


def _has_syncs(optimizer: torch.optim.Optimizer) -> bool:
    return any(isinstance(hook, _Stepped) for hook in optimizer._optimizer_step_post_hooks.values())


def _check_model(trained: Mapping[str, Tensor], group: dist.ProcessGroup, inner: dist.ProcessGroup | None) -> None:
    if not trained:
        raise ValueError("no parameter is trained: expected a model with at least one that requires a gradient")
    if refusal := unfit_dtype({name: _local(p) for name, p in trained.items()}):
        raise ValueError(refusal)
    workers = set(dist.get_process_group_ranks(group))
    if inner is not None and len(shared := workers & set(dist.get_process_group_ranks(inner))) > 1:
        raise ValueError(
            f"the DDP module and the outer group share ranks {sorted(shared)}: DDP already averages them in every step. "
            "Give DDP the process group of one worker and `group` the ranks of the same place in all workers, or leave DDP out"
        )
    for name, p in trained.items():
        if isinstance(p, DTensor) and len(shared := workers & _owners(p)) > 1:
            raise ValueError(
                f"the sharded model and the outer group share ranks {sorted(shared)}: they hold different parts of {name!r}. "
                "Give fully_shard the mesh of one worker and `group` the ranks of the same place in all workers"
            )


def _check_optimizers(trained: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, CompressedOptimizer):
            _check_compressed(optimizer, name)
        if _has_syncs(optimizer):
            raise ValueError(f"optimizer: this {name} has outer syncs already, expected one without: attach once")
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
    if not held & set(trained.values()):
        raise ValueError(
            f"optimizer: this {names} holds none of the model's parameters, expected the one that trains them, made after the "
            "model was sharded"
        )
    if missing := [name for name, p in trained.items() if p not in held]:
        raise ValueError(
            f"optimizer: this {names} does not hold {missing[0]!r}, which requires a gradient, and {len(missing) - 1} others. "
            "Expected all optimizers of the model, as [muon, adamw], or one for all of it, such as EF21Muon, or "
            "requires_grad_(False) for what is not to be trained"
        )


def _check_compressed(optimizer: CompressedOptimizer, name: str) -> None:
    if not optimizer.may_step_alone:
        raise TypeError(
            f"optimizer: {name} exchanges by itself; expected one that takes local steps, such as AdamW or EF21Muon"
        )
    if optimizer.binding is not None:
        raise ValueError(
            f"optimizer: this {name} is attached to a session, and exchanges in every step; expected one that is attached to "
            "nothing"
        )
    if any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        raise TypeError(
            f"optimizer: {name} steps whole parameters, and this model's are sharded; expected a plain module or a DDP "
            "in each worker, or an optimizer of torch"
        )
    if (most := optimizer.param_groups[0]["max_norm"]) is not None:
        raise ValueError(
            f"optimizer: max_norm {most} of {name} clips what is exchanged in every step; expected None, and "
            "torch.nn.utils.clip_grad_norm_ before each step"
        )


def _owners(p: DTensor) -> set[int]:
    """Return the ranks, this one included, that together hold one copy of a parameter."""
    here = p.device_mesh.get_coordinate() or [0] * p.device_mesh.ndim
    part = tuple(at if kind.is_replicate() else slice(None) for kind, at in zip(p.placements, here, strict=True))
    return set(p.device_mesh.mesh[part].flatten().tolist())


@torch.no_grad()
def _local(p: Tensor) -> Tensor:
    """Return this rank's part of a parameter. The local tensor of a sharded one does not follow its `requires_grad`."""
    return p.to_local() if isinstance(p, DTensor) else p
