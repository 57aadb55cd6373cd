"""A process of `gpu_check`: works off items of one part and writes a line of JSON for each.

    python benchmarks/gpu_worker.py JOB

JOB is a file that `gpu_check` has written. What an item meets becomes its record; the process ends where it cannot go on: ranks
that are out of step, a GPU that has met an illegal access. `gpu_check` then starts another one for the items that are left.
"""

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_bytes
import torch
import torch.distributed as dist
from codec_cases import measured, rows_of
from passes import normal
from passes import rows_of as rows_of_passes

import commpress
from commpress.comm import coding
from commpress.kernels.table import compiled_dtypes, lookup
from commpress.launch.runtime import sentence
from commpress.optim import loops

Record = dict[str, Any]
PASSES = "passes of optimizers, masks and factors"
KERNEL_OF = {"encode": "encode", "feedback": "encode", "momentum": "encode", "decode": "mean", "mean of 4": "mean"}
"""The op of the table of kernels that an action needs. "recode 4" needs both, or one of its own."""
GROUP_SECONDS = 45
"""How long a rank waits for the others."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The items of a part, for one process, or for as many ranks as there are devices."""

    kind: str
    """compile, bytes, rates or ranks."""
    items: list[str]
    devices: list[str]
    """By rank, such as cuda:0."""
    backend: str = ""
    small: bool = False
    """Whether to try the program rather than the device."""
    values: int = 0
    """The length of the gradient whose rates are measured."""
    repeat: int = 0
    steps: int = 0
    sizes: tuple[int, ...] = ()
    """Bytes of the gradients that ranks exchange."""


def compiled(item: str, job: Job, device: torch.device) -> Record:
    """Compile a codec's kernels, or those of the optimizers' passes, as sessions do: Triton keeps them on disk."""
    if item == PASSES:
        loops.warm_up(device)
        return {}
    for dtype in compiled_dtypes(device):
        coding.warm_up(commpress.parse(item), device, dtype, prologue=True)
    return {}


def compared(item: str, job: Job, device: torch.device) -> Record:
    """Compare a codec, or the passes that have none, with the definition."""
    inputs = gpu_bytes.SMALL if job.small else gpu_bytes.Inputs()
    if item == PASSES:
        return {"passes": list(gpu_bytes.compare_passes(device, inputs.passes))}
    comparison = gpu_bytes.Comparison(commpress.parse(item), device)
    try:
        error = ""
        comparison.all(inputs)
    except gpu_bytes.UnequalError as found:
        error = str(found)
    except Exception as found:  # a kernel that cannot be compiled or started, no memory
        error = f"{item}: {comparison.doing}: {sentence(found)}"
    kernel = gpu_bytes.has_kernels(comparison.codec, device.type)
    if not error and (ops := gpu_bytes.lacking(comparison.codec.word, device.type)):
        error = f"{item}: no kernel on {device.type} for {', '.join(ops)}: plain torch has run"
    return {"comparisons": comparison.count, "kernel": kernel, "error": error}


def timed(item: str, job: Job, device: torch.device) -> Record:
    """Time the actions of a codec, or the passes, against copies; as shares of a copy's rate."""
    x = normal(job.values, 0, device)
    if item == PASSES:
        copy, rows = rows_of_passes(x, job.repeat)
        rate = 2 * x.nbytes / copy
        passes: dict[str, dict[str, float]] = {}
        for row in rows:
            passes.setdefault(row["op"], {})[row["of"]] = row["bytes_per_second"] / rate
        return {"copy_seconds": copy, "passes": passes}
    copies, times = measured(x, [item], [1], job.repeat)
    copy = sorted(copies)[len(copies) // 2]
    (costs,) = rows_of(times, 1, [item], copy, x.numel())
    actions = [action for *_, action in times]
    shares = {a: rate * copy / (2 * x.nbytes) for a, rate in costs["bytes_per_second"].items()}
    kernels = [action for action in actions if has_kernel(item, action, device.type)]
    return {"copy_seconds": copy, "copies": {a: costs[a] for a in actions}, "shares": shares, "kernels": kernels}


def has_kernel(spec: str, action: str, device: str) -> bool:
    """Whether an action runs by kernels; elsewhere it runs in plain torch."""
    codec = commpress.parse(spec)
    if action in KERNEL_OF:
        return lookup(KERNEL_OF[action], codec.word, device) is not None
    return lookup("recode", codec.word, device) is not None or gpu_bytes.has_kernels(codec, device)


def alone(job: Job, device: torch.device) -> Iterator[Record]:
    """Yield a record for each item of a part that one process does. Stops behind one that has lost the device."""
    kinds: dict[str, Callable[[str, Job, torch.device], Record]]
    kinds = {"compile": compiled, "bytes": compared, "rates": timed}
    work = kinds[job.kind]
    for item in job.items:
        start = time.perf_counter()
        record: Record = {"item": item, "error": ""}
        try:
            record |= work(item, job, device)
        except Exception as error:  # whatever it is, it is the item's result
            record["error"] = f"{item}: {sentence(error)}"
        record["ends"] = device_is_lost(device)
        yield record | {"seconds": time.perf_counter() - start}
        if record["ends"]:
            return


def device_is_lost(device: torch.device) -> bool:
    """Whether a GPU has met an error that stays; what it holds for later is freed otherwise."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def together(job: Job, device: torch.device) -> Iterator[Record]:
    """Yield a record for each item of a part that ranks do. Collective. Stops behind one that has set them out of step."""
    import gpu_ranks

    here = device if job.backend == "nccl" else None  # its communicator is made now, on this device
    dist.init_process_group(job.backend, timeout=datetime.timedelta(seconds=GROUP_SECONDS), device_id=here)
    names = iter(job.items)
    try:
        for record in gpu_ranks.records(list(job.items), device, job.steps, job.sizes):
            next(names)
            yield record
    except Exception as error:  # the others may be anywhere
        yield {"item": next(names), "error": f"rank {dist.get_rank()}: {sentence(error)}", "ends": True, "seconds": 0.0}
        return
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Work off the items of the job in the file that is named. Ends with code 1 if items are left."""
    place, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    job = Job(**json.loads(place.read_text()))
    torch.set_num_threads(1)
    device = torch.device(job.devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything else asks for one
    records = together(job, device) if job.kind == "ranks" else alone(job, device)
    with place.with_suffix(f".{rank}.jsonl").open("w") as out:
        for record in records:
            print(json.dumps(record), file=out, flush=True)
            if record.get("ends"):
                out.flush()
                os._exit(1)  # what else this process holds, such as a communicator, may wait for ranks that are gone


if __name__ == "__main__":
    main()
