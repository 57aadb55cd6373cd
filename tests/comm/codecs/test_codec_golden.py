"""The wire format, guarded by stored payloads. `python tests/comm/codecs/test_codec_golden.py` adds what is missing.

Input: x[i] = ((7919 * i) mod 2003 - 1001) / 1024 * 2^((i // 64) mod 5 - 2), exact in float32.
A stored payload is never rewritten: if a test here fails, ranks of two releases could not train together.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS / "support"))

from battery import SPECS, defined_encode  # noqa: E402

from commpress.comm.codecs import parse  # noqa: E402

FILE = TESTS / "golden" / "payloads.json"
GOLDEN: dict[str, dict[str, str]] = json.loads(FILE.read_text()) if FILE.exists() else {}
LENGTHS = {
    "none": 50,
    "bf16": 75,
    "fp16": 75,
    "fp8": 300,
    "fp8(e5m2)": 300,
    "int8": 300,
    "int8(stochastic)": 300,
    "int4": 301,
    "int4(stochastic)": 301,
    "int2": 1100,
    "sign": 1100,
    "randomk(1)": 75,
    "rotate|int8": 300,
    "rotate|int4": 1100,
    "rotate|int2": 1100,
    "rotate|sign": 2100,
}
"""Enough for a whole block and a short one, of most; 1000 for the others."""


def golden_input(n: int) -> Tensor:
    i = torch.arange(n)
    return (i * 7919 % 2003 - 1001) / 1024.0 * 2.0 ** (i // 64 % 5 - 2)


def digest(decoded: Tensor) -> str:
    """SHA-256 of the decoded float32, little-endian; -0 counts as 0."""
    return hashlib.sha256((decoded + 0.0).numpy().astype("<f4").tobytes()).hexdigest()


def length(spec: str) -> int:
    return LENGTHS.get(spec, 1000)


def test_the_input_is_what_it_was() -> None:
    x = golden_input(1100)
    assert x[:3].tolist() == [-1001 / 4096, 909 / 4096, 816 / 4096]
    assert x[1099].item() == (7919 * 1099 % 2003 - 1001) / 1024 * 2.0 ** (1099 // 64 % 5 - 2)
    assert torch.equal(x.double(), golden_input(1100).double())


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_of_the_battery_has_a_stored_payload(spec: str) -> None:
    assert spec in GOLDEN, f"add it once: python {Path(__file__).relative_to(TESTS.parent)}"


@pytest.mark.parametrize("spec", sorted(GOLDEN))
def test_encodes_to_the_stored_bytes(spec: str) -> None:
    codec, n = parse(spec), length(spec)
    stored = GOLDEN[spec]["payload"]
    assert codec.encode(golden_input(n)).numpy().tobytes().hex() == stored
    assert defined_encode(codec, golden_input(n))[0].numpy().tobytes().hex() == stored


@pytest.mark.parametrize("spec", sorted(GOLDEN))
def test_stored_bytes_decode_to_the_stored_values(spec: str) -> None:
    codec, n = parse(spec), length(spec)
    payload = torch.frombuffer(bytearray.fromhex(GOLDEN[spec]["payload"]), dtype=torch.uint8)
    assert digest(codec.decode(payload, n)) == GOLDEN[spec]["decoded_sha256"]
    assert digest(codec.define_decode(payload, n)) == GOLDEN[spec]["decoded_sha256"]


def add_missing() -> None:
    for spec in SPECS:
        if spec not in GOLDEN:
            codec, n = parse(spec), length(spec)
            payload, _ = defined_encode(codec, golden_input(n))
            decoded = codec.define_decode(payload, n)
            GOLDEN[spec] = {"payload": payload.numpy().tobytes().hex(), "decoded_sha256": digest(decoded)}
            print(f"added {spec}: {payload.numel()} bytes")
    FILE.write_text(json.dumps(GOLDEN, indent=1) + "\n")


if __name__ == "__main__":
    add_missing()
