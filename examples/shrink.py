"""Shrink a network that reads handwritten digits into a budget of megabytes, milliseconds and loss.

    commpress shrink --model examples.shrink:trained --data examples.shrink:batches --max-mb 0.45 --max-ms 0.3 --max-loss 10%

It needs 'commpress[launch,export]' and scikit-learn, whose 1,797 digits of 8 x 8 pixels are a small task.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

DIGITS, HELD_OUT, BATCH = load_digits(), 500, 50
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches() -> tuple[Batches, Batches]:
    """Return batches to train on, and those that are held out."""
    found = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))
    return found[HELD_OUT // BATCH :], found[: HELD_OUT // BATCH]


def trained() -> nn.Module:
    """Return the dense network, trained for twenty passes over the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        for x, y in batches()[0]:
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model
