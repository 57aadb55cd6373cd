"""DeepSpeed 0.19.8, by replacing the methods of an engine, or of its ZeRO optimizer, that send.

DeepSpeed has no point for a hook. Every rank calls these methods in the same order and uses their results at once. So the
replacements wait for their results; only ZeRO 3's gathers run beside the computation:

    ZeRO 0     gradients, at the end of an accumulation:  mean on all ranks               engine.buffered_allreduce_fallback
    ZeRO 1, 2  gradients (2: in every backward):          each part's mean to its owner   zero.average_tensor
               parameters, after the owners' step:        from their owner to all         all_gather_dp_groups
    ZeRO 3     gradients, in every backward:              each part's mean to its owner   zero.__avg_scatter_grads
               parameters, before a module runs:          from their owner to all         param.all_gather_coalesced

The fp32 values that the optimizer steps stay exact on their owner; all ranks, the owner too, compute with the decoded values.
ZeRO 1 and 2 keep the parameters from step to step. There the owner sends the difference between its exact values and those
that all ranks hold. A coarse spec leaves a part of it out, and that part is in the next difference: this is error feedback
without a memory.

A compressed optimizer codes a momentum that every rank must hold (OneBitAdamW) or that is this rank's own (ZeroOneAdamW, DGC).
So with such an optimizer ZeRO 1 and 2 do what ZeRO 0 does: every rank keeps everything. OneBitAdamW is sharded instead if
`parameters` is given: then the owners' steps are coded, too, and the other ranks estimate the momentum from them. EF21Muon is
always sharded: gradients are sent to the owners by `others_spec`, and when the engine steps, the momentum of each matrix is
sent to one rank and the update is sent back.

These methods are private to DeepSpeed and may change, so `refusals` accepts one line of versions only. The replacements are in
`replicas` (ZeRO 0), `partitions` (1 and 2) and `gathered` (3).
"""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from commpress import extras
from commpress.comm.agreement import agree_on_all
from commpress.comm.codecs import AUTO, Codec
from commpress.comm.collectives import Collectives
from commpress.comm.joining import follow_default_timeout
from commpress.comm.plan import SHARDED, Plan, require_flat, sharded_settings, sharded_spec
from commpress.comm.rules import Spec, is_open
from commpress.comm.search import PLAIN
from commpress.comm.session import Session
from commpress.comm.sharded_auto import ShardedAuto, decides
from commpress.comm.verify import EVERY, require_interval
from commpress.hooks.deepspeed.auto import follow_steps
from commpress.hooks.deepspeed.gathered import Gathered, attach_gathered
from commpress.hooks.deepspeed.partitions import Partitions, attach_partitions
from commpress.hooks.deepspeed.refusals import attach_refusal, gradients_refusal, require_deepspeed
from commpress.hooks.deepspeed.replicas import attach_replicas
from commpress.hooks.parameters import bare_parameters, not_taken
from commpress.notice import speaks
from commpress.optim import DGC, CompressedOptimizer, EF21Muon, OneBitAdamW, ZeroOneAdamW
from commpress.optim.advice import advise
from commpress.optim.sharded_muon import Momentum, momentum_of

KEYS = ("gradients", "parameters", "exchange", "error_feedback", "verify")
"""Keys of a `commpress` block in a DeepSpeed config."""
OPTIMIZERS = {kind.__name__: kind for kind in (OneBitAdamW, ZeroOneAdamW, DGC)}
GONE = {"OneBitAdam": "OneBitAdamW", "ZeroOneAdam": "ZeroOneAdamW", "OneBitLamb": "OneBitAdamW"}
"""Optimizers that DeepSpeed had until 0.19.6, and the nearest one of `commpress.optim`."""


