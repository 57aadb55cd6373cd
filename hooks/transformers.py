"""The Trainer of Hugging Face Transformers, by a callback.

It wraps the model by Accelerate when training begins, resumes model and optimizer, and then calls `on_train_begin` on every
rank; callbacks are not told of the wrapper, nor of the folder that is resumed from, so this one holds the Trainer. `on_save`
comes on every rank once a checkpoint's folder is there. A second `train()` goes on with the wrapper of the first.

A recipe's teacher speaks where the Trainer computes its loss, and its steps are the optimizer's (`on_optimizer_step`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commpress import extras
from commpress.comm.rules import Spec
from commpress.comm.session import Session
from commpress.hooks import ddp, ending, rank_checkpoint
from commpress.hooks.accelerate import inner, prepared, unwrapped_forward
from commpress.hooks.recipe_traffic import spec_of
from commpress.notice import global_rank, warn
from commpress.optim.base import CompressedOptimizer

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint
except ModuleNotFoundError as error:
    raise extras.missing("commpress.hooks.transformers", error, "transformers") from error

if TYPE_CHECKING:
    from commpress.hooks.limits import Limits
    from commpress.model import Recipe, Scheduler
    from commpress.model.judgement.quality import Loss

REPORT = "commpress.json"
"""The report's file in `output_dir`."""


