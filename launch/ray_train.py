"""The training program under Ray Train: each Ray worker is one rank, on any machines of the Ray cluster.

    python -m commpress.launch.ray_train 4 --gpu -- --compress int4 --steps 1000 --out /shared/runs/int4

Ray places the workers and makes the process group (NCCL with --gpu, else Gloo); `train.train` finds it there. The flags
after -- are those of `commpress.launch.train`; --out is a folder that all machines share. Ray kills its workers at once,
so Ctrl-C leaves no checkpoint: set --checkpoint-every. Needs `pip install 'commpress[ray]'` on all machines.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any

from commpress import extras

try:
    import ray.train
    import ray.train.torch
    from tyro.conf import Positional
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.ray_train", error, "ray") from None

from commpress.launch import command_line, recipes, train


def fit(settings: train.Settings, workers: int, gpu: bool = False) -> None:
    """Train on `workers` ranks of the Ray cluster that this program is connected to, or of a local one that it starts.

    Blocks until the end. A relative --out is relative to the folder of this program: Ray's workers have their own folders.
    Raises ray.train.TrainingFailedError with the error of the rank, and ValueError for a number of workers below 1.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    config = {**asdict(settings), "out": settings.folder.absolute()}
    if settings.data is not None and settings.model is None:
        config["data"] = settings.data.absolute()
    ray.train.torch.TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(storage_path=str(config["out"] / "ray")),
    ).fit()


def work(config: dict[str, Any]) -> None:
    """Run the training program on this worker's rank."""
    train.train(train.Settings(**config))


@dataclass(frozen=True)
class RayTrain:
    """Train a byte-level GPT with compressed gradients under Ray Train."""

    workers: int
    """How many ranks."""
    flags: Positional[tuple[str, ...]] = ()
    """Flags of the training program, after --."""
    gpu: bool = False
    """One GPU for each rank."""

    def run(self) -> None:
        """Train by the flags. Ends the program with code 1 and a sentence if that fails."""
        try:
            wanted = recipes.with_specs(command_line.read(train.Train, "commpress train", self.flags).settings)
            train.check(wanted)
            fit(wanted, self.workers, self.gpu)
        except (ValueError, train.TrainingError, ray.train.TrainingFailedError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    command_line.read(RayTrain, "python -m commpress.launch.ray_train").run()
