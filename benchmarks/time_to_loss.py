"""Seconds of training to a held-out loss, on links of given speed: `auto` beside plain DDP, `bf16` and `powersgd(4)`.

    python -m commpress.launch.lab 2 1gbit -- python benchmarks/time_to_loss.py --seconds 40 --json runs/loss-1gbit.json
    python benchmarks/time_to_loss.py --picture docs/time_to_loss.svg runs/loss-*.json

The model, the text and the rates of `training.py`, from the same weights on the same windows. Each way trains for so many steps
of one schedule, or until its seconds are over. The clock stands still while the loss is measured; auto's search is in its time.
The picture is that of `loss_picture.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import Attached, Way
from training import EVERY, RATE, Variant, chosen_ways, described, held_out_loss, share
from training_tables import title

import commpress
from commpress.launch import data

AUTO = "auto"
SPECS = ["bf16", "powersgd(4)"]
ROWS = ("plain DDP", *SPECS, AUTO)


def train(way: Way, steps: int, seconds: float, text: data.Text) -> dict[str, Any]:
    """Return the row of one way: the seconds of training at each validation, and the loss there."""
    variant = Variant(way, None, text.train, RATE)
    row: dict[str, Any] = {"name": way.name, "steps": [], "seconds": [], "loss": []}
    for done in range(steps + 1):
        ends = done == steps or over(variant, seconds)
        if done % EVERY == 0 or ends:
            row["steps"].append(done)
            row["seconds"].append(sum(variant.times))
            row["loss"].append(held_out_loss(variant.model.module, text.validation))
        if ends:
            break
        variant.step(RATE * share(done, steps))
    row["chosen"] = variant.attached.session.report().spec if way.name == AUTO and variant.attached.session else ""
    return row


def over(variant: Variant, seconds: float) -> bool:
    """Whether the time of a way is over on any rank. Collective."""
    spent = torch.tensor([sum(variant.times)])
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item() > seconds


def main() -> None:
    """Measure and print, or draw."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--seconds", type=float, default=60.0, help="of training, a way")
    options.add_argument(
        "--only", nargs="+", metavar="NAME", default=list(ROWS), help="rows, by the names of training.py"
    )
    options.add_argument("--json", type=Path)
    options.add_argument("--picture", nargs="+", type=Path, metavar=("OUT.svg", "RECORD.json"))
    chosen = options.parse_args()
    if chosen.picture:
        import loss_picture

        loss_picture.draw(chosen.picture[1:], chosen.picture[0])
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = [name for name in chosen.only if name != AUTO]
    ways = chosen_ways([name for name in names if name not in ROWS] + SPECS, names, names[0], None) if names else []
    if AUTO in chosen.only:
        ways.append(Way(AUTO, "commpress", lambda model: Attached(session=commpress.attach(model))))
    text = data.load(None)
    record = {"what": "loss by time", **described(), "rows": []}
    for way in ways:
        record["rows"].append(train(way, chosen.steps, chosen.seconds, text))
    if dist.get_rank() == 0:
        print(title(record))
        for row in record["rows"]:
            last = f"loss {row['loss'][-1]:.3f} after {row['steps'][-1]} steps, {row['seconds'][-1]:.1f} s"
            print(f"  {row['name']:<16} {last} {row['chosen']}")
        if chosen.json:
            chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
