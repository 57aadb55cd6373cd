"""Does commpress work on this GPU, and how fast? One command, under 8 minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--out runs/gpu-check]

Each codec's ops against their definitions' bytes, and their rates against a copy on the device; the same of the passes that
have no codec; small trainings and every exchange by NCCL on one rank, by Gloo on two ranks that share the first GPU and, where
there are several, by NCCL on all of them, with `bandwidth.py` and `training.py`. Losses are compared with those of a CPU.

Each part runs in processes of its own and for so long; what fails there is a row that says why. Codes: 0 if all is good, 1 if a
row failed, 2 without a GPU. OUT/gpu-check.json is for `commpress report`. With `--device cpu` it is a rehearsal of the program.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_bytes
import gpu_parts
import torch
from codec_cases import MB, SPECS
from gpu_ranks import COLLECTIVES, EXCHANGED, RUNS, SIZES, STEPS
from gpu_ranks import SPECS as SPECS_OF_RANKS
from gpu_worker import PASSES, Job
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from commpress.comm.codecs import WORDS, parse
from commpress.launch.gpu_record import ACTIONS, COLUMNS, LEGEND, answer, lines, title
from commpress.launch.run_record import cores, where

Record = dict[str, Any]
BENCHMARKS = Path(__file__).parent
LIMIT_SECONDS = 450.0
"""For all parts; what starts late gets what is left of it."""
COMPILE_SECONDS, BYTES_SECONDS, RATES_SECONDS, CPU_SECONDS, RANKS_SECONDS, PROGRAM_SECONDS = (
    75.0,
    170.0,
    90.0,
    100.0,
    75.0,
    60.0,
)
CODECS, PASSES_PART = "codecs", "passes"
MOST_PROCESSES = 8
TOLERANCE, TOLERANCE_BFLOAT16 = 5e-3, 2e-2
"""How far a loss may be from the CPU's. Weights that are changed by 1e-6 move it by 9e-4 at most, that of FSDP2."""


EVERY = tuple(sorted({*gpu_bytes.battery.SPECS, *SPECS}, key=lambda spec: (list(WORDS).index(parse(spec).word), spec)))
"""Specs to compare: one family after another."""


COMPILED = (*SPECS_OF_RANKS, "powersgd(2)", PASSES)
"""What ranks use: sessions compile it."""


@dataclass(frozen=True)
class Check:
    """What is tried, and on what. Fields are smaller in a test."""

    device: str = "cuda"
    specs: tuple[str, ...] = EVERY
    timed: tuple[str, ...] = SPECS
    compiled: tuple[str, ...] = COMPILED
    passes: bool = True
    runs: tuple[str, ...] = tuple(RUNS)
    small: bool = False
    mb: float = MB["cuda"]
    repeat: int = 11
    steps: int = STEPS
    sizes: tuple[int, ...] = SIZES
    worlds: tuple[int, ...] = (1, 2)
    """On the first GPU: 1 by NCCL, 2 by Gloo."""
    folder: Path = Path("runs/gpu-check")
    until: float = field(default_factory=lambda: time.monotonic() + LIMIT_SECONDS)

    def work_off(self, job: Job, name: str, seconds: float) -> list[Record]:
        """Return the records of a job's items, by the end of this check's time."""
        return gpu_parts.work_off(job, name, self.folder, max(0.0, min(seconds, self.until - time.monotonic())))

    @property
    def first(self) -> str:
        """The name of the first device."""
        return "cpu" if self.device == "cpu" else "cuda:0"

    @property
    def gpus(self) -> int:
        """How many there are."""
        return torch.cuda.device_count() if self.device == "cuda" else 0


def say(text: str) -> None:
    """Print what is being done now."""
    print(f"== {text}", flush=True)


