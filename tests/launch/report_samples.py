"""Made-up records of every kind that a report takes, as the training program, the benchmarks and sessions write them."""

import json
import math
from pathlib import Path

from commpress.launch.records import Record

SPECS = ("int8", "int4", "sign", "topk(0.01)", "topk(0.01)|int4", "topk(0.001)|int4")
BITS = dict(zip(SPECS, (8.125, 4.125, 1.031, 0.406, 0.127, 0.016), strict=True))
OTHERS = {
    "plain DDP": ("torch", 32.0),
    "fp16 hook": ("torch", 16.0),
    "PowerSGD rank 1 hook, one bucket": ("torch", 0.9),
    "powersgd(4)": ("commpress", 0.25),
}
PARAMETERS = 16_800_000
LSCPU = {"name": "AMD EPYC", "family": "25", "model": "17", "simd": ["avx2", "avx512f"], "l2_kib": 1024, "l3_kib": None}


def run(spec: str, bits: float) -> Record:
    """A run of 300 steps."""
    sent, dense = int(PARAMETERS * bits / 8), PARAMETERS * 4
    curve = [
        {
            "step": step,
            "train_loss": None if step == 0 else 2.2 + 3.4 * math.exp(-step / 60) + 0.06 * math.sin(step * 1.7),
            "validation_loss": None if step % 50 else 2.25 + 3.3 * math.exp(-step / 60) + 0.3 / (bits + 1),
            "seconds": step * (0.1 + bits / 100),
            "sent_bytes": step * sent,
            "dense_bytes": step * dense,
        }
        for step in range(301)
    ]
    reason = "spec is none" if spec == "none" else ""
    row = {"dtype": "float32", "spec": spec, "exchange": "two_shot"}
    sizes = [(0, PARAMETERS, 1), *((i, v, 299) for i, v in enumerate((400_000, 6_500_000, 6_500_000, 3_400_000)))]
    rows = [
        {
            **row,
            **{"bucket": bucket, "values": values, "steps": steps, "dense_bytes": values * 4 * steps},
            **{
                "sent_bytes": int(values * bits / 8) * steps,
                "reason": "small" if bucket == 0 and steps > 1 else reason,
            },
        }
        for bucket, values, steps in sizes
    ]
    return {
        "settings": {"compress": spec, "steps": 300, "out": f"runs/{spec}"},
        "traffic": {
            **{"dense_bytes": 300 * dense, "sent_bytes": 300 * sent, "ratio": dense / sent},
            **{"encode": 2.1, "wire": 30 * bits / 8, "decode": 1.3, "exposed": 12 * bits / 32},
        },
        "report": {"rows": rows},
        "curve": curve,
        "steps_done": 300,
        "median_step_seconds": 0.1 + bits / 100,
        "final_validation_loss": curve[-1]["validation_loss"],
        "machine": {"processor": "AMD EPYC", "lscpu": LSCPU},
        "world_size": 2,
        "backend": "gloo",
        "parameters": PARAMETERS,
    }


PHASES = {"received_bytes": 1, "encode": 0.1, "wire": 0.2, "decode": 0.05, "exposed": 0.1}


def compared(spec: str, sent: int, final: float, seconds: float, said: str = "", **settings: object) -> Record:
    """A run of 20 steps whose dense exchange sends 1000 bytes a step."""
    curve = [
        {"step": i, "train_loss": 5.0, "validation_loss": 5.0, "seconds": i * seconds, "sent_bytes": i * sent}
        | {"dense_bytes": i * 1000}
        for i in range(21)
    ]
    return {
        "settings": {"compress": spec, "out": f"runs/demo/{spec}", "lr": 0.1, **settings},
        "traffic": {"dense_bytes": 20_000, "sent_bytes": 20 * sent, "ratio": 1000 / sent, **PHASES},
        "report": {"spec": said or spec},
        **{"final_validation_loss": final, "machine": {"processor": "AMD EPYC"}, "world_size": 2, "backend": "gloo"},
        **{"curve": curve, "steps_done": 20, "median_step_seconds": seconds, "parameters": 250},
        **{"date": "2026-11-30T05:42:07+00:00", "version": "0.1.0", "receipt": [f"receipt of {spec}"]},
    }


PLAIN = compared("none", 1000, 2.5, 0.2)

MODEL = {"model": "GPT, 5 layers, 528 wide", "parameters": PARAMETERS, "tokens_per_step": 256}


def step_times(hosts: int, rate: str, megabits: float | None, delay: str = "0ms") -> Record:
    """Step times of a link; of loopback without `megabits`."""
    floor = 0.24
    rows: list[Record] = []
    kinds = {spec: ("commpress", bits) for spec, bits in BITS.items()}
    for name, (kind, bits) in {"no communication": ("floor", 0.0), **OTHERS, **kinds}.items():
        seconds = floor + (0.0 if kind == "floor" else 0.05) + PARAMETERS * bits / (megabits or 4e4) / 1e6
        rows.append(
            {
                **{"name": name, "kind": kind, "seconds": seconds, "quartiles": [seconds * f for f in (0.95, 1, 1.1)]},
                **{"ratio": seconds / floor, "tokens_per_second": 256 / seconds, "kernel_bytes": 1e6 * bits},
                "sent_bytes": int(PARAMETERS * bits / 8) if kind == "commpress" else None,
                "phases": {"encode": 0.03, "wire": 0.1, "decode": 0.02, "exposed": 0.05, "hidden": 0.1}
                if kind == "commpress"
                else None,
                "error": "",
            }
        )
    error = "RuntimeError: bf16 is not supported by Gloo: " + "a reason that goes on and on, " * 6
    rows.append({"name": "bf16 hook", "kind": "torch", "error": error})
    shaped = megabits is not None
    link = {"hosts": hosts, "ranks_per_host": 1, "rate": rate, "delay": delay, "loss": "0%", "shaped": shaped}
    machine = {"machine": "AMD EPYC, 2 cores", "torch": "2.13.0", "steps": 15, "world_size": hosts}
    return {"what": "step times", "link": link, **machine, **MODEL, "rows": rows}


