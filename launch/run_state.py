"""A training run on this rank: its task and progress, and how they are saved, restored and recorded."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commpress import optim
from commpress.launch import checkpoint, data, recipes, run_folder, strategies
from commpress.launch.display import say
from commpress.launch.identity import RESUME_KEYS, RESUME_KEYS_COMPRESSED, RESUME_KEYS_OF, require_identity
from commpress.launch.run_record import Traffic, write_record
from commpress.launch.runtime import same_error_on_all_ranks, together
from commpress.launch.scalars import Scalars
from commpress.launch.settings import Settings
from commpress.launch.tasks import Task

if TYPE_CHECKING:
    from commpress.model import Recipe, Scheduler
    from commpress.model.search import Paths
    from commpress.model.search.spaces import Choice


@dataclass
class Run:
    """A training run on this rank: its task and its progress."""

    settings: Settings
    device: torch.device
    task: Task
    model: nn.Module
    strategy: strategies.Strategy
    scheduler: "Scheduler | None"
    recipe: dict[str, Any] | None
    own_windows: torch.Generator
    leaders: list[int] = field(default_factory=list)
    """For each rank the leader of the ranks that share its folder."""
    done: int = 0
    """Optimizer steps so far, over all restarts."""
    durations: list[float] = field(default_factory=list)
    """Seconds of each step."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: Traffic = field(default_factory=Traffic)
    """Traffic of earlier starts of this run."""
    small: dict[str, Any] | None = None
    """The model after a recipe."""
    board: Scalars | None = None
    choice: "Choice | None" = None
    """The choice of a search in the model."""
    paths: "Paths | None" = None
    """The paths of a supernet in training."""
    is_search: bool = False
    """Whether it is the training before the trials of another run's search."""

    @classmethod
    def begin(
        cls,
        settings: Settings,
        recipe: "Recipe | None",
        task: Task,
        device: torch.device,
        said: dict[str, Any] | None = None,
        choice: "Choice | None" = None,
    ) -> "Run":
        """Make the model, spread it over the ranks and make its folder. Collective.

        `said` is the recipe of the file, if a search or a budget has extended it.
        """
        model = together(lambda: task.model().to(device), device)
        strategy, scheduler = recipes.follow(recipe, model, task, settings, device)
        windows = data.generator(settings.seed, dist.get_rank())
        said = recipe.to_dict() if said is None and recipe is not None else said
        leaders = run_folder.leaders(settings.folder, device)
        return cls(settings, device, task, model, strategy, scheduler, said, windows, leaders, choice=choice)

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.settings.folder

    @property
    def finished(self) -> bool:
        """Return whether all steps are done."""
        return self.done == self.settings.steps

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings and texts that must not change when the run goes on."""
        settings, compressed = self.settings, isinstance(self.strategy.optimizer, optim.CompressedOptimizer)
        keys = RESUME_KEYS + (RESUME_KEYS_COMPRESSED if compressed else ()) + RESUME_KEYS_OF[settings.parallel]
        return {
            **{name: getattr(settings, name) for name in dict.fromkeys(keys)},
            "world_size": dist.get_world_size(),
            "text": list(self.task.fingerprint),
            "recipe": self.recipe,
            "steps": settings.steps,
        }

    @property
    def traffic(self) -> Traffic:
        """Return the traffic so far, over all restarts."""
        return self.before + Traffic.of(self.strategy.session.report())

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
        with same_error_on_all_ranks():
            self.strategy.load(state, own)
            if self.scheduler is not None and "scheduler" in own:
                self.scheduler.load_state_dict(own["scheduler"])
            elif self.scheduler is not None:
                self.scheduler.begin_at(self.done)
            same = world_size == dist.get_world_size()
            self.strategy.session.load_state_dict(own["session"] if same else [each["session"] for each in saved])
        if self.rank < world_size:  # others draw windows that nobody has drawn
            self.own_windows.set_state(own["windows"])
            set_random_states(own["random"])
        if not same:
            say(f"--resume: that run had {world_size} ranks, this one has {dist.get_world_size()}")
        if (steps := state["identity"].get("steps", settings.steps)) != settings.steps:
            say(f"--steps {settings.steps}, not {steps} as before: the learning rate follows the new cosine from here")

    def _own_states(self, state: dict[str, Any], source: Path) -> list[dict[str, Any]]:
        """Return this rank's states of a checkpoint; with another number of ranks, those of all saved ranks, by rank."""
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
        common, alone = self.strategy.state()
        shared = {
            **common,
            "identity": self.identity,
            "durations": torch.tensor(self.durations, dtype=torch.float64, device="cpu"),
            "curve": self.curve,
            "traffic": asdict(self.traffic),
        }
        if self.scheduler is not None:
            shared["chosen"] = {"recipe": self.scheduler.recipe.to_dict(), "choice": self.choice}
        own = {**alone, "windows": self.own_windows.get_state(), "random": random_states()}
        if self.scheduler is not None:
            own["scheduler"] = self.scheduler.state_dict()
        with self.strategy.synced():  # what is shared may be the model's own memory
            together(partial(checkpoint.write, self.out, self.done, self.rank, shared, own), self.device)
        leads = self.leaders[self.rank] == self.rank
        together(lambda: checkpoint.publish(self.out, self.done) if leads else None, self.device)

    # --- what is written down

    def add_to_curve(self, train_loss: float | None, validation_loss: float | None) -> None:
        """Add a row to the loss curve, and to TensorBoard's scalars."""
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
            self.board.note(self.curve[-1], self.strategy.optimizer.param_groups[0]["lr"], self.strategy.session.log())

    def write_record(self) -> None:
        """Write record.json on rank 0. Collective."""
        session = self.strategy.session
        report = session.report()
        write = partial(
            write_record,
            *(
                self.out,
                self.settings,
                self.task.record(),
                self.task.parameters,
                self.device,
                self.durations,
                self.curve,
            ),
            *(report, session.receipt(), self.before + Traffic.of(report), self.recipe, self.small),
        )
        together(write if self.rank == 0 else lambda: None, self.device)


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's own generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
