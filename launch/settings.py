"""What the command line of the training program says, and which of it decides where training goes."""

import importlib.util
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import commpress
from commpress.comm.agreement import gather_settings, host_name
from commpress.launch import parallel, ranks
from commpress.launch.model import BYTES, Shape
from commpress.launch.ranks import TrainingError


@dataclass(frozen=True)
class Settings:
    """What the command line says; each field is the flag of that name."""

    compress: str = "int4"
    optimizer: str = "AdamW"
    optimizer_warmup: int | None = None
    warmup_compress: str = "none"
    sync_every: int | None = None
    parallel: str = "ddp"
    parameters: str = "none"
    zero_stage: int = 2
    outer_lr: float = 0.7
    outer_momentum: float = 0.6
    fragments: int = 1
    delay: int = 0
    recipe: Path | None = None
    fork: Path | None = None
    data: Path | None = None
    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    batch: int = 8
    accumulate: int = 1
    steps: int = 1000
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    eval_every: int = 100
    eval_batches: int = 16
    seed: int = 0
    out: Path | None = None
    checkpoint_every: int = 0
    resume: bool = False
    threads: int | None = None
    tensorboard: bool = False
    timeline: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(self.layers, self.width, self.heads, self.context)

    @property
    def folder(self) -> Path:
        """Where the run is written: --out, or runs/ and the spec without its punctuation."""
        name = re.sub(r"[^a-z0-9.]+", "-", self.compress).strip("-")
        return self.out or Path("runs", "-".join([*(way.replace(" ", "-") for way in unusual(self)), name]))


OPTIMIZERS = ("AdamW", "OneBitAdamW", "ZeroOneAdamW", "SGD", "DGC")
STEERING = (
    *("optimizer", "compress", "layers", "width", "heads", "context", "batch", "accumulate"),
    *("lr", "warmup_steps", "weight_decay", "seed"),
)
"""The settings that decide where training goes; --resume needs them unchanged. It takes more --steps."""
MAY_FORK = ("recipe", "lr")
"""Those that --fork may change."""
OWN_TO_A_RANK = ("data", "out", "fork", "recipe", "threads", "tensorboard")
"""Settings that ranks on different hosts may have for themselves."""
MOST_THREADS = 4096
STEERING_BEHIND = ("optimizer_warmup", "warmup_compress", "sync_every")
"""Those of OneBitAdamW, ZeroOneAdamW and DGC."""
STEERING_WAYS = {
    "ddp": (),
    "fsdp": ("parallel", "parameters"),
    "deepspeed": ("parallel", "zero_stage", "parameters"),
    "local_sgd": ("parallel", "sync_every", "fragments", "delay"),
    "diloco": ("parallel", "sync_every", "fragments", "delay", "outer_lr", "outer_momentum"),
}
"""Those of each --parallel."""
SYNC_EVERY = {"ddp": 4, "deepspeed": 4, "local_sgd": 30, "diloco": 30}
"""Steps between syncs: of ZeroOneAdamW under the first two, and of the others."""


def check(settings: Settings) -> None:
    """Raises TrainingError for settings that no run can have."""
    if settings.optimizer not in OPTIMIZERS:
        raise TrainingError(f"--optimizer {settings.optimizer}: expected one of {', '.join(OPTIMIZERS)}")
    if settings.parallel not in parallel.WAYS:
        raise TrainingError(f"--parallel {settings.parallel}: expected one of {', '.join(parallel.WAYS)}")
    if settings.parallel not in ("ddp", "deepspeed") and settings.optimizer not in ("AdamW", "SGD"):
        raise TrainingError(
            f"--optimizer {settings.optimizer} exchanges by itself: expected --parallel ddp or deepspeed"
        )
    if settings.zero_stage not in range(4):
        raise TrainingError(f"--zero-stage {settings.zero_stage}: expected 0, 1, 2 or 3")
    if settings.parallel == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("--parallel deepspeed: found no DeepSpeed, expected it; pip install 'commpress[deepspeed]'")
    if settings.recipe is not None and settings.parallel not in ("ddp", "fsdp"):
        raise TrainingError(f"--recipe {settings.recipe}: expected --parallel ddp or fsdp, got {settings.parallel}")
    if settings.fork is not None and settings.resume:
        raise TrainingError(
            f"--fork {settings.fork} starts a run in a new folder, --resume goes on in its own: not both"
        )
    if settings.parallel in ("local_sgd", "diloco") and settings.timeline:
        raise TrainingError(
            f"--timeline {settings.timeline}: expected --parallel ddp, fsdp or deepspeed, whose steps have phases"
        )
    try:
        Shape(settings.layers, settings.width, settings.heads, settings.context)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    for name in ("compress", "warmup_compress", "parameters"):
        try:
            commpress.parse(getattr(settings, name))
        except ValueError as error:
            raise TrainingError(f"--{name.replace('_', '-')}: {error}") from None
    if settings.optimizer_warmup is not None and settings.optimizer_warmup >= settings.steps:
        raise TrainingError(
            f"--optimizer-warmup {settings.optimizer_warmup}: expected less than --steps {settings.steps}"
        )
    least: dict[str, float] = {"batch": 1, "accumulate": 1, "steps": 1, "eval_batches": 1, "threads": 1}
    least |= {"warmup_steps": 0, "weight_decay": 0, "eval_every": 0, "checkpoint_every": 0, "lr": 0, "timeline": 0}
    least |= {"optimizer_warmup": 1, "sync_every": 1, "fragments": 1, "delay": 0, "outer_lr": 0, "outer_momentum": 0}
    for name, minimum in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= minimum:
            raise TrainingError(f"--{name.replace('_', '-')} {value}: expected at least {minimum:g}")
        if value == math.inf or (isinstance(value, int) and value >= 2**31):
            raise TrainingError(f"--{name.replace('_', '-')} {value}: expected less than {2**31}")
    require_used(settings)
    require_outer(settings)
    require_room(settings)
    if settings.threads is not None and settings.threads > MOST_THREADS:
        raise TrainingError(f"--threads {settings.threads}: expected at most {MOST_THREADS}")
    if not 0 <= settings.seed < 2**31:
        raise TrainingError(f"--seed {settings.seed}: expected 0 to {2**31 - 1}")


