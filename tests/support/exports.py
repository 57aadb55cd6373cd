"""Small models whose quantisers have learned something, for tests of what leaves a run."""

import torch
from torch import Tensor, nn

from commpress.model import quantization, ranges
from commpress.model.quantization import Quantization

SETTINGS = [
    Quantization(bits, group, activations)
    for activations in (None, "dynamic", "static")
    for bits, group in ((8, None), (4, 32), (4, None), (8, 32))
]
"""Every kind of weights and inputs."""


def named(settings: Quantization) -> str:
    return f"int{settings.bits}-{settings.group or 'row'}-{settings.activations or 'weights'}"


class Text(nn.Module):
    """Two embeddings and a block of torch's own transformer; the head shares a table, and is called on [batch, time, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, 64), nn.Embedding(16, 64)
        self.block = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
        self.head = nn.Linear(64, 256)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        """int64 [batch, time] to [batch, time, 256]."""
        x = self.tokens(index) + self.places(torch.arange(index.shape[1], device=index.device))
        logits: Tensor = self.head(self.block(x))
        return logits


def text_model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Text()
    nn.init.normal_(model.tokens.weight, std=0.3)
    return model, (torch.randint(0, 256, (3, 12)),)


def mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Matrices in and out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 96, bias=False), nn.GELU(), nn.Linear(96, 64))
    return model, (torch.randn(8, 128),)


def learned(model: nn.Module, inputs: tuple[Tensor, ...], settings: Quantization) -> nn.Module:
    """The model with its quantisers on, its ranges those of these inputs, in evaluation."""
    quantization.prepare(model, settings)
    quantization.enable(model)
    with torch.no_grad():
        model.train()(*inputs)
    ranges.learn(model)
    return model.eval()
