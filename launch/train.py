"""Train a byte-level GPT on any number of ranks, its gradients compressed. One file, to read and to change.

    torchrun --nproc-per-node 2 -m commpress.launch.train --compress "topk(0.01)|int4"

Without torchrun it trains on one rank. Ctrl-C or SIGTERM: all ranks stop after the same step and leave a checkpoint (and
torchrun itself, which passes the signal on, ends with a traceback of its own). `--resume` goes on from there; on CPU, bit
for bit as if nothing had happened.
"""

import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

import commpress
from commpress import extras, optim
from commpress.launch import checkpoint, data, parallel, recipes, scalars
from commpress.launch.model import GPT, Shape

try:
    import typer
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.train", error, "launch") from None

if TYPE_CHECKING:
    from commpress.model import Recipe, Scheduler

BETAS = (0.9, 0.95)
MOMENTUM = 0.9
"""SGD's and DGC's."""
CLIP_NORM = 1.0
FINAL_LR = 0.1
"""Where the cosine ends, as a share of --lr."""
CURVE_ROWS = 1000
"""About as many rows the loss curve gets, however long the run is."""
TIMELINE_AFTER = 5
"""Steps before --timeline records: DDP lays its buckets out anew, caches warm up."""
PLAIN_LINES = 20
"""Lines of progress in all where the output is not a terminal."""


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


STEERING = (
    *("optimizer", "compress", "layers", "width", "heads", "context", "batch", "accumulate"),
    *("steps", "lr", "warmup_steps", "weight_decay", "seed"),
)
"""The settings that decide where training goes; --resume needs them unchanged."""
MAY_FORK = ("recipe", "steps", "lr")
"""Those that --fork may change."""


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


class TrainingError(Exception):
    """Training cannot start or go on. Every rank meets it alike, so rank 0 alone says it."""