def codecs_and_passes(check: Check) -> tuple[float | None, list[Record]]:
    """The median copy's seconds, and rows of the codecs and the passes: bytes, then rates."""
    passes = [PASSES] if check.passes else []
    say("kernels that ranks need are compiled, so that none of them waits for that")
    side_by_side(check, "compile", check.compiled, COMPILE_SECONDS)  # what fails here fails where it is needed, too
    say(f"bytes of {len(check.specs)} codecs against their definitions")
    compared = side_by_side(check, "bytes", (*check.specs, *passes), BYTES_SECONDS)
    timed = [*check.timed, *passes]
    say(f"rates of {len(check.timed)} codecs against a copy on the device")
    job = Job("rates", timed, [check.first], values=int(check.mb * 1e6 / 4), repeat=check.repeat)
    rates = {record["item"]: record for record in check.work_off(job, "rates", RATES_SECONDS)}
    copies = sorted(record["copy_seconds"] for record in rates.values() if not record["error"])
    rows = []
    for spec in dict.fromkeys([*check.specs, *check.timed]):
        bytes_of, rate = compared.get(spec, {"error": ""}), rates.get(spec, {"error": ""})
        rows.append(
            {**bytes_of, **rate, "part": CODECS, "name": spec, "error": joined(bytes_of["error"], rate["error"])}
        )
    if passes:
        rows += passes_rows(compared[PASSES], rates[PASSES])
    return (copies[len(copies) // 2] if copies else None), rows


def side_by_side(check: Check, kind: str, items: tuple[str, ...], seconds: float) -> dict[str, Record]:
    """Work off items in as many processes as there are cores. Returns the records by item."""
    count = min(MOST_PROCESSES, cores(), len(items))
    jobs = [Job(kind, list(items[i::count]), [check.first], small=check.small) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        started = [pool.submit(check.work_off, job, f"{kind}{i}", seconds) for i, job in enumerate(jobs)]
        try:
            return {record["item"]: record for future in started for record in future.result()}
        except BaseException:
            gpu_parts.stopped.set()
            raise


def passes_rows(compared: Record, rates: Record) -> list[Record]:
    """A row for each pass without a codec; one that says why there are none."""
    if compared["error"] or rates["error"]:
        return [{"part": PASSES_PART, "name": "all", "error": joined(compared["error"], rates["error"])}]
    shares = rates["passes"]
    return [{**row, "part": PASSES_PART, "name": row["op"], "shares": shares[row["op"]]} for row in compared["passes"]]


def joined(*errors: str) -> str:
    """Return all errors that there are, as one text."""
    return "; ".join(dict.fromkeys(filter(None, errors)))


def groups(check: Check) -> list[tuple[str, list[str], str]]:
    """Return the groups of ranks: what each is called, its ranks' devices, its backend."""
    found = []
    for world in check.worlds:
        backend = "gloo" if world > 1 or check.device == "cpu" else "nccl"
        name = "NCCL" if backend == "nccl" else "Gloo in NCCL's place" if world == 1 else "Gloo"
        ranks = "1 rank" if world == 1 else f"{world} ranks on one device"
        found.append((f"{name}, {ranks}", [check.first] * world, backend))
    if check.gpus > 1:
        every = [f"cuda:{i}" for i in range(check.gpus)]
        found.append((f"NCCL, {check.gpus} ranks", every, "nccl"))
    return found


def trainings(check: Check) -> list[Record]:
    """Rows of the groups of ranks: torch's collectives, every exchange, small trainings against a CPU's."""
    rows: list[Record] = []
    known: dict[int, dict[str, Record]] = {}
    for part, devices, backend in groups(check):
        W = len(devices)
        job = Job("ranks", list(check.runs), ["cpu"] * W, "gloo", steps=check.steps, sizes=check.sizes)
        if W not in known:
            say(f"{len(job.items)} small trainings on the CPU, {W} rank{'s' * (W > 1)}")
            known[W] = {r["item"]: r for r in check.work_off(job, f"cpu{W}", CPU_SECONDS)}
        say(f"the same by {part}, with every exchange")
        exchanges = [] if backend == "gloo" and W == 1 else [EXCHANGED]  # a rank alone on a CPU has no wire
        job = Job(
            "ranks", [COLLECTIVES, *exchanges, *check.runs], devices, backend, steps=check.steps, sizes=check.sizes
        )
        for record in check.work_off(job, f"{backend}{W}", RANKS_SECONDS):
            row = {**record, "part": part, "name": record["item"]}
            rows.append(against(row, known[W][record["item"]]) if record["item"] in RUNS else row)
    return rows


def against(row: Record, reference: Record) -> Record:
    """Return the row of a training with how far its losses are from the CPU's; too far is an error."""
    if row["error"] or reference["error"]:
        said = f"nothing to compare with, on the CPU: {reference['error']}" if reference["error"] else ""
        return row | {"error": joined(row["error"], said)}
    pairs = list(zip(row["losses"], reference["losses"], strict=True))
    off = [abs(a - b) / abs(b) for a, b in pairs]
    tolerance = TOLERANCE_BFLOAT16 if "bfloat16" in row["name"] else TOLERANCE
    worst = max(range(len(off)), key=lambda i: off[i] if off[i] == off[i] else float("inf"))
    row |= {"off": off[worst], "reference": reference["losses"]}
    if not off[worst] <= tolerance:
        here, there = pairs[worst]
        said = f"the loss of step {worst + 1} is {here:.4f}, on the CPU {there:.4f}: expected it within {tolerance:.1%}"
        row["error"] = f"{row['name']}: {said}"
    return row


def programs(check: Check) -> list[Record]:
    """Rows of `bandwidth.py` and `training.py` on all GPUs, where there are several."""
    W, rows = check.gpus, []
    if W < 2:
        return []
    few = ["plain DDP", "int8", "int4", "sign", "topk(0.01)|int4"]
    for name, arguments in (
        ("bandwidth.py", ["int8", "int4", "sign", "--from", "1mb", "--to", "64mb", "--repeats", "5"]),
        ("training.py", ["--device", "cuda", "--rounds", "3", "--only", *few]),
    ):
        say(f"benchmarks/{name} on {W} GPUs")
        out = check.folder / f"{Path(name).stem}.json"
        command = [sys.executable, str(BENCHMARKS / name), *arguments, "--json", str(out)]
        seconds = max(0.0, min(PROGRAM_SECONDS, check.until - time.monotonic()))
        with gpu_parts.Ranks(command, W, check.folder, Path(name).stem) as ranks:
            error = ranks.wait(seconds)
        said = "" if error else gpu_parts.final_line(ranks.logs[0])
        rows.append({"part": f"NCCL, {W} ranks", "name": name, "error": error and f"{name}: {error}", "text": said})
    return rows


def run(check: Check) -> Record:
    """Try all that there is, and return the record."""
    started = time.monotonic()
    check.folder.mkdir(parents=True, exist_ok=True)
    copy, rows = codecs_and_passes(check)
    rows += [*trainings(check), *programs(check)]
    here = torch.device(check.first)
    about = {"what": "gpu check", "rehearsal": check.device == "cpu", **where(here), "gpus": check.gpus}
    if here.type == "cuda":
        about["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(here))
    about |= {"torch": torch.__version__, "triton": version_of("triton"), "commpress": version_of("commpress")}
    measured = {"values": int(check.mb * 1e6 / 4), "copy_seconds": copy, "seconds": time.monotonic() - started}
    return (
        about | measured | {"rows": [{k: v for k, v in row.items() if k not in ("item", "ends", "op")} for row in rows]}
    )


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def shown(record: Record) -> Table:
    """The one table, a section a part."""
    table = Table(title=escape(title(record)), caption=LEGEND)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ACTIONS else "left", overflow="fold", no_wrap=name in ACTIONS)
    for part, rows in lines(record):
        table.add_section()
        table.add_row(f"[bold]{escape(part)}[/bold]")
        for cells in rows:
            style = "red" if cells[1].startswith("FAILED") else ""
            table.add_row(*(escape(cell) for cell in cells), style=style)
    return table


def main(arguments: Iterable[str] | None = None) -> int:
    """Check, print the table, write the record. Returns the code to end with."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, without a GPU")
    options.add_argument(
        "--out", type=Path, default=Check.folder, help="folder for the record and the logs of all processes"
    )
    chosen = options.parse_args(None if arguments is None else list(arguments))
    check = Check(chosen.device, folder=chosen.out)
    if chosen.device == "cpu":
        check = Check("cpu", folder=chosen.out, mb=MB["cpu"], repeat=3)
    elif not torch.cuda.is_available():
        said = f"error: torch {torch.__version__} finds no GPU on this machine; --device cpu rehearses the check without one"
        print(said, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, interrupted)
    try:
        return finish(run(check), check.folder)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the check as Ctrl-C does, with all processes of its parts."""
    raise KeyboardInterrupt


def finish(record: Record, folder: Path) -> int:
    """Print the table of a record and write it. Returns 0 if no row failed, else 1."""
    place = folder / "gpu-check.json"
    place.write_text(json.dumps(record, indent=1) + "\n")
    console = Console(width=150)
    console.print(shown(record))
    print(f"record in {place}: commpress report gpu-check.html {place}")
    print(answer(record))
    return int(any(row["error"] for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
