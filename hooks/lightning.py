"""Lightning, by a strategy: DDPStrategy with compressed gradients.

A strategy is what wraps the model and saves and loads checkpoints, on every rank and with their paths; a callback is told of
none of these. It loads the model before it sets up, the optimizers afterwards. `DDPStrategy(ddp_comm_hook=...)` registers a
hook on CUDA only and says nothing elsewhere, and keeps no state of it.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commpress import extras
from commpress.comm.codecs import Codec
from commpress.comm.rules import Spec
from commpress.comm.session import Session
from commpress.files import DamagedFileError, pack_state, unpack_state
from commpress.hooks import ddp, ending, rank_checkpoint
from commpress.hooks.accelerate import inner
from commpress.hooks.recipe_traffic import spec_of
from commpress.notice import warn
from commpress.optim.base import CompressedOptimizer

try:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.rank_zero import rank_zero_info
except ModuleNotFoundError as error:
    raise extras.missing("commpress.hooks.lightning", error, "lightning") from error

if TYPE_CHECKING:
    from commpress.hooks.limits import Limits
    from commpress.model import Recipe, Scheduler
    from commpress.model.judgement.quality import Loss


class CompressedDDP(DDPStrategy):
    """A strategy that compresses gradients: `Trainer(strategy=CompressedDDP("int4"))` in place of `strategy="ddp"`.

    `settings` are those of DDPStrategy, and those of `commpress.hooks.ddp.attach`. If `configure_optimizers` returns one of
    `commpress.optim`, its update is sent in place of the gradient. Beside each checkpoint there is one file a rank,
    `NAME.ckpt.commpress-rank0` and so on, which `fit(ckpt_path=...)` reads. The loggers get `session.log()` every
    `log_every_n_steps`. Report and receipt are logged when training ends. `session` exists from `on_fit_start` on.

    With a `recipe` of `commpress.model` the module is pruned, quantised and distilled while it trains. `scheduler` exists as
    long as `session`. A module that is distilled returns `self.trainer.strategy.scheduler.loss(loss, output, x)` from its
    `training_step`, and `teacher` is the model that it learns from. A recipe with an [export] needs `example_inputs`, the
    positional arguments of the module's forward; its files are written to the Trainer's `default_root_dir` when training ends.
    A training that ends before the recipe, or a format that cannot be written, is a warning.

    A recipe with a [budget] measures on `held_out`, this rank's batches (inputs, targets), inputs as forward takes them
    (default: the validation batches), by `budget_loss` of outputs and targets (default: cross entropy for whole targets, else
    squared error). At the end the exported file is compared with `dense`, or without it the module at the budget's `start`. A
    limit that is missed is a warning, and `default_root_dir/judged` has the figures.

    Without `gradients` the spec is that of the recipe's [traffic], else `auto`, which finds one during training.

    Raises ValueError for `ddp_comm_*` settings and for a recipe with another spec. `fit` raises ValueError on all ranks for an
    unknown spec, for ranks that differ, for files that do not belong to the checkpoint, and for `gradient_clip_val` or a second
    optimizer beside a compressed one.
    """

    def __init__(
        self,
        gradients: Spec | None = None,
        *,
        exchange: str | None = None,
        error_feedback: bool = True,
        buffers: str | Codec | None = None,
        recipe: "Recipe | None" = None,
        teacher: nn.Module | None = None,
        example_inputs: tuple[Any, ...] | None = None,
        held_out: Sequence[tuple[Any, Tensor]] | None = None,
        budget_loss: "Loss | None" = None,
        dense: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        if teacher is not None and recipe is None:
            raise ValueError("CompressedDDP(teacher=): expected a recipe that distils, recipe=")
        if hooks := sorted(name for name in settings if name.startswith("ddp_comm_")):
            raise ValueError(f"CompressedDDP registers a hook of its own, got {', '.join(hooks)}")
        super().__init__(**settings)
        self.session: Session | None = None
        self.scheduler: Scheduler | None = None
        self._gradients = spec_of(gradients, recipe, "CompressedDDP(gradients)")
        self._recipe, self._teacher = recipe, teacher
        self._example_inputs = example_inputs
        self._limits: Limits | None = None
        self._of_budget = (held_out, budget_loss, dense)
        self._compression: dict[str, Any] = {"exchange": exchange, "error_feedback": error_feedback, "buffers": buffers}
        self._loaded_from = ""

    def setup(self, trainer: Trainer) -> None:
        """Wrap the model, and attach to the wrapper."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(self.model, DistributedDataParallel)
            self.session = ddp.attach(
                self.model,
                self._gradients,
                optimizer=self._compressed(trainer),
                grad_scaler=getattr(self.precision_plugin, "scaler", None),
                **self._compression,
            )
            self._follow_recipe(trainer)

    def _follow_recipe(self, trainer: Trainer) -> None:
        if self._recipe is None:
            return
        from commpress.model import Scheduler

        assert self.lightning_module is not None
        module, before, done = self.lightning_module, self.scheduler, None
        if before is not None:  # a second fit goes on where the first one ended
            done = before.state_dict() if before.model is module and trainer.ckpt_path is None else None
            before.close()
        teacher = None if self._teacher is None else self._teacher.to(self.root_device)
        restoring = done is not None or trainer.ckpt_path is not None
        if (limits := self._limits_of(module)) is not None:
            assert isinstance(self.model, DistributedDataParallel)
            limits.read(lambda: _validation_batches(trainer), self.model.process_group)
            if not restoring:
                limits.keep(0)
        self.scheduler = Scheduler(
            self._recipe,
            module,
            self.optimizers,
            session=self.session,
            teacher=teacher,
            restoring=restoring,
            held_out=limits.batches if limits is not None else (),
            budget_loss=limits.loss if limits is not None else None,
            example_inputs=self._example_inputs,
        )
        if done is not None:
            self.scheduler.load_state_dict(done)

    def _limits_of(self, module: nn.Module) -> "Limits | None":
        """Return what the recipe's budget is compared with; call it before the module is prepared."""
        if self._recipe is None or self._recipe.budget is None:
            return None
        if self._limits is None or self._limits.model is not module:
            from commpress.hooks import limits

            self._limits = limits.Limits(self._recipe, module, *self._of_budget)
        return self._limits

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module, which a recipe has made ready for what it may have become."""
        module = self.lightning_module
        if self._recipe is None or module is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        from commpress.model import prepare, quantization

        if module.trainer.state.fn == TrainerFn.FITTING:
            self._limits_of(module)
        recipe = self._recipe
        if recipe.chooses:
            recipe = rank_checkpoint.chosen_recipe(self._read, self.global_rank) or recipe
        prepare(module, recipe)
        super().load_model_state_dict(checkpoint, strict)
        if recipe.quantize and module.trainer.state.fn != TrainerFn.FITTING:  # else the scheduler does it
            file = self._read(0)
            if file is None or "scheduler" not in file:
                warn(
                    f"commpress: {self._loaded_from} has no state of a recipe beside it; its quantisers stay as they are"
                )
            else:
                quantization.load_state_dict(module, file["scheduler"]["quantization"])

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's `training_step`, and tell the session the loss."""
        output = super().training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self.session is not None and isinstance(loss, Tensor) and loss.numel() == 1:
            self.session.note_loss(loss)
        return output

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **named: Any) -> Any:
        """Step, and behind the last of the optimizers do what the recipe wants done."""
        output = super().optimizer_step(optimizer, closure, model, **named)
        if inner(optimizer) is inner(self.optimizers[-1]):
            if self.scheduler is not None:
                if self._limits is not None:
                    self._limits.keep(self.scheduler.done + 1)
                self.scheduler.step()
            self._log_traffic()
        return output

    def _log_traffic(self) -> None:
        """Give the loggers what the session says, on rank 0, in the steps in which they get what the module logs."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        step, every = trainer.global_step, trainer.log_every_n_steps  # the step that is being taken, from 0
        if self.session is None or not trainer.is_global_zero or not every or (step + 1) % every:
            return
        if trainer.loggers and (found := self.session.log()):
            for logger in trainer.loggers:
                logger.log_metrics(found, step=step)

    def _compressed(self, trainer: Trainer) -> CompressedOptimizer | None:
        optimizers = [optimizer for optimizer in self.optimizers if isinstance(optimizer, CompressedOptimizer)]
        if not optimizers:
            return None
        name = type(optimizers[0]).__name__
        if len(self.optimizers) > 1:
            raise ValueError(
                f"configure_optimizers returned {len(self.optimizers)} optimizers: {name} must be the only one"
            )
        if clip := trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val={clip} would clip the update of {name}, which is not a gradient after its warm-up: "
                f"leave it out and set {name}(..., max_norm={clip})"
            )
        return optimizers[0]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint on rank 0, and this rank's file beside it."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.session is not None and "optimizer_states" in checkpoint:  # not weights only
            content = rank_checkpoint.content(self.session, checkpoint["global_step"], self.scheduler, self._limits)
            state = {"commpress": pack_state(content)}
            self.checkpoint_io.save_checkpoint(state, _beside(filepath, self.session.rank), storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the checkpoint on rank 0, and this rank's file beside it."""
        super().remove_checkpoint(filepath)
        if self.session is not None:
            self.checkpoint_io.remove_checkpoint(_beside(filepath, self.session.rank))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint on every rank."""
        self._loaded_from = str(checkpoint_path)
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the optimizers, then the session. Collective."""
        super().load_optimizer_state_dict(checkpoint)
        assert self.session is not None
        assert isinstance(self.model, DistributedDataParallel)

        found = rank_checkpoint.restore(
            self.session,
            self.model.process_group,
            checkpoint["global_step"],
            self._read,
            self.scheduler,
            self._limits,
        )
        if not found:
            warn(f"commpress: {self._loaded_from} was saved without compression; what feedback keeps starts empty")

    def _read(self, rank: int) -> rank_checkpoint.State | None:
        path = _beside(self._loaded_from, rank)
        try:
            file = self.checkpoint_io.load_checkpoint(path, weights_only=True)
        except FileNotFoundError:
            return None
        except OSError:
            raise
        except Exception as error:  # of a library that reads a damaged file
            raise DamagedFileError(f"{path}: damaged: {error}") from error
        state: rank_checkpoint.State = unpack_state(file.get("commpress") if isinstance(file, dict) else None, path)
        return state

    def on_train_end(self) -> None:
        """Say what was sent, and write what the recipe exports."""
        super().on_train_end()
        if self.session is not None:
            rank_zero_info(f"\n{self.session.report()}{self.session.receipt()}")
        if self.session is not None and self.scheduler is not None:
            assert self.lightning_module is not None
            ending.finish(self.session, self.scheduler, self._limits, self.lightning_module.trainer.default_root_dir)


def _validation_batches(trainer: Trainer) -> list[Any]:
    """This rank's validation batches, as many as the Trainer takes. Raises ValueError without one loader of them."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = trainer.val_dataloaders
    found = [loaders] if hasattr(loaders, "batch_sampler") else list(loaders or ())
    if len(found) != 1:
        raise ValueError(
            f"the recipe has a [budget]: expected one validation dataloader and a validation_step, got {len(found)} loaders; "
            "or held_out=, batches (inputs, targets)"
        )
    most = trainer.num_val_batches[0]
    return list(itertools.islice(found[0], None if most == float("inf") else int(most)))


def _beside(filepath: Any, rank: int) -> str:
    """Where a rank's file stands beside a checkpoint; beside its target if that is a link, as of `save_last="link"`."""
    path = str(filepath)
    return f"{os.path.realpath(path) if os.path.islink(path) else path}.commpress-rank{rank}"
