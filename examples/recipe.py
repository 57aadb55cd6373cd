"""One run that prunes and quantises the model while it trains, its gradients sent as int4.

    torchrun --nproc-per-node 2 examples/recipe.py        # needs pip install 'commpress[model]'

A small model learns the next byte of Python's own source. By step 60 four fifths of its weights are 0, which are not sent from
then on; from step 70 on it computes with 8-bit weights. The lines marked `# commpress` are all that it takes.
"""

import os
import pathlib
import sysconfig

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import commpress  # commpress
from commpress.model import Recipe, Scheduler, stored  # commpress

STEPS, BATCH, CONTEXT = 100, 64, 16
PRUNE = {"start": 20, "end": 60, "every": 10, "amount": 0.8}  # commpress: the model loses 80 % of its weights
RECIPE = Recipe.of({"prune": [PRUNE], "quantize": [{"start": 70, "bits": 8}]})  # commpress


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
    """Train a small model on this rank while a recipe prunes and quantises it."""
    dist.init_process_group()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256)
    ).to(device)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    session = commpress.attach(ddp, "int4")  # commpress
    scheduler = Scheduler(RECIPE, model, optimizer, session=session)  # commpress
    text, source = read_text(), torch.Generator().manual_seed(dist.get_rank())
    for step in range(STEPS):
        x, y = draw(text, source, device)
        loss = cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()  # commpress
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        stored.save("small.safetensors", model, masks=scheduler.masks.of)  # commpress: integers, and no pruned weights
        print(f"small.safetensors: {os.path.getsize('small.safetensors')} bytes")
        print(session.report(), session.receipt(), sep="")  # commpress
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
