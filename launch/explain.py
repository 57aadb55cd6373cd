"""Estimates for a cluster, without running on it: bytes, seconds, and the bandwidth up to which compressing pays.

    commpress explain --params 7e9 --world 64 --bandwidth 10gbit --spec int4 --step-seconds 2.5
    commpress explain --check steps.json        # the same model against measured steps of `benchmarks/training.py`

The model is `commpress/comm/cost.py`. `speed.py` measures the speed of the codecs here, in about a second. On a real
cluster, `commpress probe` measures the link, too.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich import box
from rich.table import Table

from commpress import extras
from commpress.comm.codecs import parse
from commpress.comm.codecs.powersgd import PowerSGD
from commpress.comm.cost import Cluster, layout, slowest, step
from commpress.comm.exchange import Hierarchical
from commpress.comm.plan import Plan, require_flat
from commpress.launch import units
from commpress.launch.predictions import (
    BUCKET,
    LEAST_STEP,
    MOST_BUCKETS,
    MOST_STEP,
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
from commpress.launch.run_record import machine
from commpress.launch.speed import Measured

try:
    from tyro.conf import Positional, UseAppendAction, arg

    from commpress.launch import command_line
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.explain", error, "launch") from None

SPECS = ("bf16", "int8", "int4", "sign", "topk(0.01)", "topk(0.01)|int4", "topk(0.001)|int4")
MOST_MB = 1e9
MOST_RANKS = 65536
"""The most ranks: the bytes of each are summed, message by message."""
LINKS = {"loopback": math.inf, "unshaped": math.inf}
"""Rates of a record that are not numbers: then the cores are the limit."""
DENSE_ROWS = ("plain ddp", "ddp", "none")


# --- against measured steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One row of a step-time record: what was predicted and what was measured, in seconds."""

    link: str
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """The prediction's error as a share of what was measured."""
        return self.predicted / self.measured - 1


def compared(record: dict[str, Any], measured: Measured) -> list[Compared]:
    """Return predictions for a record's plain DDP and commpress rows, from its floor row. Raises ValueError for other files.

    All ranks are assumed to run on one machine, as in the lab, and to share its cores. A step that waits for the slowest of W
    ranks starts from the floor's 0.5^(1/W) quantile. Links with loss are not predicted.
    """
    try:
        where, W, values = record["link"], int(record["world_size"]), int(record["parameters"])
        (floor,) = (row for row in record["rows"] if row["kind"] == "floor")
        rows = [row for row in record["rows"] if row.get("seconds") and _spec(row)]
        cores = int(re.search(r"(\d+) cores", record["machine"])[1])  # type: ignore[index]
        bandwidth = LINKS[where["rate"]] if where["rate"] in LINKS else units.rate(where["rate"]) / 8
        lossless = units.share(where["loss"]) == 0
        require(1 <= W <= MOST_RANKS, f"world_size {W}, expected 1 to {MOST_RANKS}")
        require(cores > 0, f"machine {record['machine']!r}, expected at least one core")
        bucket_bytes = float(record.get("bucket_mb") or 25.0) * BUCKET
        require(values > 0 and bucket_bytes > 0, f"{values} parameters in buckets of {bucket_bytes:g} bytes")
        require(
            4 * values / bucket_bytes <= MOST_BUCKETS, f"{values} parameters, expected {MOST_BUCKETS} buckets at most"
        )
        require(floor["seconds"] > 0, f"a floor of {floor['seconds']} s, expected a number above 0")
        compute = slowest(floor["seconds"], floor["quartiles"][2], W)
        require(
            LEAST_STEP <= compute <= MOST_STEP,
            f"a step of {compute:g} s, expected {LEAST_STEP:g} to {MOST_STEP:g}",
        )
        cluster = Cluster(
            W, bandwidth, units.seconds(where["delay"]), where["ranks_per_host"], max(1.0, cores / W), measured.stack
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"not a step-time record with a row of kind floor: {type(error).__name__}: {error}") from None
    if not lossless:
        return []
    crowding = max(1.0, W / cores)  # more ranks than cores: each gets that much less of one
    cluster = Cluster(**{**vars(cluster), "stack": measured.stack * crowding})
    buckets = layout(values, bucket_bytes)
    found = []
    for row in rows:
        spec = _spec(row)
        seconds = step(Plan.of(spec), buckets, measured.speeds[spec].scaled(crowding), cluster, compute).seconds
        if not 0 < row["seconds"] < math.inf:
            raise ValueError(f"row {row['name']!r}: {row['seconds']} s, expected a number above 0")
        found.append(Compared(f"{W} ranks, {where['rate']}, {where['delay']}", row["name"], seconds, row["seconds"]))
    return found


