"""DeepSpeed's JSON with a `commpress` block, and what is said where something does not fit."""

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from engines import RANKS, config, engine, fresh, same_on_all_ranks, train, weights
from ranks import outcome, run
from torch import nn
from training import network, same

from commpress.hooks.deepspeed import attach, initialize
from commpress.kernels import table
from commpress.optim import OneBitAdamW

LIBRARIES = ("engines",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")

BLOCK = {"gradients": "int4", "parameters": "int8"}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}

# --- the block ---------------------------------------------------------------------------------------------------


def by_config(folder: str) -> list[Any]:
    """The same training by attach, and by a block in a dict, a file, and a file that the script's arguments name."""
    settings = config(1, **ADAMW, commpress=BLOCK)
    path = Path(folder) / f"{dist.get_rank()}.json"
    path.write_text(json.dumps(settings))
    fresh()
    arguments = argparse.Namespace(deepspeed_config=str(path), local_rank=dist.get_rank())
    ways: list[dict[str, Any]] = [{"config": settings}, {"config": str(path)}, {"args": arguments}]
    engines = [initialize(model=network(), **way)[0] for way in ways]
    first = deepspeed.initialize(model=network(), config=config(1, **ADAMW))[0]
    attach(first, "int4", parameters="int8")
    for e in (first, *engines):
        train(e, range(5))
    plain, *nothing = initialize(None, network(), config=config(1, **ADAMW))
    return [
        [same(weights(first), weights(e)) for e in engines],
        [e.commpress.report().ratio > 4.5 for e in engines],
        [e.commpress.step_buffer is None for e in engines],
        "commpress" in settings and arguments.deepspeed_config == str(path),
        getattr(plain, "commpress", None),
        len(nothing),
    ]


def test_a_block_in_the_config_is_attach(tmp_path: Path) -> None:
    for equal, saved, sessions, kept, plain, others in run(RANKS, by_config, str(tmp_path), timeout=120):
        assert equal == saved == sessions == [True] * 3
        assert kept, "the caller's config has changed"
        assert plain is None
        assert others == 3


def optimizer_by_config() -> list[Any]:
    """OneBitAdamW under ZeRO 2, by nothing but a config."""
    made = {"type": "OneBitAdamW", "params": {"lr": 1e-2, "warmup_steps": 5, "warmup_spec": "int4"}}
    settings = config(2, optimizer=made, commpress={"gradients": "sign"})
    del settings["zero_allow_untested_optimizer"]
    fresh()
    e = initialize(model=network(), config=settings)[0]
    train(e, range(12))
    optimizer = e.basic_optimizer
    return [type(optimizer).__name__, optimizer.frozen, same_on_all_ranks(weights(e))]


def test_an_optimizer_in_the_config_is_ours() -> None:
    assert all(found == ["OneBitAdamW", True, True] for found in run(RANKS, optimizer_by_config))


def without_gradients() -> list[str]:
    """The traffic's name of a block that has no `gradients`, at a stage of replicas and at one of shards."""
    fresh()
    engines = [
        initialize(model=network(), config=config(stage, **ADAMW, commpress=block))[0]
        for stage, block in ((0, {}), (2, {"parameters": "auto"}))
    ]
    for e in engines:
        train(e, range(2))
    return [e.commpress.report().spec for e in engines]


def test_a_block_without_gradients_means_auto() -> None:
    for specs in run(RANKS, without_gradients):
        assert specs == ["auto: none, still looking"] * 2


def bad_configs() -> list[str]:
    """What is said about blocks and optimizers that nobody knows."""
    fresh()
    made = [
        {"commpress": {"gradient": "int4"}},
        {"commpress": "int4"},
        {"commpress": {"gradients": "int5"}},
        {"commpress": {"gradients": "int4", "parameters": "topk"}},
        {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 100}}},
        {"optimizer": {"type": "OneBitAdamW", "params": {"freeze_step": 100}}, "commpress": BLOCK},
    ]
    return [outcome(lambda m=m: initialize(model=network(), config={**config(1, **ADAMW), **m})) for m in made]


