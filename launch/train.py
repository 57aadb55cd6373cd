"""Train a byte-level GPT on any number of ranks, its gradients compressed. To read and to change.

    torchrun --nproc-per-node 2 -m commpress.launch.train --compress "topk(0.01)|int4"

Without torchrun it trains on one rank. Ctrl-C or SIGTERM: all ranks stop after the same step and leave a checkpoint (and
torchrun itself, which passes the signal on, ends with a traceback of its own). `--resume` goes on from there; on CPU, bit
for bit as if nothing had happened. What one rank alone meets (a file that it cannot read, a full disk) ends all of them with
one sentence that says on which rank and host.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from commpress import extras, optim
from commpress.comm.agreement import gather_settings, host_name
from commpress.launch import checkpoint, data, parallel, ranks, recipes, run_folder, scalars
from commpress.launch.display import display, say
from commpress.launch.model import GPT
from commpress.launch.optimizers import spread
from commpress.launch.ranks import TrainingError, process_group, said_by_rank_0, together
from commpress.launch.run_record import Traffic, default_threads, write_record
from commpress.launch.settings import (
    STEERING,
    STEERING_BEHIND,
    STEERING_WAYS,
    Settings,
    called,
    check,
    require_alike,
    require_identity,
)
from commpress.notice import global_rank

try:
    import typer
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.train", error, "launch") from None

if TYPE_CHECKING:
    from commpress.comm.timeline import Timeline
    from commpress.model import Recipe, Scheduler

__all__ = ["Settings", "TrainingError", "check", "command", "main", "train"]

CLIP_NORM = 1.0
FINAL_LR = 0.1
"""Where the cosine ends, as a share of --lr."""
CURVE_ROWS = 1000
"""About as many rows the loss curve gets, however long the run is."""
TIMELINE_AFTER = 5
"""Steps before --timeline records: DDP lays its buckets out anew, caches warm up."""


def train(settings: Settings) -> bool:
    """Train, and write record.json and checkpoints into `settings.folder`. Returns False if it was asked to stop early.

    Collective: joins the ranks that torchrun started (or is a single one), unless a process group is already there.
    Raises TrainingError on all ranks; its sentence names the rank and its host where it was one alone.
    """
    with process_group() as device, ranks.in_one_voice(), stop_signals() as stop, contextlib.ExitStack() as closing:
        require_alike(settings, device)
        recipe, text = together(partial(read_all, settings), device)
        torch.set_num_threads(settings.threads or default_threads())
        torch.manual_seed(settings.seed)
        with said_by_rank_0():
            data.require_same_text(text, device)
            if settings.tensorboard:
                scalars.require(device)
        run = Run.begin(settings, recipe, text, device)
        run.leaders = run_folder.leaders(run.out, device)
        if settings.resume or settings.fork is not None:
            run.restore()
            if run.done == settings.steps:
                say(f"{run.out} is already at step {run.done} of {settings.steps}: nothing left to do")
                return True
        if settings.tensorboard and run.rank == 0:
            run.board = scalars.Scalars(run.out / "tensorboard", run.done, sum(run.durations), asdict(run.before))
            closing.callback(run.board.close)
        run.say_what_begins()
        if run.done == 0:
            run.note(None, run.held_out())
        run.steps(stop)
        run.say_what_became()
        return run.done == settings.steps


def read_all(settings: Settings) -> "tuple[Recipe | None, data.Text]":
    """Check the settings, and read what a rank needs before it can train. Raises ValueError or OSError."""
    check(settings)
    recipe = None if settings.recipe is None else read_recipe(settings)
    if recipe is not None:
        require_traffic(settings, recipe)
    out = settings.folder
    if not settings.resume and run_folder.holds_checkpoint(out, "--out"):
        raise TrainingError(f"{out} holds the checkpoint of a run: go on with --resume, or give another --out")
    first = global_rank() == 0  # the others may have no disk in common with it
    if settings.resume and first and not run_folder.holds_checkpoint(out, "--out"):
        raise TrainingError(f"--resume: no checkpoint in {out}; start without --resume")
    if settings.fork is not None and first and not run_folder.holds_checkpoint(settings.fork, "--fork"):
        raise TrainingError(f"--fork {settings.fork}: there is no checkpoint")
    run_folder.require_writable(out)
    text = data.load(settings.data)
    data.require_context(text, settings.context)
    return recipe, text


@dataclass
class Run:
    """A training run on this rank: what it trains, and how far it is."""

    settings: Settings
    device: torch.device
    text: data.Text
    model: GPT
    trained: parallel.Spread
    scheduler: "Scheduler | None"
    recipe: dict[str, Any] | None
    own_windows: torch.Generator
    leaders: list[int] = field(default_factory=list)
    """By rank, which rank leads those that share its folder."""
    done: int = 0
    """Optimizer steps so far, over all restarts."""
    durations: list[float] = field(default_factory=list)
    """Seconds of each."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: Traffic = field(default_factory=Traffic)
    """What earlier starts of this run sent."""
    small: dict[str, Any] | None = None
    """The model as a recipe leaves it."""
    board: scalars.Scalars | None = None

    @classmethod
    def begin(cls, settings: Settings, recipe: "Recipe | None", text: data.Text, device: torch.device) -> "Run":
        """Make the model and spread it over the ranks. Collective."""
        model = together(lambda: GPT(settings.shape).to(device), device)
        scheduler: Scheduler | None = None
        if recipe is None:
            with said_by_rank_0():
                trained = spread(model, settings)
        else:
            trained, scheduler = by_recipe(recipe, model, settings, device)
        windows = data.generator(settings.seed, dist.get_rank())
        said = None if recipe is None else recipe.to_dict()
        return cls(settings, device, text, model, trained, scheduler, said, windows)

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.settings.folder

    @property
    def parameters(self) -> int:
        """Values of the whole model."""
        shape = self.settings.shape
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(shape).parameters())

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when the run goes on."""
        settings, optimizer = self.settings, self.trained.optimizer
        steering = STEERING + (STEERING_BEHIND if isinstance(optimizer, optim.CompressedOptimizer) else ())
        return {
            **{name: getattr(settings, name) for name in dict.fromkeys(steering + STEERING_WAYS[settings.parallel])},
            "world_size": dist.get_world_size(),
            "text": list(self.text.fingerprint),
            "recipe": self.recipe,
            "steps": settings.steps,
        }

    @property
    def traffic(self) -> Traffic:
        """What was sent so far, over all restarts."""
        return self.before + Traffic.of(self.trained.session.report())

    def held_out(self) -> float:
        """The loss on held-out text. Collective."""
        with self.trained.alike():
            return validate(self.model, self.text.validation, self.settings, self.device)

    # --- restarts

    def restore(self) -> None:
        """Go on from the newest checkpoint of --out or --fork. Collective."""
        settings, source = self.settings, self.settings.fork or self.out
        state = run_folder.load_shared(source, self.device)
        saved = together(partial(self._own_states, state, source), self.device)
        own = saved[min(self.rank, len(saved) - 1)]
        self.done, self.curve, self.before = state["step"], state["curve"], Traffic(**state["traffic"])
        self.durations = state["durations"].tolist()
        world_size = state["identity"]["world_size"]
        with said_by_rank_0():
            self.trained.load(state, own)
            if self.scheduler is not None and "scheduler" in own:
                self.scheduler.load_state_dict(own["scheduler"])
            elif self.scheduler is not None:
                self.scheduler.begin_at(self.done)
            same = world_size == dist.get_world_size()
            self.trained.session.load_state_dict(own["session"] if same else [each["session"] for each in saved])
        if self.rank < world_size:  # others draw windows that nobody has drawn
            self.own_windows.set_state(own["windows"])
            set_random_states(own["random"])
        if not same:
            say(f"--resume: that run had {world_size} ranks, this one has {dist.get_world_size()}")
        if (steps := state["identity"].get("steps", settings.steps)) != settings.steps:
            say(f"--steps {settings.steps}, not {steps} as before: the learning rate follows the new cosine from here")

    def _own_states(self, state: dict[str, Any], source: Path) -> list[dict[str, Any]]:
        """This rank's states of a checkpoint, or with another number of ranks those of all that there were, by rank."""
        settings = self.settings
        require_identity(state["identity"], self.identity, settings, source)
        flag = "--resume" if settings.fork is None else f"--fork {source}"
        if settings.fork is not None and self.scheduler is None and state["identity"].get("recipe"):
            raise ValueError(f"{flag}: that run has a recipe, this one none; expected --recipe")
        if settings.fork is not None and state["step"] >= settings.steps:
            raise ValueError(f"{flag}: it is at step {state['step']}, expected --steps above that")
        if state["step"] > settings.steps:
            raise ValueError(
                f"{flag}: the run in {source} is at step {state['step']}, this one has --steps {settings.steps}"
            )
        saved = state["identity"]["world_size"]
        if saved == dist.get_world_size():
            own = checkpoint.load_own(source, state["step"], self.rank)
            return [own] * saved
        return [checkpoint.load_own(source, state["step"], rank) for rank in range(saved)]

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        common, alone = self.trained.state()
        shared = {
            **common,
            "identity": self.identity,
            "durations": torch.tensor(self.durations, dtype=torch.float64, device="cpu"),
            "curve": self.curve,
            "traffic": asdict(self.traffic),
        }
        own = {**alone, "windows": self.own_windows.get_state(), "random": random_states()}
        if self.scheduler is not None:
            own["scheduler"] = self.scheduler.state_dict()
        with self.trained.alike():  # what is shared may be the model's own memory
            together(partial(checkpoint.write, self.out, self.done, self.rank, shared, own), self.device)
        leads = self.leaders[self.rank] == self.rank
        together(lambda: checkpoint.publish(self.out, self.done) if leads else None, self.device)

    # --- what is written down

    def note(self, train_loss: float | None, validation_loss: float | None) -> None:
        """Add a row to the loss curve."""
        traffic = self.traffic
        self.curve.append(
            {
                "step": self.done,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "seconds": sum(self.durations),
                "sent_bytes": traffic.sent_bytes,
                "dense_bytes": traffic.dense_bytes,
            }
        )
        if self.board:
            self.board.note(self.curve[-1], self.trained.optimizer.param_groups[0]["lr"], asdict(traffic))

    def record(self) -> None:
        """Write record.json on rank 0. Collective."""
        report = self.trained.session.report()
        write = partial(
            write_record,
            *(self.out, self.settings, self.text, self.parameters, self.device, self.durations, self.curve),
            *(report, self.before + Traffic.of(report), self.recipe, self.small),
        )
        together(write if self.rank == 0 else lambda: None, self.device)

    def say_what_begins(self) -> None:
        """Print a line on the run."""
        say(
            f"{self.parameters / 1e6:.1f} M parameters, {called(self.settings)}, {dist.get_world_size()} ranks "
            f"({dist.get_backend()}, {self.device.type}, {torch.get_num_threads()} threads each), "
            f"{len(self.text.train) / 1e6:.1f} MB of text from {self.text.source}"
            + (f", {self.text.skipped} files skipped that are not text" if self.text.skipped else "")
            + (f"; going on at step {self.done}" if self.done else "")
        )
        if any(self.leaders):
            say(f"--out {self.out} is a folder of its own on each host: each keeps the files of its own ranks")

    def say_what_became(self) -> None:
        """Print what the run came to. Collective."""
        settings, done = self.settings, self.done
        if done < settings.steps:
            self.record()
            instead = " instead of --fork" if settings.fork is not None else ""
            say(
                f"stopped at step {done} of {settings.steps}; "
                f"the same command with --resume{instead} goes on from {self.out}"
            )
            return
        say(str(self.trained.session.report()).rstrip())
        say(
            f"validation loss {self.curve[-1]['validation_loss']:.4f} after {done} steps; "
            f"record in {self.out / 'record.json'}"
        )
        if (small := self.small) is not None:
            say(
                f"{small['sparsity']:.0%} pruned, {small['bytes'] / 1e6:.2f} MB in {self.out / recipes.SMALL}, "
                f"{small['times_smaller']:.1f} times smaller than in float32; read back its validation loss is "
                f"{small['validation_loss']:.4f}"
            )

    # --- training

    def steps(self, stop: "Stop") -> None:
        """Train until all steps are done, or until a rank is asked to stop. Collective."""
        settings, first_recorded = self.settings, self.done + TIMELINE_AFTER
        recording = contextlib.ExitStack()
        timeline: Timeline | None = None
        with display(settings, self.done) as show, recording:
            stopping = False
            while self.done < settings.steps and not stopping:
                if settings.timeline and self.done == first_recorded:
                    timeline = recording.enter_context(self.trained.session.timeline())
                train_loss, stopping = self.step(stop)
                if timeline and (stopping or self.done in (settings.steps, first_recorded + settings.timeline)):
                    recording.close()
                    write = partial(timeline.write, self.out / "timeline.json")
                    together(write if self.rank == 0 else lambda: None, self.device)
                    timeline = None
                due = self.done == settings.steps or (settings.eval_every > 0 and self.done % settings.eval_every == 0)
                validation_loss = self.held_out() if due else None
                if due or self.done % math.ceil(settings.steps / CURVE_ROWS) == 0:
                    self.note(train_loss, validation_loss)
                phase = "" if self.scheduler is None else recipes.told(self.scheduler)
                show.step(self.done, train_loss, validation_loss, self.durations, self.traffic, phase)
                if self.done == settings.steps and self.scheduler is not None:
                    self.store_small(self.scheduler)
                if due:
                    self.record()
                every = settings.checkpoint_every
                if stopping or self.done == settings.steps or (every > 0 and self.done % every == 0):
                    self.save()
        if settings.timeline and self.done <= first_recorded:
            say(f"no timeline: it starts {TIMELINE_AFTER} steps after the start, and this run had no more than that")

    def step(self, stop: "Stop") -> tuple[float, bool]:
        """One optimizer step: the mean loss, and whether a rank was asked to stop. Collective."""
        started, settings, trained, device = time.perf_counter(), self.settings, self.trained, self.device
        for group in trained.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, settings)
        loss = torch.zeros((), dtype=torch.float32, device=device)
        for part in range(settings.accumulate):
            x, y = data.sample(self.text.train, settings.batch, settings.context, self.own_windows)
            # only the last part's backward synchronises the gradients
            with contextlib.nullcontext() if part == settings.accumulate - 1 else trained.accumulating():
                x = x.to(device)
                output = trained.model(x)
                task_loss = cross_entropy(output, y.to(device))
                whole_loss = task_loss if self.scheduler is None else self.scheduler.loss(task_loss, output, x)
                trained.backward(whole_loss / settings.accumulate)
            loss += task_loss.detach() / settings.accumulate
        norm = trained.clip(CLIP_NORM)
        # one small exchange a step: mean loss and norm, and whether any rank was asked to stop
        asked = torch.tensor(float(stop), dtype=torch.float64, device=device)
        world_size = dist.get_world_size()
        sums = torch.stack([loss.double() / world_size, norm.double() / world_size, asked])
        dist.all_reduce(sums)
        train_loss, norm_of_all, stopping = sums[0].item(), sums[1].item(), sums[2].item() > 0
        if not math.isfinite(train_loss) or not math.isfinite(norm_of_all):
            raise TrainingError(
                f"step {self.done + 1}: the loss is {train_loss} and the gradient's norm {norm_of_all}"
                f"{self._whose(loss.item())}, expected finite numbers; --lr {settings.lr} is probably too high"
            )
        trained.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.done += 1
        if self.done == settings.steps and isinstance(trained, parallel.Local):
            trained.outer.sync()
        self.durations.append(time.perf_counter() - started)
        return train_loss, stopping

    def _whose(self, loss: float) -> str:
        """The ranks whose own loss is not finite, in words, if the others' are. Collective."""
        group = dist.distributed_c10d._get_default_group()
        found = gather_settings({"host": host_name(), "good": math.isfinite(loss)}, group, self.device)
        bad = [ranks.named(rank, str(of["host"])).removesuffix(": ") for rank, of in enumerate(found) if not of["good"]]
        return f" (a loss that is not finite on {', '.join(bad)})" if 0 < len(bad) < len(found) else ""

    def store_small(self, scheduler: "Scheduler") -> None:
        """Write the model as small as the recipe left it, and measure what was written. Collective."""
        file = self.out / recipes.SMALL
        model, self.small = recipes.store(file, self.settings.shape, self.trained, scheduler, self.device)
        loss = validate(model.to(self.device), self.text.validation, self.settings, self.device)
        self.small["validation_loss"] = loss


