"""Bytes and seconds: what a dense exchange would have sent, what was sent, and where the time went.

Bytes are those that this rank handed to its process group for other ranks. The dense figure is what must be sent without
compression: of gradients a ring all-reduce of the same buckets in their own dtype, 2 (W - 1) / W of their size; of sharded
gradients a reduce-scatter, and of sharded parameters an all-gather, W - 1 shards each; of a sharded matrix that one rank steps
for all the float32 rows that change hands; of an outer update what DDP would have sent in the steps since the one before. Gloo
and DeepSpeed all-reduce where a reduce-scatter would do: what they would have sent is counted beside it (`backend_bytes`). A
bucket that is left to them counts as dense what they did send.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from commpress.comm.timeline import Span, Timeline

PHASES = ("encode", "wire", "decode")
ROLES = ("gradients", "parameters", "updates", "outer", "buffers")
"""Kinds of traffic: in every step the gradients and, where parameters are sharded, the parameters; what an optimizer sends of
sharded matrices, and the updates that the ranks of a node make for each other; between rounds of local steps their outer
updates; the buffers that DDP broadcasts."""
NOT_SENT = "none"
"""The name of the exchange that leaves a bucket on its rank."""
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
    """The values in it that each rule decides for, by its text; empty where one spec is given for all."""
    steps: int = 0
    dense_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    inside_bytes: int = 0
    """Bytes of those sent that did not leave the node, as far as the exchange tells them apart."""
    backend_bytes: int = 0
    """Bytes that the group or the framework itself would send uncompressed: `dense_bytes`, or more."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def how(self) -> str:
        """Return what was done with it, or why it was not compressed."""
        return how_sent(self.spec, self.exchange, self.reason)