def test_bad_configs_say_what_is_wrong() -> None:
    of_ranks = run(RANKS, bad_configs)
    key, kind, spec, other, gone, setting = of_ranks[0]
    assert key.startswith("ValueError: unknown key 'gradient' in the \"commpress\" block, known: gradients, parameters")
    assert "the \"commpress\" block is 'int4', expected an object" in kind
    assert "int5" in spec
    assert "parameters: " in other
    assert "optimizer type 'OneBitAdam': DeepSpeed dropped it in 0.19.7" in gone
    assert '"type": "OneBitAdamW"' in gone
    assert "optimizer type 'OneBitAdamW'" in setting
    assert "freeze_step" in setting
    assert all(said == of_ranks[0] for said in of_ranks)


RULES = {"*.bias": "none", "0.*": "int8", "*": "int4"}


def by_patterns() -> list[Any]:
    """Patterns in a block and by attach, beside one spec; then `auto`, and a pattern in a block that fits nothing."""
    settings = config(0, **ADAMW, commpress={"gradients": RULES})
    fresh()
    block, wrong = (initialize(model=network(), config=settings)[0], {"*.wieght": "int8", "*": "int4"})
    given, plain, searching = (engine(0) for _ in range(3))
    attach(given, {**RULES, "*": "none"})
    attach(plain, "none")
    attach(searching, {"*.bias": "none", "*": "auto"})
    for e in (block, given, plain):
        train(e, range(5))
    train(searching, range(40))
    return [
        block.commpress.report().to_dict(),
        same_on_all_ranks(weights(block)),
        same(weights(given), weights(plain)),
        searching.commpress.report().spec,
        same_on_all_ranks(weights(searching)),
        outcome(lambda: initialize(model=network(), config={**settings, "commpress": {"gradients": wrong}})),
    ]


def test_zero_0_takes_specs_by_pattern() -> None:
    for report, alike, plain, spec, also_alike, wrong in run(RANKS, by_patterns, timeout=120):
        assert alike
        assert also_alike
        assert not plain  # the first layer is coded
        assert list(report["rules"]) == ["*.bias: none", "0.*: int8", "*: int4"]
        assert [sums["values"] for sums in report["rules"].values()] == [138, 2048, 4736]
        assert [round(sums["ratio"]) for sums in report["rules"].values()] == [1, 4, 8]
        assert spec.startswith("*.bias: none, *: auto; auto: ")
        assert "gradients, '*.wieght': decides for none of 6 parameters, as '0.weight'" in wrong


FALLING = "topk(0.5->0.02, 5)|int4"


def by_falling_ratio() -> list[Any]:
    """A ratio that warms up, in a block; the first steps' report; and where it cannot be."""
    fresh()
    falling, _ = initialize(model=network(), config=config(0, **ADAMW, commpress={"gradients": FALLING}))[:2]
    train(falling, range(7))
    one_bit = engine(0, optimizer=lambda p: OneBitAdamW(p, warmup_steps=3))
    return [
        falling.commpress.report().to_dict(),
        same_on_all_ranks(weights(falling)),
        *(outcome(lambda stage=stage: attach(engine(stage), FALLING)) for stage in (1, 2, 3)),
        outcome(lambda: attach(one_bit, FALLING)),
        outcome(lambda: attach(engine(2), "int4", parameters=FALLING)),
    ]


def test_zero_0_takes_a_ratio_that_warms_up() -> None:
    for report, alike, *stages, behind, of_parameters in run(RANKS, by_falling_ratio, timeout=120):
        assert alike
        steps = {row["spec"]: row["steps"] for row in report["rows"]}
        ratios = ("0.5", "0.263", "0.138", "0.0725", "0.0381")
        assert steps == {**{f"topk({ratio})|int4": 1 for ratio in ratios}, "topk(0.02)|int4": 2}
        for stage, sentence in zip((1, 2, 3), stages, strict=True):
            assert f"gradients: {FALLING}: a ratio warms up only at ZeRO 0, and this is ZeRO {stage}" in sentence
        assert f"{FALLING}: OneBitAdamW does not send gradients as they are" in behind
        assert "expected one ratio here, as in topk(0.01)" in of_parameters


