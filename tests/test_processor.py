"""A record says which processor it was taken on, as lscpu does, on x86 and Arm, and where the system tells nothing."""

import json
import platform
from pathlib import Path

import pytest

from commpress.processor import processor

EPYC = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: 17
model name	: AMD EPYC
stepping	: 1
flags		: fpu sse avx f16c avx2 avx512f avx512bw avx512_vnni avx512_vpopcntdq

processor	: 1
cpu family	: 26
"""
GRACE = """processor	: 0
Features	: fp asimd asimddp sve sve2 bf16
CPU implementer	: 0x41
CPU architecture: 8
CPU part	: 0xd4f
CPU revision	: 0
"""


def system(root: Path, cpuinfo: str | None, caches: dict[str, tuple[int, str]]) -> Path:
    """Folders such as Linux has."""
    if cpuinfo is not None:
        (root / "proc").mkdir()
        (root / "proc" / "cpuinfo").write_text(cpuinfo)
    for index, (level, size) in caches.items():
        place = root / "sys/devices/system/cpu/cpu0/cache" / index
        place.mkdir(parents=True)
        (place / "level").write_text(f"{level}\n")
        (place / "size").write_text(f"{size}\n")
    return root


def test_an_amd_is_told_from_another_by_family_and_model(tmp_path: Path) -> None:
    found = processor(system(tmp_path, EPYC, {"index0": (1, "32K"), "index2": (2, "1024K"), "index3": (3, "32768K")}))
    assert str(found) == "AMD EPYC (family 25 model 17, AVX-512)"
    assert (
        json.loads(json.dumps(found.to_dict()))
        == found.to_dict()
        == {
            **{"name": "AMD EPYC", "family": "25", "model": "17", "stepping": "1", "l2_kib": 1024, "l3_kib": 32768},
            "simd": ["avx2", "f16c", "avx512f", "avx512bw", "avx512_vnni"],
        }
    )


def test_an_arm_is_told_by_implementer_and_part(tmp_path: Path) -> None:
    found = processor(system(tmp_path, GRACE, {"index2": (2, "1024K"), "index3": (3, "damaged")}))
    name = platform.processor() or platform.machine()
    assert str(found) == f"{name} (implementer 0x41 part 0xd4f, SVE2)"
    assert found.simd == ("asimd", "asimddp", "bf16", "sve", "sve2")
    assert (found.l2_kib, found.l3_kib) == (1024, None)


@pytest.mark.parametrize("cpuinfo", [None, "", "nonsense"])
def test_a_system_that_tells_nothing_still_has_a_name(tmp_path: Path, cpuinfo: str | None) -> None:
    found = processor(system(tmp_path, cpuinfo, {}))
    assert str(found) == found.name == (platform.processor() or platform.machine())
    assert not any(value for key, value in found.to_dict().items() if key != "name")
