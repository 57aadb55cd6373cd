"""The output of `commpress --version` for a bug report. It needs no extra."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

import commpress
from commpress.kernels import table
from commpress.launch.run_record import cores
from commpress.processor import processor


def lines() -> list[str]:
    """Return a line for each part that a result may depend on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    said = {
        "commpress": commpress.__version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "numba": installed("numba"),
        "triton": installed("triton"),
        "kernels": ", ".join(table.devices()),
        "backends": ", ".join(backends()) or "none",
        "processor": f"{processor()}, {cores()} cores",
        "GPUs": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
    }
    return [f"{name:<10} {value}" for name, value in said.items()]


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def backends() -> list[str]:
    """Return the backends of torch.distributed that this torch has."""
    if not dist.is_available():
        return []
    there = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return [name for name, available in there.items() if available()]
