"""Imports and compiled loops of the process that ranks are forked from; it must not start a thread."""

import gc
import importlib
import os

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo  # DDP and the optimizers import it at their first step
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.parallel

import commpress
import commpress.hooks
import commpress.launch.cli
import commpress.launch.train
import commpress.model
from commpress.comm.coding import warm_up
from commpress.optim import loops

SPECS = (
    "bf16",
    "fp16",
    "fp8",
    "fp8(e5m2)",
    "int8",
    "int4",
    "int8(stochastic)",
    "int4(stochastic)",
    "int2",
    "sign",
    "topk(0.1)",
    "topk(0.1)|int4",
    "topk(0.1)|sign",
    "randomk(0.1)",
    "rotate|int4",
    "powersgd(2)",
)
"""The codecs whose loops every rank finds compiled."""

torch.set_num_threads(1)  # before the first operator: a thread pool would not be there after a fork
for name in ("ddp", "fsdp", "outer", "broadcast"):
    importlib.import_module(f"commpress.hooks.{name}")
order = int(os.environ.get("WARM_ORDER", "1"))  # of two processes one begins at the end, so that they share the work
for spec in SPECS[::order]:
    for dtype in (torch.float32, torch.bfloat16):
        warm_up(commpress.parse(spec), torch.device("cpu"), dtype, prologue=True)
loops.warm_up(torch.device("cpu"))
if len(os.listdir("/proc/self/task")) > 1:
    raise RuntimeError("a thread has been started: it would not be there in the ranks, whose locks it may hold")
gc.freeze()  # the collector would write to every page that the ranks share
