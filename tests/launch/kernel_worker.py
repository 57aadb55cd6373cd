"""Started in a lab: some steps of each way to spread a model, and what the kernel counted of them beside the report.

Prints a line of JSON on each rank: {way: [bytes by the report, bytes by the kernel]}.
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

import commpress
from commpress.launch import lab, strategies
from commpress.launch.model import GPT, Shape

STEPS = 4


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def local(model: GPT) -> strategies.Strategy:
    return strategies.Local(model, sgd(model), "diloco", "int8", {"every": 2, "fragments": 2})


STRATEGIES: dict[str, Callable[[GPT], strategies.Strategy]] = {
    "ddp": lambda model: strategies.Replicated(model, sgd(model), "int4"),
    "fsdp": lambda model: strategies.Sharded(model, sgd, "int4", "int8"),
    "diloco": local,
}


def counted(action: Callable[[], object]) -> int:
    """What this host's kernel sends while all ranks do it."""
    dist.barrier()
    before = lab.sent_by_kernel()
    action()
    time.sleep(0.2)  # until the last packets have left
    dist.barrier()
    return lab.sent_by_kernel() - before


def steps(spread: strategies.Strategy) -> None:
    tokens = torch.arange(64).view(2, 32)
    for _ in range(STEPS):
        spread.model(tokens).float().square().mean().backward()
        spread.optimizer.step()
        spread.optimizer.zero_grad()


dist.init_process_group("gloo")
torch.set_num_threads(1)
found = {}
for name, make in STRATEGIES.items():
    spread = make(GPT(Shape(3, 192, 4, 32)))
    kernel = counted(partial(steps, spread))
    found[name] = [spread.session.report().sent_bytes, kernel]
model = GPT(Shape(3, 192, 4, 32))
reports = []
kernel = counted(lambda: reports.extend(commpress.broadcast_parameters(model, "int8") for _ in range(3)))
found["broadcast"] = [reports[-1].sent_bytes, kernel]
os.write(1, f"{json.dumps(found)}\n".encode())  # one write a rank: all have one pipe
dist.destroy_process_group()
