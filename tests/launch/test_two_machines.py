"""docs/two_machines.md by the letter: its commands, typed on two hosts whose own names resolve to 127.0.1.1, as on Debian."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_documents import BLOCKS

from commpress.launch import lab
from commpress.launch.link import Link

BASH = [block.code for block in BLOCKS if block.file.name == "two_machines.md" and block.kind == "bash"]
SCRIPT = next(block.code for block in BLOCKS if block.file.name == "quickstart.md" and block.kind == "python")
SMALL = "--layers 1 --width 64 --heads 2 --context 32 --batch 4 --warmup-steps 1 --eval-batches 2 --threads 1"
VARIABLES = "\n".join(line for code in BASH for line in code.splitlines() if line.startswith("export "))


def typed(code: str) -> list[str]:
    """What a block has for machines A and B."""
    _, *parts = re.split(r"^# [AB]$\n", code, flags=re.MULTILINE)
    return parts if parts else [code, code]


def block(*words: str) -> str:
    (found,) = [code for code in BASH if all(word in code for word in words)]
    return found


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[lab.Host]]:
    with lab.network(Link(2, "1gbit")) as found:
        yield found


def together(hosts: list[lab.Host], code: str, folder: Path, names: str = "127.0.1.1 host{}") -> list[str]:
    """Type a block on both hosts, each with a folder, a name and an /etc/hosts of its own; what they print."""
    running = []
    for host, command in zip(hosts, typed(code), strict=True):
        place = folder / f"host{host.index}"
        place.mkdir(exist_ok=True)
        (place / "train.py").write_text(SCRIPT)
        (place / "hosts").write_text(f"127.0.0.1 localhost\n{names.format(host.index)}\n")
        shell = f"hostname host{host.index} && mount --bind hosts /etc/hosts && {VARIABLES}\n{command}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        inside = ["ip", "netns", "exec", host.namespace, "unshare", "--uts", "--mount", "bash", "-e", "-c", shell]
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                inside, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        said = [process.communicate(timeout=280)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return said


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # beside other tests; alone each takes half a minute at most
    pytest.mark.skipif(bool(lab.missing()), reason=lab.missing()),
]


def test_the_static_way_trains(hosts: list[lab.Host], tmp_path: Path) -> None:
    first, second = together(hosts, block("--node-rank", " train.py"), tmp_path)
    assert "commpress int4: rank 0 of 2, 100 steps" in first
    assert "loss" not in second


def test_the_rendezvous_trains_where_names_are_right(hosts: list[lab.Host], tmp_path: Path) -> None:
    code = next(code for code in BASH if "--rdzv-id" in code and "is_host" not in code)
    out = "".join(together(hosts, code, tmp_path, names="10.90.0.1 host0\n10.90.0.2 host1"))
    assert "commpress int4: rank 0 of 2, 100 steps" in out


def test_the_rendezvous_trains_where_names_are_wrong(hosts: list[lab.Host], tmp_path: Path) -> None:
    out = "".join(together(hosts, block("is_host"), tmp_path))
    assert "commpress int4: rank 0 of 2, 100 steps" in out


def test_the_probe_measures_the_link(hosts: list[lab.Host], tmp_path: Path) -> None:
    code = block("commpress.launch.probe").replace("--params 124m", "--params 124m --seconds 5")
    first, _ = together(hosts, code, tmp_path)
    found = re.search(r"Between hosts: ([\d.]+) Mbit/s", first)
    assert found is not None, first
    assert 700 < float(found[1]) < 1100


def test_the_training_program_needs_no_shared_folder(hosts: list[lab.Host], tmp_path: Path) -> None:
    code = block("commpress.launch.train").replace("--steps 1000", f"{SMALL} --steps 4").replace("every 200", "every 2")
    first, _ = together(hosts, code, tmp_path)
    assert "is a folder of its own on each host" in first
    more, _ = together(hosts, code.replace("--steps 4", "--steps 6 --resume"), tmp_path)
    assert "after 6 steps" in more
