"""The cost of this cluster's network for training, measured in under a minute, and what to do about it.

    torchrun --nproc-per-node 2 -m commpress.launch.probe --params 124m

It measures the links between hosts and inside them (`link_speed.py`), ranks that compute slower than others (`stragglers.py`),
and the codecs' speed on the slowest rank (`speed.py`). From that the cost model predicts a step of plain DDP and of the specs
that `auto` chooses from. Without a cluster, `commpress explain` predicts from flags.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commpress import extras
from commpress.comm import cost, link_speed
from commpress.comm.agreement import gather_settings
from commpress.comm.auto import SPECS
from commpress.comm.cost import Cluster
from commpress.comm.link_speed import LinkSpeed, between_and_inside, by_host
from commpress.launch import runtime, stragglers, units
from commpress.launch.model_size import parts, trained_parameters
from commpress.launch.predictions import (
    BUCKET,
    as_json,
    predicted,
    require,
    require_buckets,
    require_step_seconds,
    require_writable,
    say,
    show,
    table,
    write,
)
from commpress.launch.run_record import cores
from commpress.launch.runtime import TrainingError, together
from commpress.launch.speed import Measured
from commpress.launch.verdict import BEYOND, verdict
from commpress.notice import global_rank, host_name

try:
    from commpress.launch import command_line
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.probe", error, "launch") from None

BUCKET_BYTES = 25 * BUCKET
"""The default of DDP."""
LEAST_SECONDS, MOST_SECONDS = 0.1, 600.0
LINK_SHARE, WORK_SHARE = 0.7, 0.1
"""Shares of the seconds for the links and for the stragglers; the codecs get the rest."""


@dataclass(frozen=True)
class Found:
    """The measurements of all ranks."""

    hosts: list[str]
    """Names of the ranks' hosts, by rank."""
    between: LinkSpeed | None
    """A host's link to the others; None if there is one host."""
    inside: LinkSpeed | None
    """A rank's link to another on its host; None if each has its own host."""
    work: list[float]
    """Seconds of the same piece of work, by rank."""
    measured: Measured
    """The slowest rank's speed."""
    cores: float
    """The cores of a rank: those of its host, shared with the other ranks there. Infinite on an accelerator."""

    @property
    def bandwidth(self) -> float:
        """Return the link's bytes a second for the cost model, with frames; of the link inside if there is one host."""
        link = self.between or self.inside
        assert link is not None  # there are two ranks
        return link.bandwidth * cost.FRAME

    def cluster(self) -> Cluster:
        """Return the cluster for the cost model."""
        W, share, lines = len(self.hosts), max(map(len, by_host(self.hosts))), self.cores < math.inf
        if self.between is not None:
            latency = self.between.latency
            return Cluster(W, self.bandwidth, latency, share, self.cores, self.measured.stack, lines)
        assert self.inside is not None
        seconds_a_byte = 1 / self.inside.bandwidth / 2  # each rank has sent as much as it received
        return Cluster(W, cost.FASTEST, 0.0, W, self.cores, seconds_a_byte, lines)


def measure(device: torch.device, seconds: float) -> Found:
    """Measure links, stragglers and codecs, the first two in about `seconds`. Collective."""
    group = dist.distributed_c10d._get_default_group()
    hosts = [str(said["host"]) for said in gather_settings({"host": host_name()}, group, device)]
    between, inside = between_and_inside(by_host(hosts), group, device, LINK_SHARE * seconds, link_speed.MOST)
    work = stragglers.seconds_of_work(group, device, WORK_SHARE * seconds)
    own = Measured.here((*SPECS[1:], *BEYOND), device).to_json()
    everyone = gather_settings({"work": work, "cores": cores(), "measured": own}, group, device)
    shares = (float(str(said["cores"])) / hosts.count(host) for host, said in zip(hosts, everyone, strict=True))
    return Found(
        hosts=hosts,
        between=between,
        inside=inside,
        work=[float(str(said["work"])) for said in everyone],
        measured=Measured.slowest([Measured.from_json(said["measured"]) for said in everyone]),  # type: ignore[arg-type]
        cores=max(1.0, min(shares)) if device.type == "cpu" else math.inf,
    )


def lines(found: Found) -> list[str]:
    """Return the measurements in sentences."""
    W, H = len(found.hosts), len(set(found.hosts))
    said = [f"{W} ranks on {H} host{'s' * (H > 1)}."]
    if found.between is None:
        said.append("Between hosts: nothing to measure, there is one host.")
    else:
        speed = units.bandwidth(found.bandwidth * 8)
        said.append(f"Between hosts: {speed} in each direction at once, {_latency(found.between)} one way.")
    if found.inside is None:
        said.append("Inside a host: nothing to measure, each rank has a host of its own.")
    else:
        speed = f"{found.inside.bandwidth / 1e9:.3g} GB/s"
        said.append(
            f"Inside a host: {speed} from each rank in each direction at once, {_latency(found.inside)} one way."
        )
    said.append(stragglers.sentence(found.work, found.hosts))
    speeds = found.measured.speeds
    coded = ", ".join(f"{spec} {4e-9 / speeds[spec].encode:.2g}" for spec in SPECS[1:])
    said.append(
        f"Codecs, GB/s of float32 gradients encoded, the slowest rank's: {coded}; rank 0: {found.measured.device}."
    )
    return said


