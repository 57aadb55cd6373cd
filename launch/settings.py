"""The settings of a training run: each is declared here once, with its default and its help, and is the flag with its name.

`command_line.py` makes the flags from them, a panel of the help for each class; the rest of this file rejects settings that
no run can have.
"""

import importlib.util
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from commpress.comm.codecs import AUTO
from commpress.launch import patterns, runtime
from commpress.launch.model import BYTES, Shape
from commpress.launch.runtime import TrainingError
from commpress.launch.specs import PLAIN, require_specs


@dataclass(frozen=True)
class Compression:
    """Codecs, and the optimizer whose traffic they compress."""

    compress: str | None = None
    """Spec: none, bf16, int8, int4, sign, topk(0.01), topk(0.01)|int4, topk(0.25->0.01, 500), ...; auto finds one during
    training; or a .toml or .json file with specs by patterns of parameter names (for ddp with AdamW or SGD). None: the
    recipe's spec; else auto under ddp, fsdp and deepspeed, unless OneBitAdamW is sharded; else int4."""
    parameters: str | None = None
    """Spec of the parameters that fsdp and deepspeed's ZeRO gather: none, bf16, int8, int4; delta|int4 under fsdp sends
    what has changed; auto needs --compress auto. None: the recipe's spec, or none."""
    optimizer: str = "AdamW"
    """AdamW and SGD step on the mean gradient; OneBitAdamW, ZeroOneAdamW and DGC send their update; EF21Muon sends how
    far its momentum has moved, or takes local steps of Muon under local_sgd and diloco."""
    optimizer_warmup: int | None = None
    """Steps until OneBitAdamW, ZeroOneAdamW or DGC compresses fully. None: twice --warmup-steps, at most a quarter of
    --steps."""
    warmup_compress: str = "none"
    """Spec of gradients during --optimizer-warmup, under OneBitAdamW and ZeroOneAdamW: none, int8, int4."""


@dataclass(frozen=True)
class Parallel:
    """How the model is spread over the ranks."""

    parallel: str = "ddp"
    """ddp, fsdp (FSDP2), deepspeed, local_sgd or diloco: decides what is sent, and when."""
    zero_stage: int = 2
    """Stage of deepspeed's ZeRO: 0 shards nothing, 1 and 2 shard the optimizer's state, 3 the parameters, too."""
    sync_every: int | None = None
    """Steps between syncs. None: 4 under ZeroOneAdamW, 30 under local_sgd and diloco."""
    outer_lr: float = 0.7
    """Rate of diloco's outer step."""
    outer_momentum: float = 0.6
    """Momentum of diloco's outer step."""
    fragments: int = 1
    """Parts of the model that local_sgd and diloco sync at different steps."""
    delay: int = 0
    """Steps that training goes on while a fragment is being sent."""


@dataclass(frozen=True)
class Model:
    """Sizes of the GPT, and the text that it learns."""

    layers: int = 6
    """Transformer blocks."""
    width: int = 384
    """Width of the residual path."""
    heads: int = 6
    """Attention heads."""
    context: int = 256
    """Bytes in a window."""
    data: Path | None = None
    """A file, or a folder of text files; beside --model a module:function that returns (training, held_out), each of batches
    (inputs, targets). None: Python's own source."""
    model: str | None = None
    """Your own model instead of the GPT, module:factory; the factory returns a torch.nn.Module. For ddp."""


@dataclass(frozen=True)
class Training:
    """The optimizer's steps."""

    steps: int = 1000
    """Optimizer steps."""
    batch: int = 8
    """Windows of text in a backward of a rank."""
    accumulate: int = 1
    """Backwards in a step; gradients are sent once a step."""
    lr: float = 1e-3
    """Highest learning rate; it falls along a cosine to a tenth of it."""
    warmup_steps: int = 100
    """Steps until the learning rate is at its highest."""
    weight_decay: float = 0.1
    """Weight decay of the matrices."""
    seed: int = 0
    """Seed of the weights and the windows."""
    recipe: Path | None = None
    """A .toml or .yaml file that says what to prune, quantise and distil at which step (docs/recipes.md)."""
    eval_every: int = 100
    """Steps between validations; 0: only before the first and after the last step."""
    eval_batches: int = 16
    """Batches of held-out text in a validation, all ranks together."""


