"""The Trainer of Hugging Face Transformers, by a callback.

It wraps the model by Accelerate when training begins, resumes model and optimizer, and then calls `on_train_begin` on every
rank; callbacks are not told of the wrapper, nor of the folder that is resumed from, so this one holds the Trainer. `on_save`
comes on every rank once a checkpoint's folder is there. A second `train()` goes on with the wrapper of the first.
"""

from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from commpress import extras
from commpress.comm.codecs import Codec
from commpress.comm.session import Session
from commpress.hooks import ddp, rank_checkpoint
from commpress.hooks.accelerate import inner, prepared
from commpress.notice import warn
from commpress.optim.base import CompressedOptimizer

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint
except ModuleNotFoundError as error:
    raise extras.missing("commpress.hooks.transformers", error, "transformers") from error

REPORT = "commpress.json"
"""The report's file in `output_dir`."""


class Compression(TrainerCallback):
    """`trainer.add_callback(Compression(trainer, "int4"))` compresses the gradients of a Trainer that runs under DDP.

    If the Trainer's optimizer is one of `commpress.optim`, what it is about to apply travels instead. Checkpoints get a file a
    rank, which `train(resume_from_checkpoint=...)` reads. At the end rank 0 prints the report and writes it to
    `output_dir/commpress.json`. `session` is there once training has begun. `settings` are those of
    `commpress.hooks.ddp.attach` but for `optimizer` and `grad_scaler`, which are the Trainer's.

    `train` raises TypeError if the model is not in a DistributedDataParallel, ValueError on all ranks for an unknown spec, for
    ranks that differ, for files that do not belong to the checkpoint, and for `max_grad_norm` beside a compressed optimizer.
    """

    def __init__(self, trainer: Trainer, gradients: str | Codec, **settings: Any) -> None:
        self.session: Session | None = None
        self._trainer, self._gradients, self._settings = trainer, gradients, settings
        self._model: DistributedDataParallel | None = None
        self._resumed: str | bool | None = None
        self._train = trainer.train
        trainer.train = self._remember

    def _remember(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._resumed = resume_from_checkpoint
        return self._train(resume_from_checkpoint, *args, **kwargs)

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
                f"max_grad_norm={args.max_grad_norm} would clip what {name} is about to apply, which is no gradient after "
                f"its warm-up: set TrainingArguments(max_grad_norm=0) and {name}(..., max_norm={args.max_grad_norm})"
            )
        if self.session is None or model is not self._model:
            scaler = trainer.accelerator.scaler
            self.session = ddp.attach(
                model, self._gradients, optimizer=compressed, grad_scaler=scaler, **self._settings
            )
            self._model = model
        if compressed is not None:
            compressed.watch.on = False  # the Trainer learns the norm by clipping at infinity
        folder = get_last_checkpoint(args.output_dir) if self._resumed is True else self._resumed
        if not folder:
            return
        found = rank_checkpoint.load(self.session, model.process_group, folder, state.global_step)
        if not found:
            warn(
                f"commpress: {folder} was saved without compression, or by save_only_model; what feedback keeps starts empty"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write this rank's file into the checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.session is not None and not args.save_only_model and not state.is_hyper_param_search:
            rank_checkpoint.save(self.session, folder, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was sent."""
        if self.session is not None and state.is_world_process_zero:
            report = self.session.report()
            report.write_json(Path(args.output_dir) / REPORT)
            print(report)