def attach(
    engine: Any,
    gradients: Spec = AUTO,
    *,
    parameters: str | Codec | None = None,
    buffers: str | Codec | None = None,
    optimizer: CompressedOptimizer | None = None,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: Any = None,
    verify: int = EVERY,
) -> Session:
    """Compress what a `deepspeed.DeepSpeedEngine` sends from the next step on. Collective over its data-parallel ranks.

    `gradients` is the spec of the gradients; without it a spec is found during training. At ZeRO 0 with a torch optimizer it
    may be a dict of specs by patterns of names, as under DDP. `parameters` is the spec of the parameters under ZeRO 1 to 3
    (default: not compressed). It may be `auto` if `gradients` is: one search finds both. ZeRO 3 refuses sparse specs for
    parameters.

    `optimizer` is the engine's optimizer of `commpress.optim`, at ZeRO 0 to 2 (default: found in the engine). With it every
    rank of ZeRO 1 and 2 keeps and steps all parameters, as at ZeRO 0: no parameters are sent, and `exchange` may be given.
    OneBitAdamW with `parameters` is sharded instead (less memory, more bytes), and EF21Muon is always sharded. Every `verify`
    steps (0: never) the ranks compare hashes of the values that all of them hold, and payloads have checksums. The engine's
    group gets the timeout of the default group.

    Returns the session, which is also `engine.commpress`.

    Raises on all ranks: ValueError if a spec is unknown, the ranks differ, or the engine is set up in a way that is not
    supported; TypeError for optimizers of other kinds; RuntimeError for another version of DeepSpeed or a second attach.
    """
    require_deepspeed(engine)
    stage = int(engine.zero_optimization_stage())
    group, device = engine.seq_data_parallel_group, torch.device(engine.device)
    follow_default_timeout(group, device)
    if optimizer is None and isinstance(engine.basic_optimizer, CompressedOptimizer):
        optimizer = engine.basic_optimizer
    one_bit = isinstance(optimizer, OneBitAdamW) and parameters is not None
    sharded = stage > 0 and (optimizer is None or isinstance(optimizer, EF21Muon) or one_bit)
    refusal = not_taken("buffers", buffers, "DeepSpeed sends none")
    refusal = refusal or not_taken("grad_scaler", grad_scaler, "an engine scales its losses by itself")
    refusal = refusal or attach_refusal(engine, stage, sharded, optimizer, exchange)
    refusal = refusal or gradients_refusal(gradients, stage, sharded, optimizer, exchange, error_feedback)
    found: Spec | None = None
    by_auto = (False, False)
    plans: tuple[Plan, Plan] | None = None
    momentum: Momentum | None = None
    if refusal is None:
        try:
            if sharded and isinstance(optimizer, EF21Muon):
                momentum = momentum_of(gradients, optimizer, error_feedback, parameters)
                gradients, error_feedback = optimizer.param_groups[0]["others_spec"], False
            found = gradients if is_open(gradients) else None
            by_name = gradients if found is None else PLAIN
            assert not isinstance(by_name, Mapping)
            by_auto = decides(gradients, parameters) if sharded else by_auto
            of_parameters = None if by_auto[1] else parameters
            plans = _plans(stage, sharded, by_name, of_parameters, exchange, error_feedback, optimizer)
            require_interval(verify)
        except (ValueError, TypeError) as error:
            refusal = error
    known = bare_parameters(engine.module).items()
    names: dict[Any, str] = {p: name for name, p in known if p.requires_grad and _numel(p)}
    settings: dict[str, object] = {"ZeRO stage": stage, "optimizer": type(optimizer).__name__ if optimizer else None}
    settings |= {"sharded": sharded, "verify": verify, "momentum": None if momentum is None else momentum.spec}
    settings["parameters"] = f"{len(names)} with {sum(_numel(p) for p in names)} values"
    if plans is not None:
        settings |= {"gradients' plan": plans[0].settings(), "parameters' plan": plans[1].settings()}
        settings |= {} if found is None else {"gradients": str(found), "parameters by auto": by_auto[1]}
    agree_on_all(settings, [group], device, refusal)
    assert plans is not None
    if not sharded:
        engine.commpress = attach_replicas(engine, plans[0], found, names, optimizer, verify)
    else:
        holds = str(settings["parameters"])
        engine.commpress = _shard(engine, stage, plans, by_auto, names, optimizer, momentum, holds, verify)
    if optimizer is None:
        _advise(engine, speaks(group))
    return engine.commpress  # type: ignore[no-any-return]


def _advise(engine: Any, speaks: bool) -> None:
    """Warn of a spec that costs the loss under the optimizer that the engine steps with."""
    codec = engine.commpress.collectives[0].gradients.codec
    stepped = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    stepped = stepped or engine.optimizer.fp32_partitioned_groups_flat
    buffer = engine.commpress.step_buffer
    for one in {codec} if buffer is None or buffer.rules is None else buffer.rules.lossy:
        advise(one, set(stepped), speaks)