def patterns_elsewhere() -> list[str]:
    one_bit = engine(0, optimizer=lambda p: OneBitAdamW(p, warmup_steps=3))
    me = dist.get_rank()
    return [
        *(outcome(lambda stage=stage: attach(engine(stage), RULES)) for stage in (1, 2, 3)),
        outcome(lambda: attach(engine(2), "int4", parameters="auto")),
        outcome(lambda: attach(one_bit, RULES)),
        outcome(lambda: attach(engine(0), RULES, exchange="two_shot")),
        outcome(lambda: attach(engine(0), {**RULES, "*": "int4" if me else "int8"})),
        outcome(lambda: attach(engine(0), "auto(error=0)")),
    ]


def test_patterns_that_cannot_be_are_refused_on_all_ranks() -> None:
    for said in run(RANKS, patterns_elsewhere, timeout=120):
        for stage, sentence in zip((1, 2, 3), said, strict=False):
            assert sentence.startswith(
                f"ValueError: gradients: patterns work only at ZeRO 0; ZeRO {stage} sends each part"
            )
        assert "parameters: auto beside gradients by int4: one search decides for both" in said[3]
        assert "OneBitAdamW needs one spec of the gradients" in said[4]
        assert "with patterns each codec uses its own" in said[5]
        assert "all ranks must use the same gradients" in said[6]
        assert "expected an error above 0" in said[7]


# --- engines that do not fit -------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """An embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)


class Complex(nn.Module):
    """A complex parameter: under ZeRO 1 and 2 DeepSpeed drops its imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.ones(300, dtype=torch.complex64))


def unsupported() -> list[str]:
    """What attach says to them."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    twice = engine(0)
    attach(twice, "int4")
    wide = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    said = [
        outcome(lambda: attach(network(), "int4")),
        outcome(lambda: attach(twice, "int4")),
        outcome(lambda: attach(engine(1), "int4", exchange="two_shot")),
        outcome(lambda: attach(engine(0), "int4", parameters="int8")),
        outcome(lambda: attach(engine(3), "int4", parameters="topk(0.1)")),
        outcome(lambda: attach(engine(0), "int4", exchange="three_shot")),
        outcome(lambda: attach(engine(2, offload, zero_force_ds_cpu_optimizer=False), "int4")),
        outcome(lambda: attach(engine(1, **wide), "int4")),
        outcome(lambda: attach(engine(0, model=Sparse), "int4")),
        outcome(lambda: attach(engine(0, gradient_allreduce_op="sum"), "int4")),
        outcome(lambda: attach(engine(0, model=Complex), "int4")),
        outcome(lambda: attach(engine(2, model=Complex), "int4")),
    ]
    real, deepspeed.__version__ = deepspeed.__version__, "0.20.1"
    try:
        said.append(outcome(lambda: attach(engine(1), "int4")))
        deepspeed.__version__ = "0.19.7"
        said.append(outcome(lambda: attach(engine(1), "int4")))
    finally:
        deepspeed.__version__ = real
    return said


