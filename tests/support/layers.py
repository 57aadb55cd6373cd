"""Layers that quantisation takes beside Linear and Embedding, each as a model with one input, for tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention of an input to itself; with `kdim` to its first values, which are narrower."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True, **how)
        self.kdim = how.get("kdim")

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, 32] to [batch, time, 32]."""
        other = x if self.kdim is None else x[:, :3, : self.kdim].contiguous()
        outputs: Tensor = self.inner(x, other, other, need_weights=self.kdim is not None)[0]
        return outputs


class Recurrent(nn.Module):
    """All outputs of a recurrent layer."""

    def __init__(self, kind: type, **how: Any) -> None:
        super().__init__()
        self.inner = kind(32, 24, batch_first=True, **how)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, 32] to [batch, time, width]."""
        outputs: Tensor = self.inner(x)[0]
        return outputs


TEXT = (3, 5, 32)
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 12, 3, padding="same", dilation=2)), (3, 4, 10)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 12, 3, 2, 1, groups=2, padding_mode="circular")), (3, 4, 9, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 6, (1, 2, 3), bias=False)), (3, 2, 4, 4, 4)),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, TEXT),
    "attention of other widths": (lambda: Attention(kdim=16, vdim=16), TEXT),
    "lstm": (lambda: Recurrent(nn.LSTM), TEXT),
    "deep lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), TEXT),
    "lstm with projections": (lambda: Recurrent(nn.LSTM, proj_size=8, bias=False), TEXT),
    "gru": (lambda: Recurrent(nn.GRU), TEXT),
    "rnn": (lambda: Recurrent(nn.RNN), TEXT),
}
LAYERS = CONVOLUTIONS | OTHERS
"""Name -> what makes the model, and the shape of its input."""


def layer(kind: str) -> tuple[nn.Module, Tensor]:
    """The model of a kind and an input, the same in every run."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    return make(), torch.randn(shape)


class Everything(nn.Module):
    """A convolution, attention, an LSTM and a Linear, for trainings: [batch, 32] to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, 32] to [batch, 10]."""
        x = self.convolution(x.unflatten(1, (2, 16))).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


def everything(seed: int = 0) -> Everything:
    """The same values for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Everything()
