"""The demo: in a few minutes on one machine it trains one small GPT on two ranks, uncompressed and compressed.

    python -m commpress.launch.demo

Where root may make one, the ranks are two hosts of a network lab (`lab.py`) that a link of 1 Gbit/s joins; else they talk over
this machine's loopback, and what `commpress explain` predicts for that link stands beside what was measured. The last line
is one sentence: what auto chose, and what that gained (`gain.py`).
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from commpress import extras
from commpress.launch import checkpoint, gain
from commpress.launch.foretold import Foretold, foretell
from commpress.launch.link import Link, free_port
from commpress.launch.records import Record, link_name, read

try:
    from commpress.launch import command_line, lab, report
    from commpress.launch.sections import runs
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.demo", error, "launch") from None

RUNS: dict[str, dict[str, Any]] = {
    "none": {"compress": "none"},
    "auto": {"compress": "auto"},
    "one-bit": {"compress": "sign", "optimizer": "OneBitAdamW", "warmup-compress": "int4"},
}
"""Folder and flags of each run."""
LINK = Link(hosts=2, rate="1gbit")
MODEL = {"layers": 4, "width": 256, "heads": 4, "context": 64, "batch": 4}
TRAINING = {"lr": 2e-3, "warmup-steps": 30, "eval-batches": 16, "seed": 0, "threads": 1}
LIMIT_SECONDS = 600.0
GLANCE_SECONDS = 0.2
"""How often the demo looks at what a run has printed."""
GRACE_SECONDS = 40.0
"""Seconds until a run must end; torchrun gives its ranks 30 seconds."""
LAST_LINES = 30
STEP = re.compile(r"step (\d+)/\d+  (.*?loss \S+( val \S+)?.*)")
"""A line of progress: the step, all of its figures, the held-out loss."""


class DemoError(Exception):
    """A training run of the demo failed."""


def demo(out: Path, steps: int) -> Path:
    """Train once for each of RUNS, print the table and what was gained; return the HTML report's path. Raises DemoError."""
    console = Console()
    records: list[Record] = []
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    reason = without_link()
    if reason:
        console.print(f"{reason}; the ranks talk over this machine's loopback, which is faster than a network")
    over = "loopback" if reason else link_name(asdict(LINK))
    for folder, flags in RUNS.items():
        called = f"{flags.get('optimizer', 'AdamW')} {flags['compress']}"
        console.print(f"\n[bold]{len(records) + 1} of {len(RUNS)}[/bold]", called, highlight=False, markup=True)
        records.append(train(out / folder, flags, steps, shaped=not reason))
    names = runs.titles(records)
    foretold = foretell(records, LINK) if reason else None
    path = out / "report.html"
    report.write(path, report.page([*records, foretold.record] if foretold else records))
    console.print()
    console.print(results(records, over, foretold))
    notes = [
        f"All runs, and what each of them printed: {out.resolve()}",
        "OneBitAdamW warms up on int4 gradients, then sends the signs of what AdamW would apply.",
        gain.ABOUT_LOSS,
        f"{time.monotonic() - started:.0f} s in all. Report: {path.resolve()}",
    ]
    for note in notes:
        console.print(note, style="dim", soft_wrap=True, highlight=False, markup=False)
    said = gain.headline(list(zip(names, records, strict=True)))
    console.print(
        f"\n{said}; {foretold.sentence}" if foretold else f"\n{said}", soft_wrap=True, highlight=False, markup=False
    )
    return path


def without_link() -> str:
    """Return why no link can be made here, after trying; empty if one can."""
    if reason := lab.missing():
        return reason
    try:
        with lab.network(LINK):
            return ""
    except (RuntimeError, OSError) as error:
        return f"this machine makes no network lab: {str(error).splitlines()[0]}"