def test_what_is_not_supported_is_refused() -> None:
    of_ranks = run(RANKS, unsupported, timeout=120)
    expected = (
        "TypeError: expected a deepspeed.DeepSpeedEngine, got Sequential",
        "RuntimeError: commpress.attach: attached already",
        "ValueError: exchange 'two_shot': ZeRO 1 sends each part of a gradient to its owner only",
        "ValueError: parameters 'int8': ZeRO 0 sends no parameters",
        "ValueError: parameters: topk(0.1) would make most of them 0",
        "ValueError: unknown exchange 'three_shot'",
        "ValueError: commpress.attach: offload of the optimizer or of parameters is not supported",
        "ValueError: commpress.attach: bf16 with float32 gradient accumulation under ZeRO 1 (ZeRO 2 is) is not supported",
        "TypeError: table: Embedding(sparse=True) has sparse gradients",
        "ValueError: commpress.attach: gradient_allreduce_op other than mean is not supported",
        "ValueError: parameter 'waves' is complex64: DeepSpeed steps real parts alone",
        "ValueError: parameter 'waves' is complex64: DeepSpeed steps real parts alone",
        "RuntimeError: commpress.hooks.deepspeed: found DeepSpeed 0.20.1, expected 0.19.8 or a later 0.19.x",
        "RuntimeError: commpress.hooks.deepspeed: found DeepSpeed 0.19.7, expected 0.19.8",
    )
    for said in of_ranks:
        for message, start in zip(said, expected, strict=True):
            assert message.startswith(start), message


def disagreeing() -> list[str]:
    """Each rank wants something else."""
    rank = dist.get_rank()
    wishes: list[dict[str, Any]] = [
        {"gradients": "int4" if rank else "int8"},
        {"gradients": "int4", "parameters": "sign" if rank else "int8"},
        {"gradients": "int4", "error_feedback": rank != 1},
        {"gradients": "int4" if rank else "int5"},
    ]
    found = [outcome(lambda w=w: attach(engine(1), **w)) for w in wishes]
    one_bit = engine(1, optimizer=lambda p: OneBitAdamW(p, warmup_steps=3))
    return [*found, outcome(lambda: attach(one_bit, "sign", parameters="none" if rank else None))]


def test_ranks_that_differ_all_raise() -> None:
    for spec, parameters, feedback, unknown, sharded in run(RANKS, disagreeing, timeout=120):
        assert "int8" in spec
        assert "int4" in spec
        assert "all ranks must use the same gradients' plan" in spec
        assert "all ranks must use the same parameters' plan" in parameters
        assert "rank 1 has gradients' plan" in feedback
        assert "int5" in unknown
        assert "all ranks must use the same sharded" in sharded


# --- faults ------------------------------------------------------------------------------------------------------


def raising(*_: Any) -> None:
    """A loop that does not work."""
    raise ArithmeticError("the kernel is broken")


def failing(stage: int) -> str:
    """The codec of rank 1 breaks in the third step."""
    e = engine(stage, {"reduce_bucket_size": 3000})
    attach(e, "int4")
    train(e, range(2))
    sound = table.KERNELS["encode", "int4", "cpu"]
    if dist.get_rank() == 1:
        table.KERNELS["encode", "int4", "cpu"] = table.Kernel(raising)
    try:
        return outcome(lambda: train(e, range(2, 4)))
    finally:
        table.KERNELS["encode", "int4", "cpu"] = sound


@pytest.mark.parametrize("stage", [0, 2])
def test_a_broken_codec_ends_backward_on_all_ranks(stage: int) -> None:
    for said in run(RANKS, failing, stage):
        assert "the gradient exchange failed on rank 1: ArithmeticError: the kernel is broken" in said


# --- one rank ----------------------------------------------------------------------------------------------------


def alone() -> list[tuple[bool, bool, set[str]]]:
    """A single rank; not ZeRO 3, of which the other ranks of later tests would know nothing."""
    found = []
    for stage in range(3):
        plain, coded = engine(stage), engine(stage)
        session = attach(coded, "int4", **({"parameters": "int8"} if stage else {}))
        for e in (plain, coded):
            train(e, range(5))
        report = session.report()
        found.append(
            (same(weights(plain), weights(coded)), report.sent_bytes == 0, {row.reason for row in report.rows})
        )
    return found


def test_one_rank_has_nothing_to_send() -> None:
    for bits, silent, reasons in run(1, alone)[0]:
        assert bits
        assert silent
        assert reasons == {"one rank: nothing to send"}