def train(settings: Settings) -> bool:
    """Train, and write record.json and checkpoints into `settings.folder`. Returns False if it was asked to stop early.

    Collective: joins the ranks that torchrun started (or is a single one), unless a process group is already there.
    Raises TrainingError on all ranks, ValueError or OSError on a rank that cannot read its part of a checkpoint.
    """
    check(settings)
    recipe = None if settings.recipe is None else read_recipe(settings)
    if recipe is not None:
        require_traffic(settings, recipe)
    out = settings.folder
    if not settings.resume and checkpoint.exists(out):
        raise TrainingError(f"{out} holds the checkpoint of a run: go on with --resume, or give another --out")

    with process_group() as device, stop_signals() as stop, contextlib.ExitStack() as closing:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(settings.threads or default_threads())
        torch.manual_seed(settings.seed)

        with said_by_rank_0():
            text = data.load(settings.data)
            data.require_context(text, settings.context)
            data.require_same_text(text, device)
            if settings.tensorboard:
                scalars.require(device)
        own_windows = data.generator(settings.seed, rank)

        model = GPT(settings.shape).to(device)
        parameters = sum(p.numel() for p in model.parameters())
        scheduler: Scheduler | None = None
        with said_by_rank_0():
            if recipe is None:
                trained = spread(model, settings)
            else:
                trained, scheduler = by_recipe(recipe, model, settings, device)
        optimizer, session = trained.optimizer, trained.session

        steering = STEERING + (STEERING_BEHIND if isinstance(optimizer, optim.CompressedOptimizer) else ())
        identity = {
            **{name: getattr(settings, name) for name in dict.fromkeys(steering + STEERING_WAYS[settings.parallel])},
            "world_size": world_size,
            "text": list(text.fingerprint),
            "recipe": None if recipe is None else recipe.to_dict(),
        }
        done = 0  # optimizer steps so far, over all restarts
        durations: list[float] = []  # seconds of each
        curve: list[dict[str, Any]] = []
        before = Traffic()  # what earlier starts of this run sent
        small: dict[str, Any] | None = None  # the model as a recipe leaves it
        if settings.resume or settings.fork is not None:
            source = settings.fork or out
            with said_by_rank_0():
                state = checkpoint.load_shared(source)
                free = MAY_FORK if settings.fork is not None else ()
                require_identity(state["identity"], {k: v for k, v in identity.items() if k not in free}, source)
                if settings.fork is not None and scheduler is None and state["identity"].get("recipe"):
                    raise ValueError(f"--fork {source}: that run has a recipe, this one none; expected --recipe")
                if settings.fork is not None and state["step"] >= settings.steps:
                    raise ValueError(f"--fork {source}: it is at step {state['step']}, expected --steps above that")
            own = checkpoint.load_own(source, state["step"], rank)
            done, curve, before = state["step"], state["curve"], Traffic(**state["traffic"])
            durations = state["durations"].tolist()
            trained.load(state, own)
            if scheduler is not None and "scheduler" in own:
                scheduler.load_state_dict(own["scheduler"])
            elif scheduler is not None:
                scheduler.begin_at(done)
            session.load_state_dict(own["session"])
            own_windows.set_state(own["windows"])
            set_random_states(own["random"])
            if done == settings.steps:
                say(f"{out} is already at step {done} of {settings.steps}: nothing left to do")
                return True
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        board = None
        if settings.tensorboard and rank == 0:
            board = scalars.Scalars(out / "tensorboard", done, sum(durations), asdict(before))
            closing.callback(board.close)

        def save() -> None:
            together, alone = trained.state()
            shared = {
                **together,
                "identity": identity,
                "durations": torch.tensor(durations, dtype=torch.float64),
                "curve": curve,
                "traffic": asdict(before + Traffic.of(session.report())),
            }
            own = {**alone, "windows": own_windows.get_state(), "random": random_states()}
            if scheduler is not None:
                own["scheduler"] = scheduler.state_dict()
            with trained.alike():  # what is shared may be the model's own memory
                checkpoint.save(out, done, rank, shared, own)

        def note(train_loss: float | None, validation_loss: float | None) -> None:
            traffic = before + Traffic.of(session.report())
            curve.append(
                {
                    "step": done,
                    "train_loss": train_loss,
                    "validation_loss": validation_loss,
                    "seconds": sum(durations),
                    "sent_bytes": traffic.sent_bytes,
                    "dense_bytes": traffic.dense_bytes,
                }
            )
            if board:
                board.note(curve[-1], optimizer.param_groups[0]["lr"], asdict(traffic))

        def record() -> None:
            if rank == 0:
                report = session.report()
                traffic = before + Traffic.of(report)
                write_record(
                    out,
                    settings,
                    text,
                    parameters,
                    device,
                    durations,
                    curve,
                    report,
                    traffic,
                    identity["recipe"],
                    small,
                )

        say(
            f"{parameters / 1e6:.1f} M parameters, {called(settings)}, {world_size} ranks "
            f"({dist.get_backend()}, {device.type}, {torch.get_num_threads()} threads each), "
            f"{len(text.train) / 1e6:.1f} MB of text from {text.source}"
            + (f", {text.skipped} files skipped that are not text" if text.skipped else "")
            + (f"; going on at step {done}" if done else "")
        )

        def held_out() -> float:
            with trained.alike():
                return validate(model, text.validation, settings, device)

        if done == 0:
            note(None, held_out())

        recording = contextlib.ExitStack()
        timeline, first_recorded = None, done + TIMELINE_AFTER

        with display(settings, done) as show:
            stopping = False
            while done < settings.steps and not stopping:
                if settings.timeline and done == first_recorded:
                    timeline = recording.enter_context(session.timeline())
                started = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, settings)
                loss = torch.zeros((), device=device)
                for part in range(settings.accumulate):
                    x, y = data.sample(text.train, settings.batch, settings.context, own_windows)
                    # only the last part's backward synchronises the gradients
                    with contextlib.nullcontext() if part == settings.accumulate - 1 else trained.accumulating():
                        x = x.to(device)
                        output = trained.model(x)
                        task_loss = cross_entropy(output, y.to(device))
                        whole_loss = task_loss if scheduler is None else scheduler.loss(task_loss, output, x)
                        trained.backward(whole_loss / settings.accumulate)
                    loss += task_loss.detach() / settings.accumulate
                norm = trained.clip(CLIP_NORM)
                # one small exchange a step: mean loss and norm, and whether any rank was asked to stop
                asked = torch.tensor(float(stop), device=device).double()
                together = torch.stack([loss.double() / world_size, norm.double() / world_size, asked])
                dist.all_reduce(together)
                train_loss, norm_of_all, stopping = together[0].item(), together[1].item(), together[2].item() > 0
                if not math.isfinite(train_loss) or not math.isfinite(norm_of_all):
                    raise TrainingError(
                        f"step {done + 1}: the loss is {train_loss} and the gradient's norm {norm_of_all}, "
                        f"expected finite numbers; --lr {settings.lr} is probably too high"
                    )
                trained.step()
                if scheduler is not None:
                    scheduler.step()
                done += 1
                if done == settings.steps and isinstance(trained, parallel.Local):
                    trained.outer.sync()
                durations.append(time.perf_counter() - started)
                if timeline and (stopping or done in (settings.steps, first_recorded + settings.timeline)):
                    recording.close()
                    if rank == 0:
                        timeline.write(out / "timeline.json")
                    timeline = None

                due = done == settings.steps or (settings.eval_every > 0 and done % settings.eval_every == 0)
                validation_loss = held_out() if due else None
                if due or done % math.ceil(settings.steps / CURVE_ROWS) == 0:
                    note(train_loss, validation_loss)
                phase = "" if scheduler is None else recipes.told(scheduler)
                show.step(done, train_loss, validation_loss, durations, before + Traffic.of(session.report()), phase)
                if done == settings.steps and scheduler is not None:
                    model_read, small = recipes.store(out / recipes.SMALL, settings.shape, trained, scheduler)
                    small["validation_loss"] = validate(model_read.to(device), text.validation, settings, device)
                if due:
                    record()
                if (
                    stopping
                    or done == settings.steps
                    or (settings.checkpoint_every > 0 and done % settings.checkpoint_every == 0)
                ):
                    save()

        if settings.timeline and done <= first_recorded:
            say(f"no timeline: it starts {TIMELINE_AFTER} steps after the start, and this run had no more than that")
        if done < settings.steps:
            record()
            instead = " instead of --fork" if settings.fork is not None else ""
            say(
                f"stopped at step {done} of {settings.steps}; the same command with --resume{instead} goes on from {out}"
            )
        else:
            say(str(session.report()).rstrip())
            say(
                f"validation loss {curve[-1]['validation_loss']:.4f} after {done} steps; "
                f"record in {out / 'record.json'}"
            )
            if small is not None:
                say(
                    f"{small['sparsity']:.0%} pruned, {small['bytes'] / 1e6:.2f} MB in {out / recipes.SMALL}, "
                    f"{small['times_smaller']:.1f} times smaller than in float32; read back its validation loss is "
                    f"{small['validation_loss']:.4f}"
                )
        return done == settings.steps


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
        commpress.parse(settings.compress)
        Shape(settings.layers, settings.width, settings.heads, settings.context)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    for name in ("warmup_compress", "parameters"):
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


