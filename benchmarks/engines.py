"""Bytes and seconds of DeepSpeed engines, with and without compression, by ZeRO stage.

    python -m commpress.launch.lab 2 1gbit -- python benchmarks/engines.py [--rounds 5] [--loss STEPS]

Each way trains alone, one after another: engines of several stages do not live in one process for long. With `--loss` a GPT
of 0.9 M parameters trains for so many steps instead, and the held-out loss of two seeds is shown. `pip install '.[deepspeed]'`.
"""

import argparse
import contextlib
import gc
import logging
import statistics
import time
import warnings
from typing import Any

import convergence
import convergence_tasks
import deepspeed
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from commpress.hooks.deepspeed import attach
from commpress.launch import data
from commpress.launch.lab import sent_by_kernel
from commpress.launch.model import GPT, Shape
from commpress.optim import OneBitAdamW, ZeroOneAdamW

LARGE, BATCH, WARM_UP = Shape(layers=5, width=528, heads=8, context=64), 2, 4
LOSS_RATE, LOSS_BATCH, SEEDS = 1.5e-3, 4, (0, 1)
HELD_OUT = 128
"""Windows of text in a validation."""
ONE_BIT, SHARDED, ZERO_ONE = "OneBitAdamW sign", "OneBitAdamW sign, parameters int4", "ZeroOneAdamW sign, every 4"
WAYS: tuple[tuple[int, str, dict[str, Any] | None], ...] = (
    (0, "DeepSpeed", None),
    (0, "int4", {"spec": "int4"}),
    (0, ONE_BIT, {"spec": "sign"}),
    (0, ZERO_ONE, {"spec": "sign"}),
    (2, "DeepSpeed", None),
    (2, "int4, parameters none", {"spec": "int4"}),
    (2, "int4, parameters int4", {"spec": "int4", "parameters": "int4"}),
    (2, "int4, parameters sign", {"spec": "int4", "parameters": "sign"}),
    (2, ONE_BIT, {"spec": "sign"}),
    (2, SHARDED, {"spec": "sign", "parameters": "int4"}),
    (2, ZERO_ONE, {"spec": "sign"}),
    (3, "DeepSpeed", None),
    (3, "int4, parameters int8", {"spec": "int4", "parameters": "int8"}),
)


def made(stage: int, name: str, attached: dict[str, Any] | None, shape: Shape, warm_up: int, batch: int) -> Any:
    """An engine, and its session if it has one."""
    model = GPT(shape)
    settings: dict[str, Any] = {"lr": LOSS_RATE, "betas": convergence.BETAS, "weight_decay": convergence.DECAY}
    if name in (ONE_BIT, SHARDED, ZERO_ONE):
        kind = ZeroOneAdamW if name == ZERO_ONE else OneBitAdamW
        optimizer: Any = kind(model.parameters(), warmup_steps=warm_up, warmup_spec="int4", **settings)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": convergence.CLIP,
        "steps_per_print": 1 << 30,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine, None if attached is None else attach(engine, **attached)


def step(engine: Any, text: data.Text, windows: torch.Generator, batch: int) -> None:
    """One training step."""
    x, y = data.sample(text.train, batch, LARGE.context, windows)
    engine.backward(cross_entropy(engine(x).flatten(0, 1), y.flatten()))
    engine.step()


def timed(way: tuple[int, str, dict[str, Any] | None], text: data.Text, rounds: int) -> tuple[str, ...]:
    """Median seconds and MB a step, after any warm-up of the optimizer; with local steps a mean over all of an interval."""
    torch.manual_seed(0)
    engine, session = made(*way, LARGE, WARM_UP // 2, BATCH)
    windows = data.generator(0, dist.get_rank())
    for _ in range(WARM_UP):
        step(engine, text, windows, BATCH)
    seconds = []
    dist.barrier()
    kernel, sent = sent_by_kernel(), session.report().sent_bytes if session else 0
    for _ in range(rounds):
        start = time.perf_counter()
        step(engine, text, windows, BATCH)
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    kernel = sent_by_kernel() - kernel
    reported = f"{(session.report().sent_bytes - sent) / rounds / 1e6:.2f}" if session else ""
    middle = statistics.mean if way[1] == ZERO_ONE else statistics.median
    return f"{middle(seconds):.3f}", f"{kernel / rounds / 1e6:.2f}", reported


def learned(way: tuple[int, str, dict[str, Any] | None], text: data.Text, steps: int) -> tuple[str, ...]:
    """Held-out losses of both seeds."""
    starts = data.validation_starts(text.validation, HELD_OUT, LARGE.context)
    x, y = data.windows(text.validation, starts, LARGE.context)
    losses = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        engine, _ = made(*way, convergence_tasks.SHAPE, round(convergence.WARM_UP * steps), LOSS_BATCH)
        windows = data.generator(seed, dist.get_rank())
        for done in range(steps):
            for group in engine.basic_optimizer.param_groups:
                group["lr"] = LOSS_RATE * convergence.share(done, steps)
            step(engine, text, windows, LOSS_BATCH)
        synced = getattr(engine.basic_optimizer, "synced", contextlib.nullcontext)
        with torch.no_grad(), synced():  # replicas drift apart in local steps
            losses.append(f"{float(cross_entropy(engine(x).flatten(0, 1), y.flatten())):.3f}")
        del engine
        gc.collect()
    return tuple(losses)


def main() -> None:
    """Run all ways and print the table on rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="steps of each way, rounded up to four")
    options.add_argument("--loss", type=int, metavar="STEPS", help="train, and show losses")
    chosen = options.parse_args()
    for name, value in vars(chosen).items():
        if value is not None and value < 1:
            options.error(f"--{name} {value}: expected at least 1")
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; it would be compiled
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    text = data.load(None)
    columns = ("seed 0", "seed 1") if chosen.loss else ("seconds a step", "MB by kernel", "MB by report")
    table = Table(title=f"{dist.get_world_size()} ranks, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}")
    for column in ("ZeRO", "", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for way in WAYS:
        figures = learned(way, text, chosen.loss) if chosen.loss else timed(way, text, -(-chosen.rounds // 4) * 4)
        gc.collect()
        table.add_row(str(way[0]), way[1], *figures)
    if dist.get_rank() == 0:
        Console(width=120).print(table)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