def _latency(link: LinkSpeed) -> str:
    return f"{link.latency * 1e3:.2g} ms"


@dataclass(frozen=True)
class Probe:
    """Measure this cluster, under torchrun, and say whether compressing pays there."""

    params: str = ""
    """Number of trained parameters: 7e9, 7b, 350m."""
    model: str = ""
    """A function that makes the model, module:factory, in place of --params. It is called; nothing is trained."""
    step_seconds: float | None = None
    """Seconds of a step without communication. None: communication alone is predicted."""
    seconds: float = 30.0
    """Seconds that measuring takes, about."""
    json: Path | None = None
    """Write the figures to this file."""

    def run(self) -> None:
        """Measure and print. Ends the program with code 1 and a sentence on all ranks if that fails."""
        runtime.run_on_all_ranks(self.probe)

    def probe(self) -> None:
        """Measure on all ranks, and print on rank 0. Collective. Raises TrainingError on all ranks."""
        with runtime.process_group() as device, runtime.in_one_voice():
            together(self.require_sense, device)
            runtime.require_same_flags({key: v for key, v in vars(self).items() if key != "json"}, device)
            if dist.get_world_size() == 1:
                raise TrainingError(
                    "one rank has no network to probe: start it on all ranks, as in "
                    f"torchrun --nproc-per-node 2 -m commpress.launch.probe {self._what()}"
                )
            rank = dist.get_rank()
            values = together(self.values if rank == 0 else int, device)
            found = measure(device, self.seconds)
            together(partial(self.print, values, found) if rank == 0 else int, device)

    def require_sense(self) -> None:
        """Raise ValueError for flags with which nothing can be measured or predicted."""
        require(bool(self.params) != bool(self.model), self._either())
        if self.params:
            require_buckets(units.parameters(self.params, "--params"), BUCKET_BYTES, self._what())
        else:
            parts(self.model)
        require_step_seconds(self.step_seconds)
        good = LEAST_SECONDS <= self.seconds <= MOST_SECONDS
        require(good, f"--seconds {self.seconds}: expected a number from {LEAST_SECONDS:g} to {MOST_SECONDS:g}")
        if self.json is not None and global_rank() == 0:
            require_writable(self.json)

    def values(self) -> int:
        """Return the number of trained parameters. Raises ValueError."""
        if self.params:
            return units.parameters(self.params, "--params")
        found = trained_parameters(self.model)
        require_buckets(found, BUCKET_BYTES, self._what())
        return found

    def print(self, values: int, found: Found) -> None:
        """Print measurements and predictions, and write the file. Raises ValueError if that fails."""
        specs = (*SPECS[1:], *BEYOND)
        rows = predicted(specs, values, BUCKET_BYTES, found.cluster(), self.step_seconds, found.measured)
        answer = verdict(rows, self.step_seconds)
        for line in lines(found):
            say(line)
        size = self.params or f"{values / 1e6:.3g}m"
        title = f"predicted for {size} parameters, {len(found.hosts)} ranks"
        show(table([row for row in rows if row["spec"] in SPECS], title, self.step_seconds is not None))
        say(answer)
        if self.json is not None:
            write(self.json, self._record(values, found, rows, answer))

    def _record(self, values: int, found: Found, rows: list[dict[str, Any]], answer: str) -> dict[str, Any]:
        record: dict[str, Any] = {"what": "probe", "params": values, "model": self.model or None}
        record |= {"world": len(found.hosts), "hosts": found.hosts, "bandwidth": found.bandwidth}
        for name, link in (("between", found.between), ("inside", found.inside)):
            record[name] = None if link is None else asdict(link)
        record |= {"work_seconds": found.work, "cores": found.cores if found.cores < math.inf else None}
        record |= {"codecs": {spec: vars(speed) for spec, speed in found.measured.speeds.items()}}
        record |= {"device": found.measured.device, "stack": found.measured.stack, "step_seconds": self.step_seconds}
        return record | {"rows": as_json(rows), "answer": answer}

    def _what(self) -> str:
        return f"--params {self.params}" if self.params else f"--model {self.model}"

    def _either(self) -> str:
        if self.params:
            return f"--params {self.params} --model {self.model}: expected one of the two, not both"
        return "--params or --model: expected one of them, such as --params 7b or --model my_project.models:build"


if __name__ == "__main__":
    command_line.read(Probe, "python -m commpress.launch.probe").run()