def _spec(row: dict[str, Any]) -> str:
    """Return the spec that predicts a row; "" if none does."""
    if row["kind"] == "commpress":
        return "" if str(row["name"]).startswith(PowerSGD.word) else str(row["name"])
    return "none" if row["kind"] == "torch" and str(row["name"]).lower() in DENSE_ROWS else ""


def checked(records: Sequence[Path], device: torch.device) -> tuple[list[Compared], str]:
    """Return all predictions for these files, and a sentence with their median and worst error. Raises ValueError."""
    if not records:
        raise ValueError("--check: expected at least one step-time record, got none")
    read = []
    for path in records:
        try:
            if path.exists() and not path.is_file():  # a device or pipe may have no end
                raise ValueError("not a file")
            read.append((path, json.loads(path.read_text())))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{path}: cannot be read as a step-time record: {reason}") from None
    specs = {spec for path, record in read for spec in _specs(path, record)} - {"", "none"}
    measured = Measured.here(sorted(specs), device)
    found = []
    for path, record in read:
        try:
            found += compared(record, measured)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (TypeError, AttributeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a step-time record, a value in it does not belong there: {reason}") from None
    if not found:
        return found, "no row of these records can be predicted"
    worst = max(found, key=lambda c: abs(c.error))
    median = statistics.median(abs(c.error) for c in found)
    return found, (
        f"median error {median:.0%} over {len(found)} rows, worst {worst.error:+.0%} ({worst.name} on {worst.link}); "
        f"codec speed: {measured.device}, now"
    )


def _specs(path: Path, record: Any) -> list[str]:
    """Return the specs of a record's rows. Raises ValueError, which names the file, for an unknown spec."""
    found = [_spec(row) for row in _rows(record)]
    try:
        return [str(parse(spec)) and spec for spec in found if spec]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rows(record: Any) -> list[dict[str, Any]]:
    rows = record.get("rows") if isinstance(record, dict) else []
    rows = rows if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, dict) and {"kind", "name"} <= row.keys()]


def check_table(found: Sequence[Compared]) -> Table:
    """Return the table of predicted and measured seconds, a line per row."""
    made = Table(title="seconds a step: predicted and measured", box=box.SIMPLE_HEAD)
    for name in ("link", "row", "predicted", "measured", "error"):
        made.add_column(name, justify="left" if name in ("link", "row") else "right")
    for c in found:
        made.add_row(c.link, c.name, f"{c.predicted:.3f}", f"{c.measured:.3f}", f"{c.error:+.0%}")
    return made