@dataclass(frozen=True)
class Files:
    """Files of the run, and the threads that it may use."""

    out: Path | None = None
    """Folder of the run. None: runs/ and the name of the spec."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    fork: Path | None = None
    """Start from the checkpoint of this run; --recipe, --steps and --lr may differ from its own."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: at the end, or when asked to stop."""
    threads: int | None = None
    """CPU threads of a rank. None: an equal share of the host's cores."""
    tensorboard: bool = False
    """Write scalars to OUT/tensorboard."""
    timeline: int = 0
    """Steps whose phases are written to OUT/timeline.json, for ui.perfetto.dev and `commpress report`."""


@dataclass(frozen=True)
class Settings(Files, Training, Model, Parallel, Compression):  # fields come in reverse
    """All settings of a training run."""

    @property
    def spec(self) -> str:
        """Return the spec of the gradients, or of what is sent instead; specs by patterns of names as JSON."""
        if self.compress is not None:
            return self.compress
        return AUTO if self.takes_auto else DEFAULT_SPEC

    @property
    def gradients(self) -> str | dict[str, str]:
        """Return the spec of the gradients, or of what is sent instead, or specs by patterns of names."""
        return patterns.table_of(self.spec) or self.spec

    @property
    def takes_auto(self) -> bool:
        """Return whether a spec may be found during training."""
        shards_optimizer = self.optimizer not in (*PLAIN, "EF21Muon") and self.parameters not in (None, "none")
        return self.parallel in ("ddp", "fsdp", "deepspeed") and not shards_optimizer

    @property
    def shards_muon(self) -> bool:
        """Return whether each rank has only parts of the matrices that EF21Muon steps."""
        in_parts = {"fsdp": True, "deepspeed": self.zero_stage > 0}
        return self.optimizer == "EF21Muon" and in_parts.get(self.parallel, False)

    @property
    def parameter_spec(self) -> str:
        """Return the spec of gathered parameters."""
        return "none" if self.parameters is None else self.parameters

    @property
    def shape(self) -> Shape:
        """Return the sizes of the model. Raises ValueError if there is no such model."""
        return Shape(self.layers, self.width, self.heads, self.context)

    @property
    def folder(self) -> Path:
        """Return the folder of the run: --out, or runs/ and the spec without its punctuation."""
        name = re.sub(r"[^a-z0-9.]+", "-", self.spec).strip("-")
        return self.out or Path("runs", "-".join([*(way.replace(" ", "-") for way in unusual(self)), name]))


@dataclass(frozen=True)
class Flags:
    """The flags of the training program: a panel of its help for each field."""

    compression: Compression = Compression()
    parallel: Parallel = Parallel()
    model: Model = Model()
    training: Training = Training()
    files: Files = Files()

    @property
    def settings(self) -> Settings:
        """Return the settings of these flags."""
        return Settings(**{name: value for panel in vars(self).values() for name, value in vars(panel).items()})


DEFAULT_SPEC = "int4"
"""The spec if none is given and `auto` cannot find one."""
OPTIMIZERS = ("AdamW", "OneBitAdamW", "ZeroOneAdamW", "EF21Muon", "SGD", "DGC")
STRATEGIES = ("ddp", "fsdp", "deepspeed", "local_sgd", "diloco")
"""The names that --parallel takes."""
EXCHANGE_UNDER = {
    "OneBitAdamW": ("ddp", "deepspeed"),
    "ZeroOneAdamW": ("ddp", "deepspeed"),
    "EF21Muon": ("ddp", "fsdp", "deepspeed", "local_sgd", "diloco"),
    "DGC": ("ddp", "deepspeed"),
}
"""The values of --parallel under which an optimizer that exchanges by itself can run."""
OWN_TO_A_RANK = ("data", "out", "fork", "recipe", "threads")
"""Settings that may differ between ranks on different hosts."""
ALL_OR_NONE = ("fork", "recipe")
"""Those of them that all ranks must have, or none."""
MOST_THREADS = 4096
SYNC_EVERY = {"ddp": 4, "deepspeed": 4, "local_sgd": 30, "diloco": 30}
"""Default steps between syncs: of ZeroOneAdamW under the first two, and of the others."""