def by_recipe(
    recipe: "Recipe", model: GPT, settings: Settings, device: torch.device
) -> "tuple[parallel.Spread, Scheduler]":
    """As `spread`, and what carries out the recipe. Collective."""
    from commpress.model import Scheduler, prepare

    prepare(model, recipe)
    teacher = recipes.teacher(recipe, settings.context)
    trained = spread(model, settings)
    teacher = None if teacher is None else teacher.to(device)
    return trained, Scheduler(recipe, model, trained.optimizer, session=trained.session, teacher=teacher)


def read_recipe(settings: Settings) -> "Recipe":
    """The recipe of --recipe. Raises TrainingError if it cannot be followed in this run."""
    assert settings.recipe is not None
    try:
        return recipes.read(settings.recipe, settings.steps)
    except (ValueError, OSError) as error:
        raise TrainingError(f"--recipe: {error}") from None


def require_traffic(settings: Settings, recipe: "Recipe") -> None:
    """Raises TrainingError if the settings say other specs than the recipe: neither shall be left out in silence."""
    for name, key in (("compress", "spec"), ("parameters", "parameters")):
        wanted, given = getattr(recipe.traffic, key), getattr(settings, name)
        if wanted is not None and given != wanted:
            raise TrainingError(f"--{name} {given}: the recipe has traffic.{key} {wanted!r}; leave one of them out")


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


