"""The processor that figures are taken on, as `lscpu` tells it: from /proc/cpuinfo and /sys/devices/system/cpu on Linux.

A name such as "AMD EPYC" is that of several generations: family and model say which one it is.
"""

import contextlib
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIMD = (
    *("avx2", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8"),
    *("amx_bf16", "asimd", "asimddp", "bf16", "sve", "sve2"),
)
"""The flags that are kept: the loops, torch and onnxruntime compute by these."""
WIDEST = {"avx512f": "AVX-512", "avx2": "AVX2", "sve2": "SVE2", "sve": "SVE", "asimd": "NEON"}
"""What a flag is called, the widest vectors first."""


@dataclass(frozen=True)
class Processor:
    """The first core of this machine. What the system does not tell is None, or missing from `simd`."""

    name: str
    family: str | None
    """On Arm the implementer, 0x41."""
    model: str | None
    """On Arm the part, 0xd4f."""
    stepping: str | None
    """On Arm the revision."""
    simd: tuple[str, ...]
    l2_kib: int | None
    """What this core has."""
    l3_kib: int | None
    """What this core shares with others."""

    def __str__(self) -> str:
        words = ("implementer", "part") if (self.family or "").startswith("0x") else ("family", "model")
        known = [f"{word} {value}" for word, value in zip(words, (self.family, self.model), strict=True) if value]
        widest = [name for flag, name in WIDEST.items() if flag in self.simd][:1]
        told = ", ".join([*([" ".join(known)] if known else []), *widest])
        return f"{self.name} ({told})" if told else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values for a record."""
        return {**asdict(self), "simd": list(self.simd)}


def processor(root: Path = Path("/")) -> Processor:
    """Return this machine's processor; `root` is the folder that has `proc` and `sys`."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux
        first = (root / "proc/cpuinfo").read_text().strip().split("\n\n")[0]
        said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = (said.get("flags") or said.get("Features") or "").split()
    return Processor(
        name=said.get("model name") or platform.processor() or platform.machine(),
        family=said.get("cpu family") or said.get("CPU implementer"),
        model=said.get("model") or said.get("CPU part"),
        stepping=said.get("stepping") or said.get("CPU revision"),
        simd=tuple(flag for flag in SIMD if flag in flags),
        l2_kib=_cache(root, 2),
        l3_kib=_cache(root, 3),
    )


def _cache(root: Path, level: int) -> int | None:
    """Return the KiB of a cache of the first core; the first level, which has two, is not asked for."""
    for place in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            size = re.fullmatch(r"(\d+)K", (place / "size").read_text().strip())
            if size and int((place / "level").read_text()) == level:
                return int(size[1])
    return None