def _shard(
    engine: Any,
    stage: int,
    plans: tuple[Plan, Plan],
    by_auto: tuple[bool, bool],
    names: dict[Any, str],
    optimizer: CompressedOptimizer | None,
    momentum: Momentum | None,
    holds: str,
    verify: int,
) -> Session:
    shards = Collectives(engine.seq_data_parallel_group, torch.device(engine.device), *plans, verify=verify)
    auto = None
    if by_auto[0]:
        dtypes = {engine.communication_data_type, *(p.dtype for p in names)}
        auto = ShardedAuto([shards], [shards], plans[0].error_feedback, by_auto[1], dtypes)
    held: Gathered | Partitions
    if stage == 3:
        held = attach_gathered(engine, shards, names, auto)
    else:
        assert optimizer is None or isinstance(optimizer, OneBitAdamW | EF21Muon)
        held = attach_partitions(engine, shards, names, optimizer, None if momentum is None else momentum.codec, auto)
        if momentum is not None and momentum.spec == AUTO:
            auto = ShardedAuto([shards], [shards], True, moves=held.muon)
    if auto is not None:
        follow_steps(engine, auto)
    sent = None if momentum is None else momentum.spec
    values, settings = sum(_numel(p) for p in names), sharded_settings(*plans, holds, by_auto, sent)
    return Session(
        shards,
        spec=sharded_spec(*plans, by_auto, sent),
        settings=settings,
        auto=auto,
        masks=lambda masks: [held.mask_index(masks)],
        values=values,
        holding=held.holding(),
    )


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Call `deepspeed.initialize` for a config with a `commpress` block; `engine.commpress` is the session.

        {"train_micro_batch_size_per_gpu": 8, "commpress": {"gradients": "int4", "parameters": "int8"}, ...}

    The block's keys are arguments of `attach`; `gradients` is a spec or an object of specs, by default `auto`. `"optimizer":
    {"type": "OneBitAdamW", "params": {...}}` makes an optimizer of `commpress.optim`; the types ZeroOneAdamW and DGC do, too.
    Arguments and results are those of `deepspeed.initialize`. Without a block nothing is compressed. Raises ValueError for an
    unknown key and for the optimizers that DeepSpeed no longer has, and everything that `attach` raises.
    """
    try:
        import deepspeed
        from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
    except ModuleNotFoundError as error:
        raise extras.missing("commpress.hooks.deepspeed", error, "deepspeed") from error
    given = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    config = dict(load_ds_config(_pop_config(given)))
    block = config.pop("commpress", None)
    if block is not None:
        _check_block(block)
    _use_our_optimizer(config, given)
    engine, *others = deepspeed.initialize(**given, config=config)
    if block is not None:
        attach(engine, **block)
    return engine, *others


def _pop_config(given: dict[str, Any]) -> Any:
    """Remove the config from the arguments and return it: a path, a dict or None."""
    for key in ("config", "config_params"):
        if (source := given.pop(key, None)) is not None:
            return source
    script: Any = copy.copy(given.get("args"))
    if (source := getattr(script, "deepspeed_config", None)) is not None:
        script.deepspeed_config, given["args"] = None, script
    return source


def _use_our_optimizer(config: dict[str, Any], given: dict[str, Any]) -> None:
    """Have DeepSpeed make the optimizer that the config names, if it is one of `commpress.optim`."""
    settings, chosen = config.get("optimizer") or {}, given.get("optimizer")
    name = type(chosen).__name__ if isinstance(chosen, CompressedOptimizer) else settings.get("type")
    if chosen is None and name in GONE:
        raise ValueError(
            f"optimizer type {name!r}: DeepSpeed dropped it in 0.19.7; expected "
            f'{{"type": "{GONE[name]}", "params": {{..., "warmup_steps": what freeze_step was}}}}'
        )
    if chosen is None and name in OPTIMIZERS:
        given["optimizer"] = partial(_make_optimizer, name, settings.get("params", {}))
        del config["optimizer"]
    elif not isinstance(chosen, CompressedOptimizer):
        return
    config.setdefault("zero_allow_untested_optimizer", True)
    if (config.get("bf16") or {}).get("enabled") and not (config.get("zero_optimization") or {}).get("stage"):
        raise ValueError(
            f"{name} under ZeRO 0 with bf16: DeepSpeed steps copies of the parameters, and steps them before attach can see "
            "them; expected float32, or ZeRO 1 or 2"
        )


def _check_block(block: Any) -> None:
    if not isinstance(block, dict):
        raise ValueError(f'the "commpress" block is {block!r}, expected an object with some of {", ".join(KEYS)}')
    for key in block:
        if key not in KEYS:
            raise ValueError(f'unknown key {key!r} in the "commpress" block, known: {", ".join(KEYS)}')


def _make_optimizer(name: str, settings: dict[str, Any], parameters: Any) -> CompressedOptimizer:
    try:
        return OPTIMIZERS[name](parameters, **settings)
    except TypeError as error:
        raise ValueError(f"optimizer type {name!r}: {error}") from error


# --- what is supported -------------------------------------------------------------------------------------------


def _plans(
    stage: int,
    sharded: bool,
    gradients: str | Codec,
    parameters: str | Codec | None,
    exchange: str | None,
    error_feedback: bool,
    optimizer: CompressedOptimizer | None,
) -> tuple[Plan, Plan]:
    """Return the plans of gradients and of parameters. Raises ValueError or TypeError for a spec that is not supported."""
    plan = Plan.of(gradients, exchange, error_feedback)
    if sharded:
        require_flat(plan.codec, SHARDED)
    if not sharded and parameters is not None:
        who = f"{type(optimizer).__name__} under ZeRO {stage}" if stage else "ZeRO 0"
        raise ValueError(f"parameters {str(parameters)!r}: {who} sends no parameters; leave it out")
    try:
        other = Plan.of_parameters("none" if parameters is None else parameters)
        require_flat(other.codec, SHARDED)
    except (ValueError, TypeError) as error:
        raise type(error)(f"parameters: {error}") from None
    if other.delta:
        raise ValueError(
            f"parameters: {other.spec}: ZeRO 1 and 2 send changes already, ZeRO 3 does not; expected "
            f"{other.codec}, or FSDP2"
        )
    if stage == 3 and other.codec.sparse:
        raise ValueError(
            f"parameters: {other.codec} would make most of them 0; expected none, or a codec that sends all values"
        )
    return plan, other


def _numel(p: Any) -> int:
    """Return how many values the whole parameter has, also if it is partitioned."""
    return int(getattr(p, "ds_numel", p.numel()))
