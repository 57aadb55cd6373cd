"""Checks of a DeepSpeed engine, an optimizer and a spec: each returns the error if they cannot be attached."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from commpress import extras
from commpress.comm.meter import dtype_name
from commpress.comm.ratio_warmup import ratio_warmup
from commpress.comm.rules import Spec, is_open, open_refusal
from commpress.hooks.parameters import bare_parameters
from commpress.optim import CompressedOptimizer, EF21Muon, OneBitAdamW

TESTED = "0.19.8"
"""The version of DeepSpeed that the tests run with; later ones of the same 0.19 line are accepted, too."""


def require_deepspeed(engine: Any) -> None:
    """Raise RuntimeError for a DeepSpeed older than `TESTED` or of another line, TypeError if `engine` is not an engine."""
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise extras.missing("commpress.hooks.deepspeed", error, "deepspeed") from error

    found, expected = _version(deepspeed.__version__), _version(TESTED)
    if found[:2] != expected[:2] or found < expected:
        raise RuntimeError(
            f"commpress.hooks.deepspeed: found DeepSpeed {deepspeed.__version__}, expected {TESTED} or a later "
            f"{expected[0]}.{expected[1]}.x: it replaces private methods, which other versions have elsewhere"
        )
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise TypeError(f"expected a deepspeed.DeepSpeedEngine, got {type(engine).__name__}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:3])


def attach_refusal(
    engine: Any, stage: int, sharded: bool, optimizer: CompressedOptimizer | None, exchange: str | None
) -> Exception | None:
    """Return the error if this rank cannot attach, else None."""
    if getattr(engine, "commpress", None) is not None:
        return RuntimeError("commpress.attach: attached already; expected an engine without a session")
    kind = type(engine.optimizer).__name__
    scalers = (engine.torch_autocast_z0_gradscaler, getattr(engine.optimizer, "torch_autocast_gradscaler", None))
    quantised = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    unsupported = {
        "an engine without an optimizer": engine.basic_optimizer is None,
        "pipeline parallelism": engine.pipeline_parallelism,
        "mixture of experts": engine.has_moe_layers,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "DeepCompile": engine.is_deepcompile_enabled(),
        "ZenFlow": bool(engine.zenflow),
        "DeepSpeed's Muon (commpress.optim.EF21Muon is)": "muon" in type(engine.basic_optimizer).__name__.lower()
        and not isinstance(engine.basic_optimizer, CompressedOptimizer),
        "offload of the optimizer or of parameters": _offloads(engine.zero_offload_optimizer())
        or _offloads(engine.zero_offload_param()),
        "fp16 (feedback would have to follow its loss scale; bf16 has none)": engine.fp16_enabled()
        or any(scaler is not None for scaler in scalers),
        "bf16 with float32 gradient accumulation under ZeRO 1 (ZeRO 2 is)": kind == "BF16_Optimizer",
        "gradient_allreduce_op other than mean": not engine.gradient_average,
        "zero_hpz_partition_size above 1": stage == 3 and engine.zero_hpz_partition_size() > 1,
        **{name: stage == 3 and getattr(engine, name)() for name in quantised},
    }
    for what, found in unsupported.items():
        if found:
            return ValueError(f"commpress.attach: {what} is not supported")
    for name, module in engine.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            return TypeError(
                f"{name}: {type(module).__name__}(sparse=True) has sparse gradients, expected sparse=False"
            )
    for name, p in bare_parameters(engine.module).items():
        if p.is_complex() and p.requires_grad:
            return ValueError(
                f"parameter {name!r} is {dtype_name(p.dtype)}: DeepSpeed steps real parts alone, expected real parameters, or "
                "DistributedDataParallel"
            )
    if exchange is not None and sharded:
        return ValueError(
            f"exchange {exchange!r}: ZeRO {stage} sends each part of a gradient to its owner only; leave it out"
        )
    return None if optimizer is None else _optimizer_refusal(engine, stage, sharded, optimizer)


def gradients_refusal(
    gradients: Spec,
    stage: int,
    sharded: bool,
    optimizer: CompressedOptimizer | None,
    exchange: str | None,
    error_feedback: bool,
) -> Exception | None:
    """Return the error if `gradients` is `auto`, a dict of patterns or a ratio that warms up, and cannot be so here."""
    if stage and isinstance(gradients, Mapping):
        return ValueError(
            f"gradients: patterns work only at ZeRO 0; ZeRO {stage} sends each part of all gradients to its owner in one "
            "piece: "
            'expected one spec, such as "int4", or "auto"'
        )
    refusal = open_refusal(gradients, optimizer, exchange, error_feedback)
    if refusal is None and stage and (warmup := ratio_warmup(gradients)) is not None:
        return ValueError(
            f"gradients: {warmup}: a ratio warms up only at ZeRO 0, and this is ZeRO {stage}; expected one ratio, such as "
            f"{warmup.codec}"
        )
    if refusal is None and sharded and isinstance(optimizer, OneBitAdamW) and is_open(gradients):
        return TypeError(
            f"commpress.attach: {type(optimizer).__name__} needs one spec of the gradients where it is sharded, as in "
            'attach(engine, "sign", parameters="int4"), got auto; without parameters= auto chooses its specs'
        )
    return refusal


def _offloads(settings: Any) -> bool:
    return settings is not None and str(getattr(settings.device, "value", settings.device)) != "none"


def _optimizer_refusal(engine: Any, stage: int, sharded: bool, optimizer: Any) -> Exception | None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, CompressedOptimizer):
        return TypeError(
            f"optimizer: expected one of commpress.optim, got {name}; others use p.grad as it is, leave optimizer= out for them"
        )
    if optimizer is not engine.basic_optimizer:
        return ValueError(
            f"optimizer: the engine steps another {type(engine.basic_optimizer).__name__}, not this {name}"
        )
    if stage == 3:
        return ValueError(
            f"{name} under ZeRO 3: expected ZeRO 0, 1 or 2; parameters that ZeRO 3 gathers and frees have no place for its "
            "state"
        )
    if stage > 0 and not sharded and engine.bfloat16_enabled():
        return ValueError(
            f"{name} under ZeRO {stage} with bf16: every rank steps all parameters, but DeepSpeed gives it only a part of "
            "them in float32; expected a float32 model, or OneBitAdamW with parameters='int4' or so, which is sharded"
        )
    if stage > 0 and (not sharded or isinstance(optimizer, EF21Muon)) and engine.zero_elastic_checkpoint():
        return ValueError(f"{name} under ZeRO {stage}: elastic_checkpoint would save a part of its state; leave it out")
    if sharded and isinstance(optimizer, OneBitAdamW) and optimizer.awaits_freezing():
        return ValueError(
            f"variance_from under ZeRO {stage} with parameters=: each rank steps a part of the parameters as one tensor, which "
            "has no such state; expected warmup_steps, or attach without parameters=, as under ZeRO 0"
        )
    if sharded and isinstance(optimizer, OneBitAdamW) and optimizer.param_groups[0]["max_norm"] is not None:
        return ValueError(
            f"max_norm {optimizer.param_groups[0]['max_norm']} under ZeRO {stage}: each bucket leaves before the others are "
            "known; expected None. DeepSpeed's gradient_clipping clips in the warm-up"
        )
    return None