class Compression(TrainerCallback):
    """A callback that compresses the gradients of a Trainer under DDP: `trainer.add_callback(Compression(trainer, "int4"))`.

    Without `gradients` the spec is that of the recipe's [traffic], else `auto`, which finds one during training. Another spec
    than the recipe's is a ValueError.

    If the Trainer's optimizer is one of `commpress.optim`, its update is sent in place of the gradient. Checkpoints get one
    file a rank, which `train(resume_from_checkpoint=...)` reads. The Trainer's step logs, and so the trackers of `report_to`,
    contain `session.log()`. At the end rank 0 prints report and receipt, and writes the report to `output_dir/commpress.json`.
    `session` exists once training has begun. `settings` are those of `commpress.hooks.ddp.attach` except `optimizer` and
    `grad_scaler`, which are the Trainer's.

    With a `recipe` of `commpress.model` the model is pruned, quantised and distilled while it trains; `teacher` is the model
    that it learns from, and takes the same inputs. `scheduler` exists once training has begun. A recipe with an [export] needs
    `example_inputs`, the model's positional arguments; its files are written to `output_dir` when training ends. A
    training that ends before the recipe, or a format that cannot be written, is a warning.

    A recipe with a [budget] measures on `held_out`, this rank's batches (inputs, targets), inputs as forward takes them
    (default: the Trainer's evaluation batches), by `budget_loss` of outputs and targets (default: cross entropy for whole
    targets, else squared error). At the end the exported file is compared with `dense`, or without it the model at the budget's
    `start`. A limit that is missed is a warning, and `output_dir/judged` has the figures.

    `train` raises TypeError if the model is not in a DistributedDataParallel, ValueError on all ranks for an unknown spec, for
    ranks that differ, for files that do not belong to the checkpoint, and for `max_grad_norm` beside a compressed optimizer.
    """

    def __init__(
        self,
        trainer: Trainer,
        gradients: Spec | None = None,
        *,
        recipe: "Recipe | None" = None,
        teacher: nn.Module | None = None,
        example_inputs: tuple[Any, ...] | None = None,
        held_out: Sequence[tuple[Any, Tensor]] | None = None,
        budget_loss: "Loss | None" = None,
        dense: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        self.session: Session | None = None
        self.scheduler: Scheduler | None = None
        self._limits: Limits | None = None
        self._recipe, self._teacher, self._example_inputs = recipe, teacher, example_inputs
        self._trainer, self._settings = trainer, settings
        self._gradients = spec_of(gradients, recipe, "Compression(gradients)")
        self._model: DistributedDataParallel | None = None
        self._resumed: str | bool | None = None
        if teacher is not None and recipe is None:
            raise ValueError("Compression(teacher=): expected a recipe that distils, recipe=")
        self._train, self._log, self._training_step = trainer.train, trainer.log, trainer.training_step
        trainer.train, trainer.log, trainer.training_step = self._remember, self._log_traffic, self._note_loss
        if recipe is not None:
            from commpress.model import prepare

            if trainer.model_init is not None:
                raise ValueError(
                    "Compression(recipe=): the Trainer has model_init, which makes new models; expected model="
                )

            if recipe.budget is not None:
                from commpress.hooks import limits

                self._limits = limits.Limits(recipe, trainer.model, held_out, budget_loss, dense)
            prepare(trainer.model, recipe)  # before a checkpoint is loaded into it
            self._compute_loss = trainer.compute_loss
            trainer.compute_loss = self._loss

    def _remember(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._resumed = resume_from_checkpoint
        folder = self._folder()
        if folder and self._recipe is not None and self._recipe.chooses:
            from commpress.model import prepare

            if chosen := rank_checkpoint.chosen_recipe(lambda rank: rank_checkpoint.read(folder, rank), global_rank()):
                prepare(self._trainer.model, chosen)
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def _folder(self) -> str | None:
        """Return the folder that training resumes from."""
        found = get_last_checkpoint(self._trainer.args.output_dir) if self._resumed is True else self._resumed
        return found or None

    def _log_traffic(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # not in on_log: the trackers of `report_to` are called before callbacks that were added later
        if self.session is not None and "loss" in logs:  # of steps, not of an evaluation or a whole training
            logs.update(self.session.log())
        self._log(logs, *args, **kwargs)

    def _note_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = self._training_step(*args, **kwargs)
        if self.session is not None and loss.numel() == 1:
            self.session.note_loss(loss)
        return loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, if this wrapper is new, and restore."""
        trainer = self._trainer
        model, optimizer = prepared(trainer.accelerator, trainer.model_wrapped), inner(trainer.optimizer)
        compressed = optimizer if isinstance(optimizer, CompressedOptimizer) else None
        if compressed is not None and args.max_grad_norm > 0:
            name = type(compressed).__name__
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} would clip the update of {name}, which is not a gradient after its "
                f"warm-up: set TrainingArguments(max_grad_norm=0) and {name}(..., max_norm={args.max_grad_norm})"
            )
        if self.session is None or model is not self._model:
            scaler = trainer.accelerator.scaler
            self.session = ddp.attach(
                model, self._gradients, optimizer=compressed, grad_scaler=scaler, **self._settings
            )
            self._model = model
            self._follow_recipe(optimizer, restoring=bool(self._resumed))
        if compressed is not None:
            compressed.watch.on = False  # the Trainer learns the norm by clipping at infinity
        if not (folder := self._folder()):
            return
        at, scheduler, limits = state.global_step, self.scheduler, self._limits
        found = rank_checkpoint.load(self.session, model.process_group, folder, at, scheduler=scheduler, limits=limits)
        if not found:
            warn(
                f"commpress: {folder} was saved without compression, or by save_only_model; what feedback keeps starts empty"
            )

    def _follow_recipe(self, optimizer: Any, restoring: bool) -> None:
        if self._recipe is None:
            return
        from commpress.model import Scheduler

        assert self._model is not None
        teacher = None if self._teacher is None else self._teacher.to(self._trainer.args.device)
        model, session, limits = self._model.module, self.session, self._limits
        if limits is not None:
            from commpress.hooks.eval_batches import batches_for

            limits.read(lambda: batches_for(self._trainer, self._compute_loss, limits.loss), self._model.process_group)
            if not restoring:
                limits.keep(0)
        with unwrapped_forward(model):
            self.scheduler = Scheduler(
                self._recipe,
                model,
                optimizer,
                session=session,
                teacher=teacher,
                restoring=restoring,
                held_out=limits.batches if limits is not None else (),
                budget_loss=limits.loss if limits is not None else None,
                example_inputs=self._example_inputs,
            )

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **named: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the Trainer's loss, and in training the teacher's part of it."""
        loss, outputs = self._compute_loss(model, inputs, return_outputs=True, **named)
        if model.training and self.scheduler is not None:
            # a loss that is a share of an accumulation's mean is made a mean, as the teacher's is, and a share again
            shares = self._trainer.current_gradient_accumulation_steps if self._loss_is_a_share(named) else 1
            loss = self.scheduler.loss(loss * shares, outputs, **inputs) / shares
        return (loss, outputs) if return_outputs else loss

    def _loss_is_a_share(self, named: dict[str, Any]) -> bool:
        trainer = self._trainer
        if (told := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
            return bool(told)
        counted = trainer.model_accepts_loss_kwargs and named.get("num_items_in_batch") is not None
        return bool(counted or trainer.compute_loss_func is not None)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do what the recipe wants done."""
        if self.scheduler is not None:
            if self._limits is not None:
                self._limits.keep(self.scheduler.done + 1)
            with unwrapped_forward(self.scheduler.model):  # a budget may measure files now
                self.scheduler.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write this rank's file into the checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.session is not None and not args.save_only_model and not state.is_hyper_param_search:
            rank_checkpoint.save(self.session, folder, state.global_step, scheduler=self.scheduler, limits=self._limits)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was sent, and write what the recipe exports."""
        if self.session is not None and state.is_world_process_zero:
            report = self.session.report()
            report.write_json(Path(args.output_dir) / REPORT)
            print(f"{report}{self.session.receipt()}")
        if self.session is not None and self.scheduler is not None:
            with unwrapped_forward(self.scheduler.model):
                ending.finish(self.session, self.scheduler, self._limits, args.output_dir)
