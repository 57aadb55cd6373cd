"""Ranks of `ranks.run` as those of a lab: each moves into the network of a host, and joins the others over its link."""

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from commpress.launch import lab

NEW_NETWORK, NEW_MOUNTS = 0x40000000, 0x00020000
"""CLONE_NEWNET and CLONE_NEWNS."""


@contextlib.contextmanager
def on_host(link: lab.Link, hosts: Sequence[lab.Host]) -> Iterator[None]:
    """Be rank R on host R of a lab, and in no group. The process stays there: only for a `fresh` run."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    _enter(hosts[rank].namespace)
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(hosts), "LOCAL_WORLD_SIZE": 1}
    place |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": lab.PORT}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "COMMPRESS_HOST": f"host {rank}"}
    os.environ["LAB_LINK"] = json.dumps({**asdict(link), "relayed": False})
    yield
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for `ranks.run` to leave


def _enter(namespace: str) -> None:
    """Do in this process what `ip netns exec` does before it starts a program; threads that are there stay where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", namespace).open("rb") as file:
        if libc.setns(file.fileno(), NEW_NETWORK) or libc.unshare(NEW_MOUNTS):
            raise OSError(ctypes.get_errno(), f"{namespace}: cannot be entered")
    # /sys/class/net shows the network of whoever mounted it
    for command in ("mount --make-rslave /", "umount -l /sys", f"mount -t sysfs {namespace} /sys"):
        subprocess.run(command.split(), check=True)
