"""Sharded training (FSDP2): gradients are scattered as int4, parameters gathered as int8.

    torchrun --nproc-per-node 2 examples/fsdp.py

A small model learns the next byte of Python's own source. The lines marked `# commpress` are all that compression takes.
"""

import os
import pathlib
import sysconfig

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import commpress  # commpress

STEPS, BATCH, CONTEXT = 100, 64, 16


def read_text() -> torch.Tensor:
    """Return some of the standard library's source, uint8 [bytes]."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:50]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def draw(text: torch.Tensor, source: torch.Generator, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows of bytes, int64 [BATCH, CONTEXT], and the byte that follows each, int64 [BATCH]."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=source)
    windows = text[starts + torch.arange(CONTEXT + 1)].long().to(device)
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    """Train a small sharded model on this rank."""
    dist.init_process_group()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256)
    ).to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # of the shards: after fully_shard
    session = commpress.attach(model, gradients="int4", parameters="int8")  # commpress
    text, source = read_text(), torch.Generator().manual_seed(dist.get_rank())
    for step in range(STEPS):
        x, y = draw(text, source, device)
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        print(session.report(), session.receipt(), sep="")  # commpress
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
