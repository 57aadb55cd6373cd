"""BERT teaches DistilBERT, which is pruned and quantised in the same run, its gradients sent as int4.

    torchrun --nproc-per-node 2 examples/bert.py [CHECKPOINT]    # needs pip install 'commpress[model,transformers]'

CHECKPOINT is a BertForMaskedLM with its tokenizer, a folder or a name on the hub; without one a small BERT of bytes is trained
first. DistilBERT starts as every other layer of it, loses the 20 % of its transformer's weights that are smallest, over all
layers together (L1, global), and computes with 8-bit weights from step 70 on. The text is Python's own source.
"""

import os
import pathlib
import sys
import sysconfig

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import commpress  # commpress
from commpress.model import Recipe, Scheduler, distilbert, stored  # commpress

STEPS, BATCH, LENGTH, BYTES = 100, 32, 48, 256
PRUNE = {"start": 20, "amount": 0.2, "scope": "global", "parameters": ["distilbert.transformer.*.weight"]}  # commpress
RECIPE = Recipe.of({"prune": [PRUNE], "quantize": [{"start": 70}], "distil": {"temperature": 2.0}})  # commpress


def read(checkpoint: str | None) -> tuple[BertForMaskedLM, torch.Tensor, int]:
    """Return BERT, a text as its tokens, int64 [tokens], and the token of a mask. Without a checkpoint it knows nothing."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:50]
    text = b"".join(file.read_bytes() for file in files)
    if checkpoint is None:
        shape = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
        config = BertConfig(vocab_size=BYTES + 1, max_position_embeddings=LENGTH, pad_token_id=None, **shape)
        return BertForMaskedLM(config), torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), BYTES
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(text[:1_000_000].decode(errors="ignore"), return_tensors="pt", verbose=False).input_ids[0]
    return BertForMaskedLM.from_pretrained(checkpoint), tokens, tokenizer.mask_token_id


def fit(model: torch.nn.Module, tokens: torch.Tensor, mask: int, lr: float, teacher: torch.nn.Module | None) -> None:
    """Train on all ranks to guess masked tokens; a student follows the recipe."""
    device, source = next(model.parameters()).device, torch.Generator().manual_seed(dist.get_rank())
    ddp, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=lr)
    session = commpress.attach(ddp, "int4")  # commpress
    recipe = RECIPE if teacher else Recipe.of({})  # commpress
    scheduler = Scheduler(recipe, model, optimizer, session=session, teacher=teacher)  # commpress
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=source)
        y, hidden = tokens[starts + torch.arange(LENGTH)], torch.rand(BATCH, LENGTH, generator=source) < 0.15
        x, labels = y.masked_fill(hidden, mask).to(device), y.masked_fill(~hidden, -100).to(device)
        output = ddp(x, labels=labels)
        scheduler.loss(output.loss, output, x).backward()  # commpress
        optimizer.step()
        scheduler.step()  # commpress
        optimizer.zero_grad()
        if dist.get_rank() == 0 and teacher and step % 20 == 19:
            print(f"step {step + 1}: loss {output.loss.item():.3f}")
    if dist.get_rank() == 0 and teacher:
        stored.save("student.safetensors", model, masks=scheduler.masks.of)  # commpress
        print(session.report(), session.receipt(), sep="")  # commpress


def main() -> None:
    """Train or load BERT, and let it teach."""
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else None
    bert, tokens, mask = read(checkpoint)
    bert = bert.to(device)
    if checkpoint is None:
        fit(bert, tokens, mask, 2e-3, None)
    student = distilbert.distilbert_from(bert, range(0, bert.config.num_hidden_layers, 2))  # commpress
    fit(student, tokens, mask, 1e-3 if checkpoint is None else 5e-5, bert.eval())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