def check(settings: Settings) -> None:
    """Raise TrainingError for settings that no run can have."""
    if settings.optimizer not in OPTIMIZERS:
        raise TrainingError(f"--optimizer {settings.optimizer}: expected one of {', '.join(OPTIMIZERS)}")
    if settings.parallel not in STRATEGIES:
        raise TrainingError(f"--parallel {settings.parallel}: expected one of {', '.join(STRATEGIES)}")
    if settings.parallel not in (expected := EXCHANGE_UNDER.get(settings.optimizer, STRATEGIES)):
        raise TrainingError(
            f"--optimizer {settings.optimizer} exchanges by itself: expected --parallel {' or '.join(expected)}, got "
            f"{settings.parallel}"
        )
    if settings.zero_stage not in range(4):
        raise TrainingError(f"--zero-stage {settings.zero_stage}: expected 0, 1, 2 or 3")
    if settings.parallel == "deepspeed" and settings.optimizer == "EF21Muon" and settings.zero_stage == 3:
        raise TrainingError("--zero-stage 3: expected 0, 1 or 2 under --optimizer EF21Muon")
    if settings.parallel == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("--parallel deepspeed: found no DeepSpeed, expected it; pip install 'commpress[deepspeed]'")
    if settings.recipe is not None and settings.parallel not in ("ddp", "fsdp", "deepspeed"):
        raise TrainingError(
            f"--recipe {settings.recipe}: expected --parallel ddp, fsdp or deepspeed, got {settings.parallel}"
        )
    if settings.fork is not None and settings.resume:
        raise TrainingError(
            f"--fork {settings.fork} starts a run in a new folder, --resume goes on in its own: expected only one of them"
        )
    require_own_model(settings)
    if settings.parallel in ("local_sgd", "diloco") and settings.timeline:
        raise TrainingError(
            f"--timeline {settings.timeline}: expected --parallel ddp, fsdp or deepspeed, whose steps have phases"
        )
    try:
        Shape(settings.layers, settings.width, settings.heads, settings.context)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    require_specs(settings)
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


def require_own_model(settings: Settings) -> None:
    """Raise TrainingError, with the flag, for flags that do not go together with --model."""
    if settings.model is None:
        return
    if settings.parallel != "ddp":
        raise TrainingError(f"--model {settings.model}: expected --parallel ddp, got {settings.parallel}")
    if settings.data is None or ":" not in str(settings.data):
        raise TrainingError(
            f"--data {settings.data}: expected module:function with --model, such as my_project.data:batches"
        )
    for name in ("layers", "width", "heads", "context", "batch", "eval_batches"):
        if (value := getattr(settings, name)) != getattr(Settings, name):
            flag = name.replace("_", "-")
            raise TrainingError(
                f"--{flag} {value}: is only for the built-in GPT and its text, expected none with --model"
            )


def require_used(settings: Settings) -> None:
    """Raise TrainingError for a flag without effect in this way of training."""
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
        value, usual = getattr(settings, name), getattr(Settings, name)
        if not looked_at and value != usual and not (name == "parameters" and value == "none"):
            raise TrainingError(f"--{name.replace('_', '-')} {value}: has no effect here, expected {where}")


def require_outer(settings: Settings) -> None:
    """Raise TrainingError, with the flag, for impossible outer syncs."""
    every = SYNC_EVERY.get(settings.parallel, 1) if settings.sync_every is None else settings.sync_every
    if settings.fragments > every:
        raise TrainingError(f"--fragments {settings.fragments}: expected at most --sync-every {every}")
    if settings.delay >= every:
        raise TrainingError(f"--delay {settings.delay}: expected less than --sync-every {every}")
    if settings.outer_momentum >= 1:
        raise TrainingError(f"--outer-momentum {settings.outer_momentum}: expected less than 1")


def require_room(settings: Settings) -> None:
    """Raise TrainingError for a model or a batch whose least memory is more than this host has."""
    if settings.model is not None:
        return
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


def run_title(settings: Settings) -> str:
    """Name a run by its spec, and by its other unusual settings."""
    spec = settings.spec
    if settings.parallel == "fsdp" or settings.parameter_spec != "none":
        spec = f"gradients {spec}, parameters {settings.parameter_spec}"
    return " ".join([*unusual(settings), spec])


def unusual(settings: Settings) -> list[str]:
    """Name the strategy and the optimizer, if they are not the defaults."""
    zero = f" ZeRO {settings.zero_stage}" if settings.parallel == "deepspeed" else ""
    ways = (settings.parallel + zero, Settings.parallel), (settings.optimizer, Settings.optimizer)
    return [way for way, usual in ways if way != usual]


def require_alike(settings: Settings, device: torch.device) -> None:
    """Raise TrainingError on all ranks if they were started with different flags. Collective."""
    mine: dict[str, object] = {name: "none" if getattr(settings, name) is None else "one" for name in ALL_OR_NONE}
    mine |= {name: value for name, value in asdict(settings).items() if name not in OWN_TO_A_RANK}
    runtime.require_same_flags(mine, device)
