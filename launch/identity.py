"""The settings that must not change when a run goes on, by --resume or by --fork."""

from pathlib import Path
from typing import Any

from commpress.launch.settings import Settings

RESUME_KEYS = (
    *("optimizer", "compress", "model", "layers", "width", "heads", "context", "batch", "accumulate"),
    *("lr", "warmup_steps", "weight_decay", "seed"),
)
"""The settings that training depends on; --resume needs them unchanged, but takes more --steps."""
MAY_FORK = ("recipe", "lr")
"""Settings that --fork may change."""
RESUME_KEYS_COMPRESSED = ("optimizer_warmup", "warmup_compress", "sync_every")
"""More of them under OneBitAdamW, ZeroOneAdamW and DGC."""
RESUME_KEYS_OF = {
    "ddp": (),
    "fsdp": ("parallel", "parameters"),
    "deepspeed": ("parallel", "zero_stage", "parameters"),
    "local_sgd": ("parallel", "sync_every", "fragments", "delay"),
    "diloco": ("parallel", "sync_every", "fragments", "delay", "outer_lr", "outer_momentum"),
}
"""More of them under each --parallel."""


def require_identity(saved: dict[str, Any], now: dict[str, Any], settings: Settings, source: Path) -> None:
    """Raise ValueError that names the first setting in which the checkpoint and this run differ, and both values."""
    said, free = f"--resume: the run in {source}", {"steps", "world_size"} if settings.parallel == "ddp" else {"steps"}
    if settings.fork is not None:
        said, free = f"--fork: the run in {source}", {*free, *MAY_FORK}
    for name, value in now.items():
        before = saved.get(name, getattr(Settings, name, None))  # an older run may not know a setting of today
        if before != value and name not in free:
            flag = {"world_size": "a world size of", "text": "a text of (bytes, CRC-32)"}.get(name)
            flag = flag or f"--{name.replace('_', '-')}"
            more = ""
            if name == "world_size":
                more = f" under --parallel {settings.parallel}, where each rank has a part of the state (ddp takes any)"
            raise ValueError(f"{said} has {flag} {before}, this one {flag} {value}; both must be the same{more}")
