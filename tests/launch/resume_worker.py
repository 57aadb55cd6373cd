"""Started by torchrun: each spec is trained without a break, and again with a break and --resume.

argv: folder, and PARALLEL:OPTIMIZER:SPEC...
"""

import signal
import sys
from pathlib import Path

import torch.distributed as dist

from commpress.launch import data, train

TINY = {"layers": 2, "width": 64, "heads": 2, "context": 32, "batch": 4, "steps": 30, "lr": 5e-3}
EVALS = {"warmup_steps": 4, "eval_every": 10, "eval_batches": 4, "checkpoint_every": 7, "seed": 3, "threads": 1}
STOPPED_AT = 11
MORE = {
    "fsdp": {"parameters": "int8"},
    "local_sgd": {"sync_every": 4},
    "diloco": {"sync_every": 4, "fragments": 2, "delay": 3},
}

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
for i, way in enumerate(sys.argv[2:]):
    parallel, optimizer, spec = way.split(":")
    chosen = {**TINY, **EVALS, "compress": spec, "optimizer": optimizer, "parallel": parallel, **MORE.get(parallel, {})}
    recorded = 3 if parallel == "ddp" else 0
    whole, cut = ({**chosen, "out": folder / f"{name}{i}"} for name in ("whole", "cut"))
    assert train.train(train.Settings(**whole, timeline=recorded))

    drawn, sample = 0, data.sample

    def interrupted(*arguments, sample=sample):  # Ctrl-C reaches one rank only, in the middle of a step
        global drawn
        drawn += 1
        if drawn == STOPPED_AT and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)
        return sample(*arguments)

    data.sample = interrupted
    assert not train.train(train.Settings(**cut))
    data.sample = sample
    assert train.train(train.Settings(**cut, resume=True))
dist.destroy_process_group()
