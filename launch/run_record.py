"""record.json: what ran, where, and what was measured."""

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import commpress
from commpress.comm.receipt import Receipt
from commpress.files import write_atomically
from commpress.launch.link import joining
from commpress.launch.settings import Settings
from commpress.processor import processor


@dataclass(frozen=True)
class Traffic:
    """Bytes and seconds of this rank, added up over all starts of a run."""

    dense_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    encode: float = 0.0
    wire: float = 0.0
    decode: float = 0.0
    exposed: float = 0.0

    @classmethod
    def of(cls, report: commpress.Report) -> "Traffic":
        phases = {name: report.seconds[name] for name in ("encode", "wire", "decode", "exposed")}
        return cls(report.dense_bytes, report.sent_bytes, report.received_bytes, **phases)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def ratio(self) -> float:
        return self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0


def write_record(
    out: Path,
    settings: Settings,
    text: dict[str, Any],
    parameters: int,
    device: torch.device,
    durations: list[float],
    curve: list[dict[str, Any]],
    report: commpress.Report,
    receipt: Receipt,
    traffic: Traffic,
    recipe: dict[str, Any] | None,
    small: dict[str, Any] | None,
) -> None:
    """Write record.json: what ran, where, and what was measured. Bytes and seconds of communication are rank 0's."""
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": commpress.__version__,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
        "text": text,
        "world_size": dist.get_world_size(),
        "link": joining(dist.get_world_size()),
        "backend": dist.get_backend(),
        "machine": machine(device),
        "torch": torch.__version__,
        "parameters": parameters,
        "steps_done": len(durations),
        "final_validation_loss": curve[-1]["validation_loss"] if len(durations) == settings.steps else None,
        "median_step_seconds": statistics.median(durations),
        "traffic": {**asdict(traffic), "ratio": traffic.ratio},
        "recipe": recipe,
        "small_model": small,
        "report": report.to_dict(),  # since the last start only, as the receipt
        "receipt": str(receipt).splitlines(),
        "curve": curve,
    }
    write_atomically(out / "record.json", lambda f: f.write((json.dumps(record, indent=1) + "\n").encode()))


def machine(device: torch.device) -> dict[str, Any]:
    """Return the machine of the run."""
    found = processor()
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": str(found),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "lscpu": found.to_dict(),
    }


def where(device: torch.device) -> dict[str, Any]:
    """Return what a benchmark's record says of its machine: the accelerator, or the processor and its cores; and `lscpu`."""
    here = machine(device)
    name = here["accelerator"] or f"{here['processor']}, {here['cores']} cores"
    return {"machine": name, "lscpu": here["lscpu"]}


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Return an equal share of this host's cores for each of its ranks."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
