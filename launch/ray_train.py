"""The training program under Ray Train: each Ray worker is one rank, on any machines of the Ray cluster.

    python -m commpress.launch.ray_train 4 --gpu -- --compress int4 --steps 1000 --out /shared/runs/int4

Ray places the workers and makes the process group (NCCL with --gpu, else Gloo); `train.train` finds it there. The flags
after -- are those of `commpress.launch.train`; --out is a folder that all machines share. Ray ends its workers without
asking, so that Ctrl-C leaves no checkpoint: take --checkpoint-every. Needs `pip install 'commpress[ray]'` everywhere.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from commpress import extras

try:
    import ray.train
    import ray.train.torch
    import typer
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.ray_train", error, "ray") from None

from commpress.launch import train


def fit(settings: train.Settings, workers: int, gpu: bool = False) -> None:
    """Train on `workers` ranks of the Ray cluster that this program is connected to, or of a local one that it starts.

    Blocks until the end. A relative --out is relative to where this program runs: Ray's workers have folders of their own.
    Raises ray.train.TrainingFailedError with the error of the rank, and ValueError for a senseless number of workers.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    config = {**asdict(settings), "out": settings.folder.absolute()}
    if settings.data is not None:
        config["data"] = settings.data.absolute()
    ray.train.torch.TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(storage_path=str(config["out"] / "ray")),
    ).fit()


def work(config: dict[str, Any]) -> None:
    """What each worker runs: the training program on its rank."""
    train.train(train.Settings(**config))


def settings(flags: Sequence[str]) -> train.Settings:
    """What flags of the training program say. Ends the program with a sentence for flags that it does not know."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(functools.wraps(train.command)(lambda **given: train.chosen(given)))
    found = typer.main.get_command(app)(list(flags), "commpress train", standalone_mode=False)
    if not isinstance(found, train.Settings):
        raise typer.Exit  # --help was among the flags
    return found


def command(
    workers: Annotated[int, typer.Argument(help="How many ranks.")],
    flags: Annotated[list[str] | None, typer.Argument(help="After --, flags of the training program.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a rank.")] = False,
) -> None:
    """Train a byte-level GPT with compressed gradients under Ray Train."""
    try:
        wanted = settings(flags or [])
        train.check(wanted)
        fit(wanted, workers, gpu)
    except (ValueError, train.TrainingError, ray.train.TrainingFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def main() -> None:
    """`python -m commpress.launch.ray_train`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


if __name__ == "__main__":
    main()
