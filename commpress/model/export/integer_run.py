"""Run a program of `integer.py` by integers alone. NumPy is all that this file needs: copy it, or read it and write it in C.

    program = load("integer.safetensors")
    outputs = program.run(program.rounded(x))      # int8 codes in, int32 out: no float in between
    values = outputs * program.output_scale

A layer is (Jacob et al., arXiv:1712.05877, with one rounding in the place of gemmlowp's two), sums in int32, products in int64:

    sum = bias + weight @ codes,    code = clamp(zero + ((sum * multiplier + 2^(shift - 1)) >> shift), low, high)

A bias has the zero point of its inputs in it. All arrays between inputs and outputs are of integers, or `run` raises TypeError.
"""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "integer-1"
CHECKSUM = re.compile(rb'\\"checksum\\": \\"([0-9a-f]{8})\\"')
"""The CRC-32 of the file with eight zeros in its place."""
DTYPES = {"I8": np.int8, "I32": np.int32}
"""The dtypes of a file's tensors."""
LIMITS = {"int8": (-128, 127), "int32": (-(2**31), 2**31 - 1)}
KEYS = {
    "linear": {"weight", "bias", "multiplier", "shift", "zero", "dtype"},
    "conv2d": {
        "weight",
        "bias",
        "multiplier",
        "shift",
        "zero",
        "dtype",
        "pad",
        "stride",
        "padding",
        "dilation",
        "groups",
    },
    "clamp": {"low", "high"},
    "reshape": {"shape"},
    "max_pool2d": {"kernel", "stride", "padding", "dilation"},
}
"""What a step says beside "op"."""


@dataclass(frozen=True)
class Program:
    """Steps, each of which takes what the one before it gives, and their integers."""

    steps: list[dict[str, Any]]
    tensors: dict[str, Any]
    input_scale: float
    """The scale of the inputs: x ~ scale (code - zero)."""
    input_zero: int
    output_scale: float
    """The number that an output of 1 stands for."""

    def rounded(self, x: Any) -> Any:
        """The int8 codes of floats, which a sensor of integers need not make."""
        codes = np.rint(np.asarray(x, np.float32) / np.float32(self.input_scale)) + self.input_zero
        return np.clip(codes, -128, 127).astype(np.int8)

    def run(self, codes: Any) -> Any:
        """int8 codes [rows, ...] to int32 outputs [rows, ...]. Raises TypeError for other inputs."""
        if getattr(codes, "dtype", None) != np.int8:
            raise TypeError(
                f"run: expected int8 codes, got {getattr(codes, 'dtype', type(codes).__name__)}; `rounded` makes them"
            )
        for step in self.steps:
            codes = _integers(OPERATORS[step["op"]](codes, step, self.tensors))
        return codes


