"""Bytes and seconds: the bytes of a dense exchange, the bytes that were sent, and the seconds of each phase.

A rank's bytes are those that it gave to its process group for other ranks. The dense figure is what must be sent without
compression. For gradients it is a ring all-reduce of the same buckets in their own dtype, 2 (W - 1) / W of their size. For
sharded gradients it is a reduce-scatter, and for sharded parameters an all-gather, of W - 1 shards each. For a sharded matrix
that one rank steps for all, it is its float32 rows. For an outer update it is the bytes of DDP in the steps since the last one.
Gloo and DeepSpeed all-reduce where a reduce-scatter would be enough: those bytes are in `backend_bytes`. For a bucket that is
left to them uncompressed, the dense figure is what they sent.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist

from commpress.comm import tables
from commpress.comm.choice import Choice
from commpress.comm.timeline import Span, Timeline

PHASES = ("encode", "wire", "decode")
ROLES = ("gradients", "parameters", "updates", "outer", "buffers")
"""Kinds of traffic: in every step the gradients and, if they are sharded, the parameters; an optimizer's traffic of
sharded matrices, and the updates that the ranks of a node compute for each other; outer updates after rounds of local
steps; the buffers that DDP broadcasts."""
NOT_SENT = "none"
"""The name of the exchange that leaves a bucket on its rank."""
SPEC_IS_NONE = "spec is none"
"""The reason of a bucket that is not compressed because nobody asked for it, or because auto tries `none`."""
BYTES = ("dense_bytes", "sent_bytes", "received_bytes")


@dataclass
class Row:
    """One bucket over all steps so far. Bytes and seconds are sums."""

    bucket: int
    values: int
    dtype: str
    spec: str
    exchange: str
    reason: str
    role: str = "gradients"
    phase: str = ""
    rules: dict[str, int] = field(default_factory=dict)
    """The number of its values for each rule, by its text; empty if one spec is given for all."""
    steps: int = 0
    dense_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    inside_bytes: int = 0
    """Sent bytes that did not leave the node, if the exchange tells them apart."""
    backend_bytes: int = 0
    """Bytes that the group or the framework itself would send uncompressed: `dense_bytes`, or more."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def how(self) -> str:
        """Return how the bucket was sent, or why it was not compressed."""
        return how_sent(self.spec, self.exchange, self.reason)