def by_recipe(
    recipe: "Recipe", model: GPT, settings: Settings, device: torch.device
) -> "tuple[parallel.Spread, Scheduler]":
    """As `spread`, and what carries out the recipe. Collective."""
    from commpress.model import Scheduler, prepare

    def get_ready() -> GPT | None:
        prepare(model, recipe)
        return recipes.teacher(recipe, settings.context)

    teacher = together(get_ready, device)
    with said_by_rank_0():
        trained = spread(model, settings)
        teacher = None if teacher is None else teacher.to(device)
        return trained, Scheduler(recipe, model, trained.optimizer, session=trained.session, teacher=teacher)


def read_recipe(settings: Settings) -> "Recipe":
    """The recipe of --recipe. Raises TrainingError if it cannot be followed in this run."""
    assert settings.recipe is not None
    try:
        return recipes.read(settings.recipe, settings.steps)
    except OSError as error:
        raise TrainingError(f"cannot read --recipe {settings.recipe}: {error.strerror or error}") from None
    except ValueError as error:
        where = "" if str(settings.recipe) in str(error) else f" {settings.recipe}"
        raise TrainingError(f"--recipe{where}: {error}") from None


def require_traffic(settings: Settings, recipe: "Recipe") -> None:
    """Raises TrainingError if the settings say other specs than the recipe: neither shall be left out in silence."""
    for name, key in (("compress", "spec"), ("parameters", "parameters")):
        wanted, given = getattr(recipe.traffic, key), getattr(settings, name)
        if wanted is not None and given != wanted:
            raise TrainingError(f"--{name} {given}: the recipe has traffic.{key} {wanted!r}; leave one of them out")


def learning_rate(step: int, settings: Settings) -> float:
    """For the update after `step` updates: linear warm-up, then a cosine down to FINAL_LR."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    part = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * part)))


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
        summed = [cross_entropy(model(x), y).item() * len(part), len(part)]
        total += torch.tensor(summed, dtype=torch.float32, device=device)
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


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


def random_states() -> dict[str, Tensor]:
    """Of torch's own generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


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
    rank = global_rank()
    try:
        with process_group() as device, ranks.not_disturbed_in_ending():
            settings = together(partial(chosen, given), device)
            train(settings)
    except TrainingError as error:
        if rank == 0 or isinstance(error, ranks.LoneError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


def chosen(given: dict[str, Any]) -> Settings:
    """The settings of these flags, and of the recipe where it alone says what travels. Raises TrainingError."""
    settings = Settings(**{**given, "compress": Settings.compress if given["compress"] is None else given["compress"]})
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
