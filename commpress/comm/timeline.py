"""A timeline: spans of forward, backward, encode, wire, decode and exposed, as a trace for ui.perfetto.dev.

    training  [ forward ]   [     backward      ][ exposed ]
    encode                       [0]    [1]    [2]
    wire                            [== 0 ==]     [= 2 =]          one line more where two transfers overlap
                                           [== 1 ==]
    decode                                  [0]     [1] [2]

Times are the host's. On an accelerator they show only when work was enqueued; use `torch.profiler` there, which shows ranges
with the same names (`commpress::encode`, ...) around the kernels.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRAINING = ("forward", "backward", "exposed")


@dataclass(frozen=True)
class Span:
    """One phase of one step; seconds are on `time.perf_counter`. `bucket` is None for phases of the whole model."""

    phase: str
    step: int
    bucket: int | None
    start: float
    end: float


@dataclass
class Timeline:
    """The spans of one rank. Several threads add to it."""

    rank: int
    spans: list[Span] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the trace in Chrome's format: microseconds from the first span, a process a rank, a line a kind of work."""
        spans = sorted(self.spans, key=lambda span: (span.start, -span.end))
        origin = spans[0].start if spans else 0.0
        lines: list[tuple[str, float]] = []  # the name of each line and when it is free again
        events: list[dict[str, Any]] = []
        for span in spans:
            name = "training" if span.phase in TRAINING else span.phase
            place = next((i for i, (n, free) in enumerate(lines) if n == name and free <= span.start), len(lines))
            lines[place : place + 1] = [(name, span.end)]
            where = {"step": span.step} | ({} if span.bucket is None else {"bucket": span.bucket})
            events.append(
                {
                    "ph": "X",
                    "name": span.phase,
                    "pid": self.rank,
                    "tid": place,
                    "ts": (span.start - origin) * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                    "args": where,
                }
            )
        names: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": self.rank, "args": {"name": f"rank {self.rank}"}}
        ]
        for i, (name, _) in enumerate(lines):
            names.append({"ph": "M", "name": "thread_name", "pid": self.rank, "tid": i, "args": {"name": name}})
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}

    def write(self, path: str | Path) -> None:
        """Write the trace to a file that ui.perfetto.dev, chrome://tracing and `commpress report` open."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")