# --- the command -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explain:
    """Predict what compression saves; on a cluster, commpress probe measures it."""

    records: Annotated[Positional[tuple[Path, ...]], arg(help_behavior_hint="")] = ()
    """Step-time records to compare with, for --check."""
    params: str = ""
    """Number of trained parameters: 7e9, 7b, 350m."""
    world: int = 0
    """Number of ranks."""
    bandwidth: str = ""
    """Bandwidth of each host's link: 10gbit, 100mbit."""
    spec: UseAppendAction[tuple[str, ...]] = ()
    """A spec; may be given several times. None: the common specs."""
    step_seconds: float | None = None
    """Seconds of a step without communication. None: communication alone is predicted."""
    delay: str = "0ms"
    """Delay from host to host, one way: 20ms."""
    bucket_mb: float = 25.0
    """Size of DDP's buckets, its bucket_cap_mb."""
    ranks_per_host: int = 1
    """Ranks that share a host and its link."""
    cores: int = 0
    """CPU cores of a host; 0: as many as this machine has."""
    device: str = "cpu"
    """Where the codecs run and are timed: cpu or cuda."""
    json: Path | None = None
    """Write the figures to this file."""
    check: bool = False
    """Compare predictions with step-time records instead."""

    def run(self) -> None:
        """Print the table. Ends the program with code 1 and a sentence if a flag makes no sense."""
        try:
            device = _device(self.device)
            if self.check:
                self.print_check(device)
            else:
                self.print_predictions(device)
        except (ValueError, TypeError, OverflowError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def print_check(self, device: torch.device) -> None:
        """Print predictions beside the seconds of step-time records. Raises ValueError."""
        found, sentence = checked(self.records, device)
        show(check_table(found))
        say(sentence)
        if self.json is not None:
            figures = [{**vars(c), "error": c.error} for c in found]
            write(self.json, {"what": "predictions", "rows": figures, "answer": sentence})

    def print_predictions(self, device: torch.device) -> None:
        """Print predictions and their assumptions. Raises ValueError."""
        self.require_sense()
        specs = [_parsed(spec) for spec in self.spec or SPECS]
        values = units.parameters(self.params, "--params")
        require_buckets(values, self.bucket_mb * BUCKET, f"--params {self.params} --bucket-mb {self.bucket_mb}")
        bandwidth, latency = units.rate(self.bandwidth, "--bandwidth") / 8, units.seconds(self.delay, "--delay")
        if self.json is not None:
            require_writable(self.json)
        measured = Measured.here(specs, device)
        on_cpu = device.type == "cpu"
        own = (self.cores or machine(device)["cores"]) / self.ranks_per_host if on_cpu else math.inf
        cluster = Cluster(self.world, bandwidth, latency, self.ranks_per_host, own, measured.stack, lines=on_cpu)
        bucket, share = self.bucket_mb * BUCKET, self.ranks_per_host
        nodes = 1 < share < self.world and self.world % share == 0
        exchanges = (None, f"{Hierarchical.name}({share})") if nodes else (None,)
        rows = predicted(specs, values, bucket, cluster, self.step_seconds, measured, exchanges)
        title = f"{self.params} parameters, {self.world} ranks, {self.bandwidth} links"
        show(table(rows, title, self.step_seconds is not None))
        for sentence in assumptions(measured, cluster, self.step_seconds):
            say(sentence)
        if nodes:
            say(
                "Of hierarchical the bytes inside a host count, too, which are not compressed; a host sends its mean once."
            )
        if self.json is not None:
            about = {"params": values, "world": self.world, "bandwidth": bandwidth, "latency": latency}
            about |= {"bucket_mb": self.bucket_mb, "ranks_per_host": self.ranks_per_host}
            speeds = {spec: vars(speed) for spec, speed in measured.speeds.items()}
            record = {"what": "explain", **about, "cores": own if on_cpu else None, "step_seconds": self.step_seconds}
            record |= {"codecs": speeds, "device": measured.device, "stack": measured.stack, "rows": as_json(rows)}
            write(self.json, record)

    def require_sense(self) -> None:
        """Raise ValueError for a number that no cluster has."""
        world, share = self.world, self.ranks_per_host
        if self.records:
            raise ValueError(f"{self.records[0]}: records are read with --check only")
        require(world >= 2, f"--world {world}: expected the number of ranks, at least 2 (one alone sends nothing)")
        require(world <= MOST_RANKS, f"--world {world}: expected at most {MOST_RANKS} ranks")
        require(1 <= share <= world, f"--ranks-per-host {share}: expected 1 to {world}, the ranks")
        good = 0 < self.bucket_mb <= MOST_MB
        require(good, f"--bucket-mb {self.bucket_mb}: expected a number above 0, at most {MOST_MB:g}")
        require(self.cores >= 0, f"--cores {self.cores}: expected a number above 0")
        require_step_seconds(self.step_seconds)


def assumptions(measured: Measured, cluster: Cluster, compute: float | None) -> list[str]:
    """Return the assumptions of the figures, in sentences."""
    said = [f"Bytes: sent by a rank in a step. Codec speed: measured now on {measured.device}."]
    if compute is None:
        said.append("Communication alone, every bucket ready at once: what a step takes needs --step-seconds.")
    else:
        shared = f"{cluster.cores:g} cores a rank, which backward uses and shares with codec and sockets"
        said.append(
            f"A step computes {compute:g} s, two thirds of it backward, during which buckets are exchanged; "
            + ("backward runs on the accelerator." if cluster.cores == math.inf else f"{shared}.")
        )
        said.append("A day: 24 h of dense training, all ranks together; hours: how much sooner its steps are done.")
    said.append("Pays below: the bandwidth at which dense takes as long; on faster links plain DDP is faster.")
    return said


def _parsed(spec: str) -> str:
    """The canonical form of a spec. Raises ValueError that names the flag."""
    try:
        require_flat(codec := parse(spec), "how many bytes these take, the shapes of a model say, not --params")
        return str(codec)
    except ValueError as error:
        raise ValueError(f"--spec {spec}: {error}") from None


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device 'cuda': this machine has no GPU that torch can use, expected cpu")
    return torch.device(name)


if __name__ == "__main__":
    command_line.read(Explain, "python -m commpress.launch.explain").run()