def train(out: Path, chosen: dict[str, Any], steps: int, shaped: bool) -> Record:
    """One run of the training program on two ranks of this machine, shown as it goes; its record. Raises DemoError.

    `chosen` are the flags by which this run differs from the others. If it is `shaped`, the ranks are hosts joined by LINK,
    else they use loopback. No process and no network is left, even after an error.
    """
    spec = chosen["compress"]
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.clear(out)
    record, errors, printed = out / "record.json", out / "stderr.log", out / "stdout.log"
    record.unlink(missing_ok=True)
    flags = {**MODEL, **TRAINING, **chosen, "steps": steps, "eval-every": max(1, steps // 5), "out": out}
    program = ["-m", "commpress.launch.train"]
    program += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    if shaped:
        lab_of = ("-m", "commpress.launch.lab", str(LINK.hosts), LINK.rate, "--")
        command = [sys.executable, *lab_of, sys.executable, *program]
    else:
        port = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port, *program]
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    with errors.open("wb") as log, printed.open("wb") as lines:
        child = subprocess.Popen(command, stdout=lines, stderr=log, env=environment, start_new_session=True)
        try:
            code = watched(child, printed, steps)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{spec}: not done after {LIMIT_SECONDS:.0f} s, killed\n{tail(errors)}") from None
        finally:
            try:
                end(child)
            finally:  # of a lab that had to be killed
                if shaped:
                    lab.remove_orphans()
    if code != 0:
        raise DemoError(f"{spec}: the training program ended with code {code}\n{tail(errors)}")
    return read(record)


def watched(child: "subprocess.Popen[bytes]", printed: Path, steps: int) -> int:
    """Show how far a run is until it ends; its code. Raises subprocess.TimeoutExpired after LIMIT_SECONDS.

    A bar in a terminal, else a line for each validation. All that it prints is in the file `printed`.
    """
    until = time.monotonic() + LIMIT_SECONDS
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False))
    with printed.open() as lines, Progress(*columns, expand=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=steps, figures="starting")
        told, cut = None, ""  # the first line is told, too
        while True:
            code = child.poll()  # before the last lines are read
            *whole, cut = (cut + lines.read()).split("\n")
            for line in whole:
                if found := STEP.match(line):
                    bar.update(task, completed=int(found[1]), figures=found[2])
                    validation = found[3] or ""
                    if bar.disable and validation != told:
                        print(line, flush=True)
                    told = validation
            if code is not None:
                return code
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(child.args, LIMIT_SECONDS)
            time.sleep(GLANCE_SECONDS)


def results(records: list[Record], over: str, foretold: Foretold | None = None) -> Table:
    """The demo's table: a row a run. `over` says what the ranks talk over; beside its seconds those that are foretold."""
    head, *rows = runs.summary(list(zip(runs.titles(records), records, strict=True)))
    first = records[0]
    table = Table(
        title=f"{first['parameters'] / 1e6:.1f} M parameters, {first['world_size']} ranks, {first['steps_done']} steps, {over}",
        box=box.SIMPLE_HEAD,
    )
    left_out = {"steps", "against none"} if foretold else {"steps"}  # 80 columns are few
    shown = [i for i, name in enumerate(head) if name not in left_out]
    for i in shown:
        table.add_column(head[i], justify="right" if i else "left", no_wrap=not i)
    if foretold:
        table.add_column(f"predicted, {foretold.link}", justify="right", min_width=10)
    for at, row in enumerate(rows):
        table.add_row(*(row[i] for i in shown), *([f"{foretold.steps[at] * 1e3:.0f} ms"] if foretold else []))
    return table


def end(child: "subprocess.Popen[bytes]") -> None:
    """End a child and its processes, if it still runs: by SIGTERM first, so that torchrun ends its ranks itself."""
    if child.poll() is not None:
        return
    family = descendants(child.pid)
    try:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    finally:  # also if a second Ctrl-C ends the waiting
        child.kill()
        child.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and their own."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in listing.splitlines())}
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def tail(path: Path) -> str:
    """Return the last lines of a log before torchrun's own, which say less, without torch's warnings."""
    log = re.sub(r"^\[W\d+ .*\n", "", path.read_text(errors="replace"), flags=re.MULTILINE)
    said = re.split(r"^[EW]\d{4} .*torch/distributed/elastic/", log, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join((said.strip() or log).splitlines()[-LAST_LINES:])


def interrupted(number: int, frame: FrameType | None) -> None:
    """End the demo on SIGTERM as on Ctrl-C: through its finally blocks."""
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Demo:
    """Train a small GPT on two ranks here, uncompressed and compressed, and compare."""

    out: Path = Path("runs/demo")
    """Folder for the three runs and the report."""
    steps: int = 200
    """Optimizer steps of each run."""

    def run(self) -> None:
        """Run the demo. Ends the program with code 1 and a sentence if it fails, with 130 if it is stopped."""
        signal.signal(signal.SIGTERM, interrupted)
        try:
            if self.steps < 1:
                raise ValueError(f"--steps {self.steps}: expected at least 1")
            demo(self.out, self.steps)
        except (DemoError, ValueError) as error:
            said, code = f"error: {error}", 1
        except OSError as error:
            said, code = f"error: --out {self.out}: {error.filename or self.out}: {error.strerror or error}", 1
        except KeyboardInterrupt:
            said, code = "stopped", 130
        else:
            return
        print(said, file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    command_line.read(Demo, "python -m commpress.launch.demo").run()