@dataclass
class Report:
    """Bytes and seconds of one rank. `ratio` is dense over sent bytes.

    `seconds`: `encode` and `decode` are the codec's, `wire` from the start of a transfer until it was there and a thread was
    free to go on with it (transfers overlap each other and the codec), `exposed` the part that training waited for after
    its last gradient was ready, and `hidden` the part of the exchanges that ran while backward went on.
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
    """How many steps each phase of a recipe took; empty without one."""

    @property
    def ratio(self) -> float:
        """Dense over sent bytes; 1.0 if nothing had to be sent."""
        return self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0

    @property
    def backend_bytes(self) -> int:
        """Bytes that the group or the framework itself would have sent uncompressed; more than `dense_bytes` where it
        all-reduces instead of a reduce-scatter, as Gloo does."""
        return sum(row.backend_bytes for row in self.rows)

    @property
    def inside_bytes(self) -> int:
        """Bytes of those sent that did not leave the node, where the exchange is `hierarchical` or ranks share out what they
        compute: the rest went to others."""
        return sum(row.inside_bytes for row in self.rows)

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """`dense_bytes`, `sent_bytes` and `received_bytes` of each role that has rows."""
        return {
            role: {key: sum(getattr(row, key) for row in mine) for key in BYTES}
            for role in ROLES
            if (mine := [row for row in self.rows if row.role == role])
        }

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """`steps` and the bytes of each phase of a recipe, in order; empty without one."""
        found = {phase: {"steps": steps, **dict.fromkeys(BYTES, 0)} for phase, steps in self.phase_steps.items()}
        for row in self.rows:
            if (sums := found.get(row.phase)) is not None:
                sums |= {key: sums[key] + getattr(row, key) for key in BYTES}
        return found

    @property
    def rules(self) -> dict[str, dict[str, float]]:
        """`values` of a step, the bytes and the `ratio` of each rule, in order; empty where one spec is given for all.

        Parameters of rules with one spec travel together: their bytes are shared out by their values.
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
        """One report of several sessions of this process, such as a DDP session inside a node and an outer one between nodes.

        They may be of different groups: the sum is of this rank among all ranks. Raises ValueError if there are none.
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
            **sums,
        )

    def to_dict(self) -> dict[str, object]:
        """All of it as plain numbers, strings, lists and dicts."""
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

    def __str__(self) -> str:
        each = max(self.steps, 1)
        table = Table(
            title=f"commpress {escape(self.spec)}: rank {self.rank} of {self.world_size}, {self.steps} steps",
            caption=self._beside(),
            caption_justify="left",
        )
        table.add_column("bucket")
        for name in ("values", "dense MB/step", "sent MB/step", "ratio", "encode ms", "wire ms", "decode ms"):
            table.add_column(name, justify="right")
        table.add_column("how")
        roles = self.roles
        for row in _all_phases(self.rows):
            ratio = f"{row.dense_bytes / row.sent_bytes:.1f}" if row.sent_bytes else "-"
            mb = (f"{b / 1e6 / max(row.steps, 1):.3f}" for b in (row.dense_bytes, row.sent_bytes))
            ms = (f"{row.seconds[p] * 1e3 / max(row.steps, 1):.2f}" for p in PHASES)
            name = str(row.bucket) if len(roles) == 1 else f"{row.role} {row.bucket}"
            name += f" ({row.steps} steps)" if row.steps != self.steps else ""
            table.add_row(name, f"{row.values:,}", *mb, ratio, *ms, row.how)
        table.add_section()
        for role, of in roles.items() if len(roles) > 1 else ():
            mb = (f"{of[key] / 1e6 / each:.3f}" for key in ("dense_bytes", "sent_bytes"))
            ratio = f"{of['dense_bytes'] / of['sent_bytes']:.1f}" if of["sent_bytes"] else "-"
            table.add_row(f"all {role}", "", *mb, ratio, "", "", "", "")
        for rule, sums in self.rules.items():
            mb = (f"{sums[key] / 1e6 / each:.3f}" for key in ("dense_bytes", "sent_bytes"))
            ratio = f"{sums['ratio']:.1f}" if sums["sent_bytes"] else "-"
            table.add_row(escape(rule), f"{sums['values']:,}", *mb, ratio, "", "", "", "by rule")
        for phase, of in self.phases.items():
            mb = (f"{of[key] / 1e6 / max(of['steps'], 1):.3f}" for key in ("dense_bytes", "sent_bytes"))
            ratio = f"{of['dense_bytes'] / of['sent_bytes']:.1f}" if of["sent_bytes"] else "-"
            table.add_row(phase, "", *mb, ratio, "", "", "", f"{of['steps']} steps")
        mb = (f"{b / 1e6 / each:.3f}" for b in (self.dense_bytes, self.sent_bytes))
        ms = (f"{self.seconds[p] * 1e3 / each:.2f}" for p in PHASES)
        after, hidden = (self.seconds[k] * 1e3 / each for k in ("exposed", "hidden"))
        table.add_row("all", "", *mb, f"{self.ratio:.1f}", *ms, f"{hidden:.2f} ms hidden, {after:.2f} ms exposed")
        text = StringIO()
        Console(file=text, width=132).print(table)
        return text.getvalue()

    def _beside(self) -> str | None:
        """Sentences on what stayed inside the node, and on what the backend sends instead of a reduce-scatter."""
        return " ".join(filter(None, (self._inside_and_between(), self._backend_more()))) or None

    def _inside_and_between(self) -> str:
        inside = [row for row in self.rows if row.inside_bytes]
        if not inside:
            return ""
        stayed, sent = (sum(getattr(row, key) for row in inside) for key in ("inside_bytes", "sent_bytes"))
        stay, leave = (f"{b / 1e6 / max(self.steps, 1):.3f}" for b in (stayed, sent - stayed))
        of = ", ".join(dict.fromkeys("updates" if row.role == "updates" else "hierarchical" for row in inside))
        return f"Of what was sent ({of}), {stay} MB a step stayed inside the node, as it is; {leave} MB went to other nodes."

    def _backend_more(self) -> str:
        more = [row for row in self.rows if row.backend_bytes > row.dense_bytes]
        if not more:
            return ""
        dense, backend = (sum(getattr(row, key) for row in more) for key in ("dense_bytes", "backend_bytes"))
        megabytes = (f"{b / 1e6 / max(self.steps, 1):.3f}" for b in (backend, dense))
        return (
            "Uncompressed, the backend itself would have sent {} MB a step where a reduce-scatter must send {}: it all-reduces "
            "and keeps a part. Ratios are against the latter."
        ).format(*megabytes)


def _all_phases(rows: list[Row]) -> list[Row]:
    """The rows of each bucket and override added up over the phases."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.bucket, row.values, row.dtype, row.spec, row.exchange, row.reason, row.role)
        whole = found.setdefault((*key, *row.rules.items()), Row(*key))
        whole.steps += row.steps
        for name in (*BYTES, "inside_bytes", "backend_bytes"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        whole.seconds = {phase: whole.seconds[phase] + row.seconds[phase] for phase in PHASES}
    return list(found.values())


class Meter:
    """Adds up what the sequencer reports; one writer at a time (the sequencer's)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[object, ...], Row] = {}
        self.steps = 0
        self.exposed = 0.0
        self.hidden = 0.0
        self.phase = ""
        """A name for what is going on with the model: the rows of each phase are kept apart."""
        self._entered: list[tuple[str, int]] = []
        self.timeline: Timeline | None = None
        """Where spans are kept, while somebody wants them."""

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
        """Return the row of a bucket; a bucket that was laid out anew, or has got another plan, gets a new one."""
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
    """Return how a bucket was sent by this exchange, or why it was not, or not compressed."""
    if exchange == NOT_SENT:
        return f"not sent: {reason}"
    return f"not compressed: {reason}" if reason else f"{spec} by {exchange}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as a report has it."""
    return str(dtype).removeprefix("torch.")
