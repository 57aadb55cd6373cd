"""What the demo's steps would take on a link that this machine cannot make: `explain`'s prediction for each of its runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from commpress.comm.auto import SPECS
from commpress.comm.cost import Cluster
from commpress.launch import units
from commpress.launch.gain import AUTO, PLAIN, times
from commpress.launch.link import Link
from commpress.launch.predictions import BUCKET, as_json, predicted
from commpress.launch.records import EXPLAINED, Record
from commpress.launch.speed import Measured

BUCKET_MB = 25.0
"""DDP's own size of a bucket."""


@dataclass(frozen=True)
class Foretold:
    """Predicted seconds of a step: of each run, in their order, and of each of auto's specs; and the record of it all."""

    link: str
    steps: list[float]
    specs: dict[str, float]
    record: Record
    """As `commpress explain --json` writes it."""

    @property
    def sentence(self) -> str:
        """Return the predicted gain of auto, as the end of a sentence."""
        best = min(self.specs, key=self.specs.__getitem__)
        if best == PLAIN:
            return f"on a link of {self.link} `commpress explain` predicts no gain either"
        return (
            f"on a link of {self.link} `commpress explain` predicts {best} "
            f"{times(self.specs[PLAIN] / self.specs[best])} faster than plain DDP"
        )


def foretell(records: Sequence[Record], link: Link) -> Foretold:
    """Predict the steps of runs of one model, the first of which is plain and was measured without that link.

    A step without communication is the first run's less what it waited for. Each rank has its share of this machine's cores.
    """
    plain = records[0]
    ranks, cores = plain["world_size"], plain["machine"]["cores"]
    compute = max(1e-6, plain["median_step_seconds"] - plain["traffic"]["exposed"] / max(plain["steps_done"], 1))
    specs = {r["settings"]["compress"] for r in records} - {AUTO}
    measured = Measured.here(sorted({*SPECS, *specs} - {PLAIN}), torch.device("cpu"))
    cluster = Cluster(ranks, link.bits_per_second / 8, cores=max(1.0, cores / ranks), stack=measured.stack)
    tried = [spec for spec in measured.speeds if spec != PLAIN]
    rows = predicted(tried, plain["parameters"], BUCKET_MB * BUCKET, cluster, compute, measured)
    seconds = {str(row["spec"]): float(row["step_seconds"]) for row in rows}
    safe = {spec: seconds[spec] for spec in SPECS}
    steps = [
        min(safe.values()) if r["settings"]["compress"] == AUTO else seconds[r["settings"]["compress"]] for r in records
    ]
    about = {"params": plain["parameters"], "world": ranks, "bandwidth": cluster.bandwidth, "device": measured.device}
    record = {"what": EXPLAINED, **about, "step_seconds": compute, "rows": as_json(rows)}
    return Foretold(units.bandwidth(link.bits_per_second), steps, safe, record)