def losses() -> Record:
    """Losses over 300 steps."""
    steps = list(range(0, 301, 20))
    rows: list[Record] = []
    for name, (kind, bits) in {**OTHERS, **{spec: ("commpress", bits) for spec, bits in BITS.items()}}.items():
        if name != "fp16 hook":
            loss = [2.4 + 3.2 * math.exp(-step / 80) + 0.4 / (1 + 4 * bits) for step in steps]
            rows.append(
                {
                    **{"name": name, "kind": kind, "steps": steps, "loss": loss, "error": ""},
                    "sent_bytes": [step * int(PARAMETERS * bits / 8) for step in steps],
                    "steps_to_target": next((step for step, x in zip(steps, loss, strict=True) if x < 2.6), None),
                }
            )
    return {"what": "losses", "world_size": 2, "target": 2.6, **MODEL, "rows": rows}


def timeline() -> Record:
    """Five steps of twelve buckets, of which two are on the wire at a time."""
    lines = ("training", "encode", "wire", "wire", "decode")
    events: list[Record] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}}
        for tid, name in enumerate(lines)
    ]

    def span(name: str, tid: int, step: int, start: float, length: float, **bucket: int) -> None:
        where = {"pid": 0, "tid": tid, "ts": start * 1e3, "dur": length * 1e3}
        events.append({"ph": "X", "name": name, **where, "args": {"step": step, **bucket}})

    for step in range(5):
        start, slow = step * 400.0, 1 + 0.1 * (step * 3 % 5)
        span("forward", 0, step, start, 60)
        span("backward", 0, step, start + 62, 120)
        for bucket in range(12):
            at = start + 80 + 10 * bucket
            span("encode", 1, step, at, 5, bucket=bucket)
            span("wire", 2 + bucket % 2, step, at + 5, 16 * slow, bucket=bucket)
            span("decode", 4, step, at + 5 + 16 * slow, 3, bucket=bucket)
        span("exposed", 0, step, start + 182, 35 * slow)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def judgement() -> Record:
    """A judgement of a model of many layers in three runtimes."""

    def side(scale: float) -> Record:
        layers = {
            f"blocks.{i}.attention.{name}": int(scale * 1e5 * (1 + i)) for i in range(6) for name in ("qkv", "out")
        }
        counts = {"values": 10**6, "left": int(scale * 10**6), "pruned": 0 if scale == 1 else 7 * 10**5}
        kinds = {"float32": 10**6} if scale == 1 else {"int8 static": 9 * 10**5, "float32": 10**5, "zeros": 7 * 10**5}
        return {"counts": counts, "kinds": kinds, "layers": layers, "stored_bytes": int(scale * 4e6), "left_out": {}}

    def measured(scale: float, file: str) -> Record:
        speeds = [
            {
                **{"threads": threads, "calls": 200, "median": scale * 0.02 / threads, "p95": scale * 0.03 / threads},
                **{
                    "turns": [scale * 0.02 / threads] * 10,
                    "waited": 0.0,
                    "loading_bytes": 10**7,
                    "calling_bytes": 10**7,
                },
            }
            for threads in (1, 16)
        ]
        return {"file": file, "bytes": int(scale * 4e6), "speeds": speeds}

    quality = {
        "dense_loss": 2.1,
        "small_loss": 2.2,
        "difference_error": 0.01,
        "dense_accuracy": 0.6,
        "small_accuracy": 0.5,
    }
    files = {"torch": "model.safetensors", "onnxruntime": "model.onnx", "pt2e": "model.pt2"}
    return {
        "what": "judgement",
        "machine": {"processor": "AMD EPYC 9654 96-Core Processor", "cores": 16, "torch": "2.13.0+cpu"},
        "inputs": [[8, 128]],
        "batches": 4,
        "rows": [
            {
                **{"runtime": name, "dense": measured(1, file), "small": measured(0.3, file)},
                "quality": {**quality, "changed": 0.2, "divergence": 0.04},
            }
            for name, file in files.items()
        ],
        "dense": side(1),
        "small": side(0.3),
        "left_out": ["pt2e, dense: torchao is not installed"],
        "targets": [{"target": "Arm, XNNPACK", "kind": "int8 static", "kernels": "integer kernels"}],
        "sentences": ["70% of the values pruned, int8 static: 3.3x smaller; on one thread 3.33x faster in torch."],
    }


def write(folder: Path) -> list[Path]:
    """One of each kind of file that a report takes, and several of most."""
    records = {
        **{
            f"run{i}": run(spec, bits)
            for i, (spec, bits) in enumerate({"none": 32.0, **BITS}.items())
            if i in (0, 2, 5)
        },
        **{
            f"steps{i}": step_times(2, *link)
            for i, link in enumerate((("100mbit", 100.0), ("300mbit", 300.0), ("1gbit", 1e3), ("10gbit", 1e4)))
        },
        "delay": step_times(2, "1gbit", 1e3, "20ms"),
        "delay2": step_times(2, "100mbit", 1e2, "20ms"),
        "loopback": step_times(4, "loopback", None),
        "losses": losses(),
        "judgement": judgement(),
        "trace-rank0": timeline(),
    }
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return [folder / f"{name}.json" for name in records]