def require_used(settings: Settings) -> None:
    """Raise TrainingError for a flag that this way of training does not look at: it would be left out in silence."""
    behind = ("OneBitAdamW", "ZeroOneAdamW", "DGC")
    outer = ("local_sgd", "diloco")
    used = {
        "optimizer_warmup": (settings.optimizer in behind, f"--optimizer {', '.join(behind[:2])} or {behind[2]}"),
        "warmup_compress": (settings.optimizer in behind[:2], f"--optimizer {' or '.join(behind[:2])}"),
        "sync_every": (
            settings.optimizer == "ZeroOneAdamW" or settings.parallel in outer,
            f"--optimizer ZeroOneAdamW, or --parallel {' or '.join(outer)}",
        ),
        "parameters": (settings.parallel in ("fsdp", "deepspeed"), "--parallel fsdp or deepspeed"),
        "zero_stage": (settings.parallel == "deepspeed", "--parallel deepspeed"),
        "outer_lr": (settings.parallel == "diloco", "--parallel diloco"),
        "outer_momentum": (settings.parallel == "diloco", "--parallel diloco"),
        "fragments": (settings.parallel in outer, f"--parallel {' or '.join(outer)}"),
        "delay": (settings.parallel in outer, f"--parallel {' or '.join(outer)}"),
    }
    for name, (looked_at, where) in used.items():
        value = getattr(settings, name)
        if not looked_at and value != getattr(Settings, name):
            raise TrainingError(f"--{name.replace('_', '-')} {value}: counts for nothing here, expected {where}")


def require_outer(settings: Settings) -> None:
    """Raise TrainingError, with the flag, for outer syncs that cannot be."""
    every = SYNC_EVERY.get(settings.parallel, 1) if settings.sync_every is None else settings.sync_every
    if settings.fragments > every:
        raise TrainingError(f"--fragments {settings.fragments}: expected at most --sync-every {every}")
    if settings.delay >= every:
        raise TrainingError(f"--delay {settings.delay}: expected less than --sync-every {every}")
    if settings.outer_momentum >= 1:
        raise TrainingError(f"--outer-momentum {settings.outer_momentum}: expected less than 1")


def require_room(settings: Settings) -> None:
    """Raise TrainingError for a model or a batch that is larger than this host's memory, by the least that either takes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    s = settings
    values = s.layers * 12 * s.width**2 + s.context * s.width + 2 * BYTES * s.width
    model = 16 * values  # weights, gradients and what AdamW remembers
    if model > memory:
        raise TrainingError(
            f"--layers {s.layers} --width {s.width} --context {s.context}: {values / 1e9:,.1f} G parameters take "
            f"{model / 1e9:,.1f} GB, this host has {memory / 1e9:,.1f} GB"
        )
    batch = 4 * s.batch * s.context * (8 * s.layers * s.width + 2 * BYTES)  # what backward needs of the forward
    if batch > memory:
        raise TrainingError(
            f"--batch {s.batch} --context {s.context}: its activations take {batch / 1e9:,.1f} GB, this host has "
            f"{memory / 1e9:,.1f} GB"
        )


def called(settings: Settings) -> str:
    """A run by its spec, and by what else is not usual about it."""
    spec = settings.compress
    if settings.parallel == "fsdp" or settings.parameters != Settings.parameters:
        spec = f"gradients {spec}, parameters {settings.parameters}"
    return " ".join([*unusual(settings), spec])


def unusual(settings: Settings) -> list[str]:
    """How the model is spread and its optimizer, where they are not the usual ones."""
    zero = f" ZeRO {settings.zero_stage}" if settings.parallel == "deepspeed" else ""
    ways = (settings.parallel + zero, Settings.parallel), (settings.optimizer, Settings.optimizer)
    return [way for way, usual in ways if way != usual]


def require_alike(settings: Settings, device: torch.device) -> None:
    """Raise TrainingError on all ranks if they were started with different flags. Collective."""
    mine = {name: value for name, value in asdict(settings).items() if name not in OWN_TO_A_RANK}
    group = dist.distributed_c10d._get_default_group()
    everyone = gather_settings({**mine, "host": host_name()}, group, device)
    for rank, other in enumerate(everyone):
        for name in mine:
            if str(here := other[name]) != str(there := everyone[0][name]):  # NaN is unlike itself
                flag = f"--{name.replace('_', '-')}"
                who = ranks.named(rank, str(other["host"])).removesuffix(": ")
                kind = ranks.LoneError if rank == dist.get_rank() else TrainingError
                raise kind(f"{who} has {flag} {here}, rank 0 has {flag} {there}: all ranks need the same")


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