def learning_rate(step: int, settings: Settings) -> float:
    """For the update after `step` updates: linear warm-up, then a cosine down to FINAL_LR."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    part = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * part)))


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def adamw(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """torch's own."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)


def one_bit(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """1-bit Adam."""
    return optim.OneBitAdamW(groups, settings.lr, BETAS, **behind_warm_up(settings))


def zero_one(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """0/1 Adam."""
    return optim.ZeroOneAdamW(groups, settings.lr, BETAS, sync_every=sync_every(settings), **behind_warm_up(settings))


def sgd(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """torch's own, with momentum."""
    return torch.optim.SGD(groups, lr=settings.lr, momentum=MOMENTUM, fused=True)


def dgc(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """Deep Gradient Compression."""
    return optim.DGC(groups, settings.lr, MOMENTUM, warmup_steps=behind_warm_up(settings)["warmup_steps"])


def spread(model: GPT, settings: Settings) -> parallel.Spread:
    """The model on all ranks, as --parallel has it, its optimizer and its session. Collective."""

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return OPTIMIZERS[settings.optimizer](parameter_groups(module, settings), settings)

    if settings.parallel == "fsdp":
        return parallel.Sharded(model, optimizer, settings.compress, settings.parameters)
    if settings.parallel == "ddp":
        return parallel.Replicated(model, optimizer(model), settings.compress)
    if settings.parallel == "deepspeed":
        specs = settings.compress, settings.parameters
        return parallel.Engine(model, optimizer(model), settings.zero_stage, settings.batch, *specs)
    outer: dict[str, Any] = {"every": sync_every(settings), "fragments": settings.fragments, "delay": settings.delay}
    if settings.parallel == "diloco":
        outer |= {"lr": settings.outer_lr, "momentum": settings.outer_momentum}
    return parallel.Local(model, optimizer(model), settings.parallel, settings.compress, outer)


def sync_every(settings: Settings) -> int:
    """Steps between syncs."""
    return SYNC_EVERY.get(settings.parallel, 1) if settings.sync_every is None else settings.sync_every


OPTIMIZERS = {"AdamW": adamw, "OneBitAdamW": one_bit, "ZeroOneAdamW": zero_one, "SGD": sgd, "DGC": dgc}


def behind_warm_up(settings: Settings) -> dict[str, Any]:
    """How long a compressed optimizer warms up, and by what spec."""
    steps = settings.optimizer_warmup or max(1, min(2 * settings.warmup_steps, settings.steps // 4))
    return {"warmup_steps": steps, "warmup_spec": settings.warmup_compress}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats a byte of logits [batch, time, 256] against int64 [batch, time]."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, settings: Settings, device: torch.device) -> float:
    """Mean loss in nats a byte over --eval-batches times --batch fixed windows, split over the ranks. Collective."""
    starts = data.validation_starts(text, settings.eval_batches * settings.batch, settings.context)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = starts[rank::world_size]
    for first in range(0, -(-len(starts) // world_size), settings.batch):
        # as many forwards on every rank: those of a sharded model are collective
        part = mine[first : first + settings.batch]
        x, y = (t.to(device) for t in data.windows(text, part if len(part) else starts[:1], settings.context))
        total += torch.tensor([cross_entropy(model(x), y).item() * len(part), len(part)], device=device)
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


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
    text: data.Text,
    parameters: int,
    device: torch.device,
    durations: list[float],
    curve: list[dict[str, Any]],
    report: commpress.Report,
    traffic: Traffic,
    recipe: dict[str, Any] | None,
    small: dict[str, Any] | None,
) -> None:
    """Write record.json: what ran, where, and what was measured. Bytes and seconds of communication are rank 0's."""
    record = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
        "text": {"source": text.source, "bytes": text.fingerprint[0], "files": text.files, "skipped": text.skipped},
        "world_size": dist.get_world_size(),
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
        "report": report.to_dict(),  # since the last start only
        "curve": curve,
    }
    checkpoint.write_atomically(out / "record.json", lambda f: f.write((json.dumps(record, indent=1) + "\n").encode()))


def machine(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux says more
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """An equal share of this host's cores for each of its ranks."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """The default process group, joined if need be and then left again, and this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Stop:
    """Becomes true when this process is asked to end."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __float__(self) -> float:
        return float(self.asked)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a flag. A second one changes nothing: torchrun sends one more of its own."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the program that called, as under Ray Train
        return
    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def said_by_rank_0() -> Iterator[None]:
    """Around what fails on all ranks alike if it fails."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error


def require_identity(saved: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises ValueError that names the first setting in which the checkpoint and this run differ, and both values."""
    for name, value in now.items():
        before = saved.get(name, getattr(Settings, name, None))  # an older run may not know a setting of today
        if before != value:
            flag = {"world_size": "a world size of", "text": "a text of (bytes, CRC-32)"}.get(name)
            flag = flag or f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--resume: the run in {out} has {flag} {before}, this one {flag} {value}; both must be the same"
            )


def random_states() -> dict[str, Tensor]:
    """Of torch's own generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def say(line: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


class Display:
    """Progress on rank 0: a bar in a terminal, else a line now and then. Other ranks show nothing."""

    def __init__(self, settings: Settings, bar: Progress | None) -> None:
        self.settings, self.bar = settings, bar
        self.sent = 0
        self.validation = ""
        self.task = bar.add_task(called(settings), total=settings.steps, figures="") if bar else None

    def step(
        self,
        done: int,
        loss: float,
        validation_loss: float | None,
        durations: list[float],
        traffic: Traffic,
        phase: str = "",
    ) -> None:
        s = self.settings
        sent, self.sent = traffic.sent_bytes - self.sent, traffic.sent_bytes
        if validation_loss is not None:
            self.validation = f" val {validation_loss:.3f}"
        speed = dist.get_world_size() * s.batch * s.accumulate * s.context / statistics.median(durations[-PLAIN_LINES:])
        figures = (
            f"loss {loss:.3f}{self.validation} {speed / 1e3:.1f}k tokens/s"
            f" {sent / 1e6:.3f} MB/step {traffic.ratio:.1f}x less{phase}"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, figures=figures)
        elif done == s.steps or validation_loss is not None or done % math.ceil(s.steps / PLAIN_LINES) == 0:
            say(f"step {done}/{s.steps}  {figures}")


@contextlib.contextmanager
def display(settings: Settings, done: int) -> Iterator[Display]:
    """How training is shown on this rank."""
    if dist.get_rank() == 0 and sys.stdout.isatty():
        columns = (
            BarColumn(bar_width=None),  # what is left of the terminal's width
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, expand=True) as bar:
            yield Display(settings, bar)
    else:
        yield Display(settings, None)


def command(
    compress: Annotated[
        str | None,
        typer.Option(
            help="Spec: none, bf16, int8, int4, sign, topk(0.01), topk(0.01)|int4, ... Default: the recipe's, or int4."
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="AdamW or SGD on what arrives; OneBitAdamW, ZeroOneAdamW or DGC: send what it applies.")
    ] = Settings.optimizer,
    optimizer_warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps until those three compress fully. Default: twice --warmup-steps, a quarter of --steps at most."
        ),
    ] = None,
    warmup_compress: Annotated[
        str, typer.Option(help="Spec of gradients until then, under OneBitAdamW and ZeroOneAdamW: none, int8, int4.")
    ] = Settings.warmup_compress,
    sync_every: Annotated[
        int | None,
        typer.Option(help="Steps between syncs: of ZeroOneAdamW (default 4), local_sgd and diloco (default 30)."),
    ] = Settings.sync_every,
    parallel: Annotated[
        str, typer.Option(help="ddp, fsdp (FSDP2), deepspeed, local_sgd or diloco: what travels, and when.")
    ] = Settings.parallel,
    parameters: Annotated[
        str, typer.Option(help="Spec of the parameters that fsdp and deepspeed's ZeRO gather: none, bf16, int8, int4.")
    ] = Settings.parameters,
    zero_stage: Annotated[
        int,
        typer.Option(help="Of deepspeed: 0 shards nothing, 1 and 2 what the optimizer keeps, 3 the parameters, too."),
    ] = Settings.zero_stage,
    outer_lr: Annotated[float, typer.Option(help="Rate of diloco's outer step.")] = Settings.outer_lr,
    outer_momentum: Annotated[float, typer.Option(help="Momentum of that.")] = Settings.outer_momentum,
    fragments: Annotated[
        int, typer.Option(help="Parts of the model that local_sgd and diloco sync at different steps.")
    ] = Settings.fragments,
    delay: Annotated[int, typer.Option(help="Steps that training goes on while such a part travels.")] = Settings.delay,
    recipe: Annotated[
        Path | None,
        typer.Option(help="What to prune, quantise and distil at which step: a .toml or .yaml file (docs/recipes.md)."),
    ] = None,
    fork: Annotated[
        Path | None, typer.Option(help="Start from this run's checkpoint; --recipe, --steps and --lr may be others.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A file, or a folder of text files. Default: Python's own source.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = Settings.layers,
    width: Annotated[int, typer.Option(help="Width of the residual path.")] = Settings.width,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = Settings.heads,
    context: Annotated[int, typer.Option(help="Bytes a window.")] = Settings.context,
    batch: Annotated[int, typer.Option(help="Windows a rank and backward.")] = Settings.batch,
    accumulate: Annotated[int, typer.Option(help="Backwards a step; gradients travel once.")] = Settings.accumulate,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Settings.steps,
    lr: Annotated[float, typer.Option(help="Highest learning rate, before a cosine.")] = Settings.lr,
    warmup_steps: Annotated[int, typer.Option(help="Steps until it is reached.")] = Settings.warmup_steps,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.")] = Settings.weight_decay,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations; 0: first and last.")
    ] = Settings.eval_every,
    eval_batches: Annotated[
        int, typer.Option(help="Batches of held-out text, all ranks together.")
    ] = Settings.eval_batches,
    seed: Annotated[int, typer.Option(help="Of the weights and the windows.")] = Settings.seed,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/ and the spec.")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: at the end, or when asked to stop.")
    ] = Settings.checkpoint_every,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads a rank. Default: the host's cores, shared out.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars to OUT/tensorboard.")] = False,
    timeline: Annotated[
        int,
        typer.Option(help="Steps whose phases go to OUT/timeline.json, for ui.perfetto.dev and `commpress report`."),
    ] = Settings.timeline,
) -> None:
    """Train a byte-level GPT with compressed traffic, alone or under torchrun."""
    given = locals()  # the flags' names are the settings'
    rank = os.environ.get("RANK", "0")
    try:
        train(chosen(given))
    except TrainingError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def chosen(given: dict[str, Any]) -> Settings:
    """The settings of these flags, and of the recipe where it alone says what travels. Raises TrainingError."""
    settings = Settings(**{**given, "compress": given["compress"] or Settings.compress})
    if settings.recipe is None:
        return settings
    traffic = read_recipe(settings).traffic
    if given["compress"] is None and traffic.spec is not None:
        settings = replace(settings, compress=traffic.spec)
    if given["parameters"] == Settings.parameters and traffic.parameters is not None:
        settings = replace(settings, parameters=traffic.parameters)
    return settings


def main() -> None:
    """`python -m commpress.launch.train`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


if __name__ == "__main__":
    main()
