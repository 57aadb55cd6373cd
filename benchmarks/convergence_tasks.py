"""What benchmarks/convergence.py trains: a byte-level GPT on the standard library's source, a convolutional net on digits."""

import statistics

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commpress.launch import data
from commpress.launch.model import GPT, Shape

SHAPE, BATCH = Shape(layers=4, width=128, heads=4, context=64), 4
IMAGES = 32
"""Digits a rank and step."""
HELD_OUT = 1024
"""Windows of text in a validation. With 64 the order of close rows is chance: it moved by 2 % from seed to seed."""


class Text:
    """The byte-level GPT."""

    def __init__(self) -> None:
        self.text = data.load(None)

    def model(self) -> nn.Module:
        return GPT(SHAPE)

    def loss(self, model: nn.Module, windows: torch.Generator) -> Tensor:
        x, y = data.sample(self.text.train, BATCH, SHAPE.context, windows)
        return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """Nats a byte over fixed windows, this rank's share of them."""
        starts = data.validation_starts(self.text.validation, HELD_OUT, SHAPE.context)
        x, y = data.windows(self.text.validation, starts[dist.get_rank() :: dist.get_world_size()], SHAPE.context)
        return float(nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()))


class Digits:
    """1,797 images of 8 x 8 pixels; every fifth is held out."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        held = torch.arange(len(y)) % 5 == 0
        self.train, self.test = (x[~held], y[~held]), (x[held], y[held])

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def loss(self, model: nn.Module, windows: torch.Generator) -> Tensor:
        x, y = self.train
        chosen = torch.randint(len(y), (IMAGES,), generator=windows)
        # moved by up to a pixel, so that there is something to learn for longer than an epoch
        shift = torch.randint(-1, 2, (2,), generator=windows).tolist()
        return nn.functional.cross_entropy(model(x[chosen].roll(shift, (2, 3))), y[chosen])

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """Mean loss over all held-out images, each moved in nine ways."""
        x, y = self.test
        losses = [
            float(nn.functional.cross_entropy(model(x.roll((i, j), (2, 3))), y)) for i in (-1, 0, 1) for j in (-1, 0, 1)
        ]
        return statistics.mean(losses)
