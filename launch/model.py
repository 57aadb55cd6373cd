"""A byte-level GPT (Radford et al., 2019): pre-norm blocks x <- x + f(norm(x)), learned positions, untied head."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Raises ValueError if one is below 1, or if the width does not divide among the heads."""

    layers: int
    width: int
    heads: int
    context: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} --heads {self.heads}: the width must be a multiple of the heads")


class Attention(nn.Module):
    """Causal self-attention, [batch, time, width] -> the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [batch, heads, time, -1]
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention, then an MLP of four times the width, each beside a residual path."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(shape.width), Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(gelu(self.up(self.norm2(x))))
        return y


class GPT(nn.Module):
    """Bytes int64 [batch, time] -> logits of the next byte [batch, time, 256]; time is at most `shape.context`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # GPT-2: what is added to the residual path shrinks with the number of additions
                ends_a_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.layers) if ends_a_branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