def load(path: str | Path) -> Program:
    """Read a program. Raises ValueError that names the file if it is damaged or none of ours, OSError if it cannot be read."""
    path = Path(path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    told = CHECKSUM.search(header)
    if len(data) < 8 + size or told is None:
        raise ValueError(f"{path}: not a program of integers, or damaged: cut short, or no checksum in its header")
    place = 8 + told.start(1)
    found = zlib.crc32(data[place + 8 :], zlib.crc32(b"0" * 8, zlib.crc32(data[:place])))
    if found != int(told[1], 16):
        raise ValueError(f"{path}: damaged, its checksum is {found:08x}, expected {told[1].decode()}")
    try:
        table = json.loads(header)
        program = json.loads(table.pop("__metadata__")["commpress"])
        if program["version"] != VERSION:
            raise ValueError(f"format version {program['version']}, expected {VERSION}")
        tensors = {name: _tensor(data[8 + size :], how) for name, how in table.items()}
        ends = (float(program["input_scale"]), int(program["input_zero"]), float(program["output_scale"]))
        for step in program["steps"]:
            _require_step(step, tensors)
        return Program(program["steps"], tensors, *ends)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a program of integers: {type(error).__name__}: {error}") from error


def _tensor(data: bytes, how: Mapping[str, Any]) -> Any:
    start, end = how["data_offsets"]
    return np.frombuffer(data[start:end], np.dtype(DTYPES[how["dtype"]]).newbyteorder("<")).reshape(how["shape"])


def _require_step(step: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError for a step that no export wrote."""
    if step.get("op") not in KEYS or (wrong := step.keys() ^ (KEYS[step["op"]] | {"op"})):
        what = sorted(wrong) if step.get("op") in KEYS else f"an operator {step.get('op')!r}"
        raise ValueError(f"a step with {what}: expected one of {', '.join(KEYS)}, with its own keys")
    if "weight" in step:
        weight = tensors[step["weight"]]
        rest = [tensors[step[name]] for name in ("bias", "multiplier", "shift")]
        if weight.dtype != np.int8 or any(x.dtype != np.int32 or x.shape != weight.shape[:1] for x in rest):
            raise ValueError(f"{step['weight']!r}: expected int8 rows, and an int32 bias, multiplier and shift a row")
        if step["dtype"] not in LIMITS or not bool(((rest[2] > 0) & (rest[2] < 63) & (rest[1] >= 0)).all()):
            raise ValueError(f"{step['weight']!r}: expected outputs of {', '.join(LIMITS)}, shifts of 1 to 62")


def _integers(x: Any) -> Any:
    if x.dtype.kind != "i":
        raise TypeError(f"run: a step gave {x.dtype}, expected integers")
    return x


def _linear(codes: Any, step: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    sums = codes.astype(np.int32) @ tensors[step["weight"]].astype(np.int32).T
    return _scaled(sums, step, tensors, sums.ndim - 1)


def _conv2d(codes: Any, step: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    weight = tensors[step["weight"]].astype(np.int32)
    patches = _patches(codes.astype(np.int32), weight.shape[2:], step, step["pad"])
    # [rows, groups, inputs, kernel, height, width] with [groups, outputs, inputs, kernel]
    groups, (rows, _, kernel, *size) = step["groups"], patches.shape
    patches = patches.reshape(rows, groups, -1, kernel, *size)
    weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], kernel)
    sums = np.einsum("rgikhw,goik->rgohw", patches, weight).reshape(rows, -1, *size)
    return _scaled(_integers(sums), step, tensors, 1)


def _max_pool2d(codes: Any, step: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    return _patches(codes, step["kernel"], step, np.iinfo(codes.dtype).min).max(axis=2)


def _patches(x: Any, kernel: Any, step: Mapping[str, Any], pad: int) -> Any:
    """[rows, channels, height, width] as [rows, channels, kernel, outputs' height, outputs' width]."""
    (up, left), (down, right), (far, wide) = step["padding"], step["stride"], step["dilation"]
    x = np.pad(x, ((0, 0), (0, 0), (up, up), (left, left)), constant_values=pad)
    high = (x.shape[2] - far * (kernel[0] - 1) - 1) // down + 1
    broad = (x.shape[3] - wide * (kernel[1] - 1) - 1) // right + 1
    corners = [(i * far, j * wide) for i in range(kernel[0]) for j in range(kernel[1])]
    ends = (down * (high - 1) + 1, right * (broad - 1) + 1)
    return np.stack([x[:, :, i : i + ends[0] : down, j : j + ends[1] : right] for i, j in corners], axis=2)


def _scaled(sums: Any, step: Mapping[str, Any], tensors: Mapping[str, Any], axis: int) -> Any:
    """Codes of what comes next, of int32 sums whose rows are along `axis`."""
    along = [-1 if i == axis else 1 for i in range(sums.ndim)]
    bias, multiplier, shift = (tensors[step[name]].reshape(along) for name in ("bias", "multiplier", "shift"))
    wide = _integers(sums + bias).astype(np.int64) * multiplier
    shift = shift.astype(np.int64)
    codes = step["zero"] + ((wide + (np.int64(1) << (shift - 1))) >> shift)
    return np.clip(_integers(codes), *LIMITS[step["dtype"]]).astype(step["dtype"])


def _clamp(codes: Any, step: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    return np.clip(codes, step["low"], step["high"]).astype(codes.dtype)


def _reshape(codes: Any, step: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    return codes.reshape(codes.shape[0], *step["shape"])


OPERATORS = {
    "linear": _linear,
    "conv2d": _conv2d,
    "clamp": _clamp,
    "reshape": _reshape,
    "max_pool2d": _max_pool2d,
}