@dataclass
class Report:
    """Bytes and seconds of one rank. `ratio` is dense bytes over sent bytes.

    `seconds`: `encode` and `decode` are the codec's. `wire` is the time from the start of a transfer until it had arrived and
    a thread was free to continue with it (transfers overlap each other and the codec). `exposed` is the time that training
    waited after its last gradient was ready, and `hidden` is the time of the exchanges beside backward.
    """

    spec: str
    rank: int
    world_size: int
    steps: int
    dense_bytes: int
    sent_bytes: int
    received_bytes: int
    seconds: dict[str, float]
    rows: list[Row]
    phase_steps: dict[str, int] = field(default_factory=dict)
    """The number of steps of each phase of a recipe; empty without one."""
    choices: list[Choice] = field(default_factory=list)
    """The choices of `auto` so far, in order, each with the specs that its search tried; empty if a spec was given."""

    @property
    def ratio(self) -> float:
        """Return dense over sent bytes; 1.0 if nothing had to be sent."""
        return self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0

    @property
    def backend_bytes(self) -> int:
        """Return the bytes that the group or the framework itself would have sent uncompressed; more than `dense_bytes` if it
        all-reduces instead of a reduce-scatter, as Gloo does."""
        return sum(row.backend_bytes for row in self.rows)

    @property
    def inside_bytes(self) -> int:
        """Return the sent bytes that did not leave the node, if the exchange is `hierarchical` or ranks share
        computations. The other bytes went to other nodes."""
        return sum(row.inside_bytes for row in self.rows)

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """Return `dense_bytes`, `sent_bytes` and `received_bytes` of each role that has rows."""
        return {
            role: {key: sum(getattr(row, key) for row in mine) for key in BYTES}
            for role in ROLES
            if (mine := [row for row in self.rows if row.role == role])
        }

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """Return `steps` and the bytes of each phase of a recipe, in order; empty without one."""
        found = {phase: {"steps": steps, **dict.fromkeys(BYTES, 0)} for phase, steps in self.phase_steps.items()}
        for row in self.rows:
            if (sums := found.get(row.phase)) is not None:
                sums |= {key: sums[key] + getattr(row, key) for key in BYTES}
        return found

    @property
    def rules(self) -> dict[str, dict[str, float]]:
        """Return `values` of a step, the bytes and the `ratio` of each rule, in order; empty if one spec is given for all.

        Parameters of rules with one spec are sent together: their bytes are divided by their numbers of values.
        """
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            for rule, n in row.rules.items():
                sums = found.setdefault(rule, dict.fromkeys(("values", *BYTES), 0.0))
                share = n / max(1, sum(row.rules.values()))
                sums["values"] += share * row.values * row.steps / max(1, self.steps)
                sums |= {key: sums[key] + share * getattr(row, key) for key in BYTES}
        return {
            rule: {key: round(value) for key, value in sums.items()}
            | {"ratio": sums["dense_bytes"] / sums["sent_bytes"] if sums["sent_bytes"] else 1.0}
            for rule, sums in found.items()
        }

    @classmethod
    def merge(cls, *reports: "Report") -> "Report":
        """Return one report of several sessions of this process, such as a DDP session inside a node and an outer one between
        nodes.

        The sessions may be of different groups: the sum is this rank's among all ranks. Raises ValueError if there are none.
        """
        if not reports:
            raise ValueError("Report.merge: got 0 reports, expected at least one")
        first = max(reports, key=lambda report: report.world_size)
        rank, world_size = first.rank, first.world_size
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        sums = {key: sum(getattr(report, key) for report in reports) for key in BYTES}
        return cls(
            spec="; ".join(dict.fromkeys(report.spec for report in reports)),
            rank=rank,
            world_size=world_size,
            steps=max(report.steps for report in reports),
            seconds={key: sum(report.seconds[key] for report in reports) for key in first.seconds},
            rows=[row for report in reports for row in report.rows],
            phase_steps={
                phase: max(report.phase_steps.get(phase, 0) for report in reports)
                for phase in dict.fromkeys(phase for report in reports for phase in report.phase_steps)
            },
            choices=[choice for report in reports for choice in report.choices],
            **sums,
        )

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain numbers, strings, lists and dicts."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "backend_bytes": self.backend_bytes,
            "inside_bytes": self.inside_bytes,
            "roles": self.roles,
            "rules": self.rules,
            "phases": self.phases,
        }

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict()` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def log(self, since: "Report | None" = None) -> dict[str, float]:
        """Return numbers for a tracker such as wandb, TensorBoard or MLflow: means of a step since an earlier report.

        MB are those that this rank sent. Ratios compare them with a dense exchange, in the tensors' own dtype and in bfloat16;
        they are left out if nothing was sent. Each role has its own numbers if there are several. Empty if there was no
        step.
        """
        steps = self.steps - (since.steps if since else 0)
        if steps <= 0:
            return {}
        found: dict[str, float] = {}
        roles = list(self.roles)
        for role in (None, *roles) if len(roles) > 1 else (None,):
            after = [row for row in self.rows if role in (None, row.role)]
            before = [row for row in since.rows if role in (None, row.role)] if since else []
            name = "commpress" if role is None else f"commpress/{role}"
            sent, dense, bf16 = (
                sum(map(count, after)) - sum(map(count, before))
                for count in (attrgetter("sent_bytes"), attrgetter("dense_bytes"), partial(dense_in, itemsize=2))
            )
            found[f"{name}/sent_mb_per_step"] = sent / 1e6 / steps
            if sent:
                found |= {f"{name}/ratio": dense / sent, f"{name}/ratio_bf16": bf16 / sent}
        for phase, seconds in self.seconds.items():
            found[f"commpress/{phase}_ms"] = (seconds - (since.seconds[phase] if since else 0.0)) * 1e3 / steps
        return found

    def __str__(self) -> str:
        return tables.text(self)

    def _repr_html_(self) -> str:
        return tables.html(self)


def dense_in(row: Row, itemsize: int) -> float:
    """Return the bytes of a dense exchange of a row, in floats of `itemsize` bytes; integers keep their size."""
    dtype: torch.dtype = getattr(torch, row.dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return row.dense_bytes
    return row.dense_bytes * (itemsize / (dtype.itemsize / (2 if dtype.is_complex else 1)))


class Meter:
    """The sums of the sequencer's figures; only one thread writes at a time (the sequencer's)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[object, ...], Row] = {}
        self.steps = 0
        self.exposed = 0.0
        self.hidden = 0.0
        self.phase = ""
        """The name of the present phase: each phase has its own rows."""
        self._entered: list[tuple[str, int]] = []
        self.timeline: Timeline | None = None
        """The timeline that is being recorded; None if there is none."""

    def note(self, span: Span) -> None:
        """Keep a span if a timeline is being recorded."""
        if (timeline := self.timeline) is not None:
            timeline.spans.append(span)

    def enter(self, phase: str) -> None:
        """Begin a phase with the next step."""
        if phase != self.phase:
            self.phase = phase
            self._entered.append((phase, self.steps))

    def row(
        self,
        bucket: int,
        values: int,
        dtype: str,
        spec: str,
        exchange: str,
        reason: str,
        role: str = "gradients",
        rules: Mapping[str, int] | None = None,
    ) -> Row:
        """Return the row of a bucket; a bucket with a new layout or another plan gets a new one."""
        rules = rules or {}
        key = (bucket, values, dtype, spec, exchange, reason, role, self.phase, *rules.items())
        if key not in self.rows:
            self.rows[key] = Row(bucket, values, dtype, spec, exchange, reason, role, self.phase, dict(rules))
        return self.rows[key]

    def record_uncompressed(
        self, bucket: int, values: int, dtype: str, exchange: str, reason: str, role: str, sent: int
    ) -> None:
        """Count `sent` bytes that a framework, or a group's own collective, has sent uncompressed, in the caller's thread."""
        row = self.row(bucket, values, dtype, "none", exchange, reason, role)
        row.steps += 1
        row.dense_bytes += sent
        row.sent_bytes += sent
        row.received_bytes += sent
        row.backend_bytes += sent

    def report(self, spec: str, rank: int, world_size: int) -> Report:
        """Return the sums so far."""
        rows = [Row(**asdict(row)) for row in self.rows.values()]
        seconds = {phase: sum(row.seconds[phase] for row in rows) for phase in PHASES}
        seconds |= {"exposed": self.exposed, "hidden": self.hidden}
        dense, sent, received = (sum(getattr(r, key) for r in rows) for key in BYTES)
        phases: dict[str, int] = {}
        ends = [start for _, start in self._entered[1:]] + [self.steps]
        for (phase, start), end in zip(self._entered, ends, strict=False):
            phases[phase] = phases.get(phase, 0) + end - start
        phases = {phase: steps for phase, steps in phases.items() if steps}
        return Report(spec, rank, world_size, self.steps, dense, sent, received, seconds, rows, phases)


def how_sent(spec: str, exchange: str, reason: str) -> str:
    """Return how this exchange sent a bucket, or why it was not sent, or not compressed."""
    if exchange == NOT_SENT:
        return f"not sent: {reason}"
    return f"not compressed: {reason}" if reason else f"{spec} by {exchange}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a report."""
    return str(dtype).removeprefix("torch.")
