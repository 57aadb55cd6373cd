"""A model as one small file (as Han et al., arXiv:1510.00149, without their Huffman codes): integers, and no pruned weights.

A safetensors file, so any program can read it. Of a tensor `name` of the state dict with n weights, k of them left:

    "name"          not quantised: the tensor, or its k weights in a row
                    quantised, weight = code * scale: n or k codes, int8 at 8 bits; at 4 bits uint8 [half as many, rounded
                    up], the first code in the low half of a byte, two's complement
    "name:scale"    if quantised: [rows, groups]
    "name:mask"     if only the k are there: uint8 [n / 8, rounded up], a bit a weight in row-major order, the lowest first

The header's metadata, one key, so that equal models give equal files: {"commpress": JSON of {"version": 2, "checksum": 8 hex
digits, "layout": {name: {"shape", "dtype" or "bits", "masked"}}, "shared": {name: the name under which its tensor is}}}.
"ranges", if there are any, has [low, high] of the inputs of each module that rounds them by a learned range (`ranges.py`).
Where a layout has "transposed": true, the weight is [width, rows] (a Conv1D's), and shape, mask and codes are of [rows, width].
A convolution's shape is the weight's, [rows, inputs, kernel...]: a row has all but the first dimension.
The checksum is the CRC-32 of the whole file with eight zeros in its place.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from commpress.files import DamagedFileError, checksum, replacing
from commpress.model.codes import INTEGERS, Codes, halves, joined
from commpress.model.held import whole
from commpress.model.masks import from_bits, to_bits
from commpress.model.quantization import codes_of, quantized_weights
from commpress.model.ranges import InputQuantizer

VERSION = 2
CHECKSUM = re.compile(rb'\\"checksum\\": \\"([0-9a-f]{8})\\"')
"""Where a file's checksum is, in JSON that is text within JSON."""
UNKNOWN = "0" * 8
SCALES = (torch.float32, torch.float16, torch.bfloat16)
MOST_HEADER = 100_000_000
"""Bytes; safetensors reads no longer one."""


@dataclass(frozen=True)
class Stored:
    """The content of a file, unpacked, on the CPU; by the names of the state dict."""

    tensors: dict[str, Tensor]
    """Tensors that are not quantised."""
    integers: dict[str, Codes]
    """Weights that are quantised."""
    masks: dict[str, Tensor]
    """bool, of the weights' shapes: where this is, only the weights that are left are in the file."""
    shared: dict[str, str]
    """Further names of tensors that have several."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Low and high of the inputs of a module, by its name, where they are rounded by a learned range."""

    def state_dict(self) -> dict[str, Tensor]:
        """For a plain model, with all names: what was quantised as float32, the rest in its own dtype.

        It computes bit for bit what the fake-quantised model does, but for inputs that are int8: those it does not round.
        """
        state = self.tensors | {name: codes.dequantized() for name, codes in self.integers.items()}
        return state | {name: state[first] for name, first in self.shared.items()}

    def write(self, path: str | Path) -> None:
        """Write the file; whoever reads `path` meanwhile sees the old one or the new one.

        Raises ImportError without safetensors, ValueError for a name such as `a:mask` beside a masked `a`.
        """
        packed: dict[str, Tensor] = {}
        layout: dict[str, dict[str, Any]] = {}
        for name, x in (self.tensors | {name: codes.values for name, codes in self.integers.items()}).items():
            parts = {}
            codes = self.integers.get(name)
            shape = list(x.shape) if codes is None else [x.shape[0], *(codes.row or x.shape[1:])]
            layout[name] = {"shape": shape, "masked": name in self.masks}
            if name in self.masks:
                mask = self.masks[name] if codes is None else codes.as_rows(self.masks[name]).contiguous()
                parts[f"{name}:mask"] = to_bits(mask)
                x = x[mask]
            if codes is not None:
                layout[name] |= {"bits": codes.bits, **({"transposed": True} if codes.transposed else {})}
                parts[f"{name}:scale"] = codes.scale
                x = halves(x.reshape(-1)) if codes.bits == 4 else x if name in self.masks else x.reshape(shape)
            else:
                layout[name]["dtype"] = _name(x.dtype)
            parts[name] = x.contiguous()
            if twice := parts.keys() & packed.keys():
                raise ValueError(f"store: {min(twice)!r} would be two tensors of the file: rename it in the model")
            packed.update(parts)
        header: dict[str, Any] = {"layout": layout, "shared": self.shared}
        header |= {"ranges": self.ranges} if self.ranges else {}
        write_summed(Path(path), packed, VERSION, header)


def write_summed(path: Path, tensors: dict[str, Tensor], version: int | str, header: Mapping[str, Any]) -> None:
    """Write a safetensors file whole or not at all, with a header that has its checksum as this module's docstring says."""
    told = {"version": version, "checksum": UNKNOWN, **header}
    with replacing(path) as beside:
        _safetensors().torch.save_file(tensors, beside, {"commpress": json.dumps(told)})
        place, _, crc = _summed(beside)
        with beside.open("r+b") as file:
            file.seek(place)
            file.write(f"{crc:08x}".encode())


def encode(model: nn.Module, *, masks: Mapping[str, Tensor] | None = None) -> Stored:
    """Return what `save` writes of a model. Collective if parameters are sharded; then one rank writes.

    Codes are those of a converted model, or those that a prepared one computes with, switched on or not. The rest of
    `model.state_dict()`, such as biases, norms and buffers, stays as it is. `masks` are by name, as `Masks.of`; one that
    saves less than its own bits is left out.

    Raises KeyError for a mask of no parameter, ValueError for a mask of another shape or one that prunes a weight that is
    not 0, for weights to quantise that are not finite, and for anything in the state dict that is no tensor.
    """
    state = model.state_dict(keep_vars=True)
    ranges = {name: m.range for name, m in model.named_modules() if isinstance(m, InputQuantizer)}
    state = {name: x for name, x in state.items() if name.removesuffix(".range") not in ranges}
    # only now: state_dict put shards into the places of gathered parameters
    quantized = {id(w): (module, its) for _, module, its, w in quantized_weights(model)}
    stored, first = Stored({}, {}, {}, {}), dict[int, str]()
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"store: {name!r} of the state dict is a {type(x).__name__}, expected a tensor")
        if first.setdefault(id(x), name) != name:
            stored.shared[name] = first[id(x)]
            continue
        codes = codes_of(*quantized[id(x)]) if id(x) in quantized else None
        if codes is None:
            stored.tensors[name] = whole(x).cpu().clone(memory_format=torch.contiguous_format)
        elif codes.scale.isfinite().all():
            stored.integers[name] = replace(codes, values=codes.values.cpu(), scale=codes.scale.cpu())
        else:
            raise ValueError(f"store: {name!r} has weights that are not finite, and is to be quantised")
    stored.ranges.update({n.rpartition(".")[0]: tuple(r.tolist()) for n, r in ranges.items() if bool(r.any())})
    for name, mask in (masks or {}).items():
        if name not in state:
            raise KeyError(f"mask of {name!r}: no such parameter, known: {', '.join(state)}")
        _keep_mask(stored, stored.shared.get(name, name), mask.cpu())
    return stored


def save(path: str | Path, model: nn.Module, *, masks: Mapping[str, Tensor] | None = None) -> None:
    """Store a model whose parameters are whole on this rank. Raises as `encode` does, and ImportError without safetensors.

    At 8 bits a row of weights takes 4 bytes more than it has weights, at 4 bits a group half a byte a weight and 2 bytes:
    with groups of 32 that is 4.5 bits a weight. A mask takes 1 bit a weight and saves the pruned ones.
    """
    encode(model, masks=masks).write(path)


def load(path: str | Path) -> Stored:
    """Read what `save` wrote.

    Raises `commpress.files.DamagedFileError`, a ValueError that names the file, if it is damaged, is none of ours, has another
    format version, or lacks a tensor or has one with another shape or dtype than its header says; OSError if it cannot be
    read; ImportError without safetensors.
    """
    path, library = Path(path), _safetensors()
    _, expected, found = _summed(path)
    if found != expected:
        raise DamagedFileError(f"{path}: damaged, its checksum is {found:08x}, expected {expected:08x}")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a safetensors file, or damaged: {error}") from error
    try:
        return _unpacked(packed, metadata)
    except (ValueError, RuntimeError) as error:  # torch's own is of shapes and dtypes that it cannot do
        raise DamagedFileError(f"{path}: {error}") from error


def _summed(path: Path) -> tuple[int, int, int]:
    """Where a file's checksum is, what it says and what it should say. Raises DamagedFileError if there is none."""
    with path.open("rb") as file:
        whole, size = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= min(whole - 8, MOST_HEADER) else b""
        if not header.startswith(b"{"):
            raise DamagedFileError(f"{path}: not a safetensors file, or damaged: cut short, or no header at its start")
        if b'"commpress"' not in header:
            raise DamagedFileError(f"{path}: a safetensors file, but not written by commpress, or damaged")
        if (told := CHECKSUM.search(header)) is None:
            raise DamagedFileError(
                f"{path}: no checksum in its header: damaged, or written before files had one; store the model again"
            )
        place = 8 + told.start(1)
        file.seek(0)
        crc = checksum(file, place)
        file.seek(len(UNKNOWN), 1)
        crc = checksum(file, 8 + size - place - len(UNKNOWN), zlib.crc32(UNKNOWN.encode(), crc))
        return place, int(told[1], 16), checksum(file, whole - 8 - size, crc)


def _keep_mask(stored: Stored, name: str, mask: Tensor) -> None:
    codes = stored.integers.get(name)
    x = stored.tensors[name] if codes is None else codes.as_weight(codes.values)
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(
            f"mask of {name!r}: expected bool {tuple(x.shape)}, got {_name(mask.dtype)} {tuple(mask.shape)}"
        )
    if wrong := int(x[~mask].count_nonzero()):
        raise ValueError(f"mask of {name!r}: {wrong} weights that it prunes are not 0")
    bits = 8 * x.element_size() if codes is None else codes.bits
    if int((~mask).sum()) * bits > mask.numel():
        stored.masks[name] = mask


def _unpacked(packed: dict[str, Tensor], metadata: Mapping[str, str]) -> Stored:
    """Return what the tensors of a file say by its metadata; `packed` is emptied. Raises ValueError if they do not fit."""
    try:
        header = json.loads(metadata.get("commpress", ""))
    except (ValueError, RecursionError):
        raise ValueError("its metadata is not JSON") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise ValueError(
            f"format version {header.get('version') if isinstance(header, dict) else None}, expected {VERSION}"
        )
    layout, shared = header.get("layout"), header.get("shared")
    if not isinstance(layout, dict) or not all(isinstance(how, dict) for how in layout.values()):
        raise ValueError("its header has no layout, expected a table by tensor")
    if not isinstance(shared, dict) or not all(isinstance(first, str) for first in shared.values()):
        raise ValueError("its header has no table of shared tensors, expected a name by name")
    if wrong := [name for name, first in shared.items() if first not in layout or name in layout]:
        raise ValueError(
            f"{wrong[0]!r} is shared with {shared[wrong[0]]!r}: expected a tensor of the file, and no other"
        )
    stored = Stored({}, {}, {}, shared, _ranges(header.get("ranges", {})))
    for name, how in layout.items():
        _unpack(packed, name, how, stored)
    if packed:
        raise ValueError(f"tensors that its header does not explain: {', '.join(sorted(packed))}")
    return stored


def _ranges(told: object) -> dict[str, tuple[float, float]]:
    """The ranges that a header tells. Raises ValueError for what no `save` wrote."""
    if not isinstance(told, dict):
        raise ValueError("its header has no ranges by module, expected [low, high] by name")
    for name, pair in told.items():
        two = isinstance(pair, list) and len(pair) == 2 and all(isinstance(end, float) for end in pair)
        if not (two and -math.inf < pair[0] <= 0 <= pair[1] < math.inf):
            raise ValueError(f"the range of {name!r}: expected [low, high] around 0, got {pair!r:.80}")
    return {name: (pair[0], pair[1]) for name, pair in told.items()}


def _unpack(packed: dict[str, Tensor], name: str, how: Mapping[str, Any], stored: Stored) -> None:
    """Move a tensor's parts from `packed` into `stored`. Raises ValueError if they are not what `how` says."""
    shape, bits, dtype = _told(name, how)
    mask = None
    if how["masked"]:
        # no larger than eight times what is in the file, whatever the shape says
        mask = from_bits(_take(packed, f"{name}:mask", torch.uint8, [-(-math.prod(shape) // 8)]), shape)
        stored.masks[name] = mask
    left = math.prod(shape) if mask is None else int(mask.sum())
    if bits == 4:
        x = joined(_take(packed, name, torch.uint8, [-(-left // 2)]), left)
        x = x.view(shape) if mask is None else x
    else:
        x = _take(packed, name, dtype, shape if mask is None else [left])
    if mask is not None:
        x = torch.zeros(shape, dtype=x.dtype, device=x.device).masked_scatter_(mask, x)
    if bits is None:
        stored.tensors[name] = x
        return
    scale = _take(packed, f"{name}:scale", None, None)
    groups, width = scale.shape[1] if scale.dim() == 2 else 0, math.prod(shape[1:])
    if scale.shape[:1] != x.shape[:1] or (width % groups if groups else width):
        raise ValueError(
            f"{name}:scale: expected groups that divide the rows of {tuple(shape)}, got {tuple(scale.shape)}"
        )
    if scale.dtype not in SCALES or not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError(
            f"{name}:scale: expected float32, float16 or bfloat16, finite and not below 0, got {_name(scale.dtype)}"
        )
    row = tuple(shape[1:]) if len(shape) > 2 else ()
    stored.integers[name] = codes = Codes(x.flatten(1), scale, bits, how.get("transposed", False), row)
    if mask is not None:
        stored.masks[name] = codes.as_weight(mask.flatten(1)).contiguous()


def _told(name: str, how: Mapping[str, Any]) -> tuple[list[int], int | None, torch.dtype]:
    """Shape, bits and the dtype that the values have in memory. Raises ValueError for what no `save` wrote."""
    shape, bits, dtype = how.get("shape"), how.get("bits"), how.get("dtype")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise ValueError(f"{name!r}: expected a shape, got {shape!r:.80}")
    if not isinstance(how.get("masked"), bool):
        raise ValueError(f"{name!r}: expected masked true or false, got {how.get('masked')!r:.80}")
    if not isinstance(how.get("transposed", False), bool):
        raise ValueError(f"{name!r}: expected transposed true or false, got {how.get('transposed')!r:.80}")
    if bits is None:
        of_torch = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(of_torch, torch.dtype):
            raise ValueError(f"{name!r}: expected bits or a dtype, got {dtype!r:.80}")
        return shape, None, of_torch
    flat = 2 if how.get("transposed") else 5
    if type(bits) is not int or bits not in INTEGERS or not 2 <= len(shape) <= flat:
        raise ValueError(f"{name!r}: expected rows of 4 or 8 bits, got {len(shape)} dimensions of {bits!r:.80}")
    return shape, bits, torch.int8


def _take(packed: dict[str, Tensor], key: str, dtype: torch.dtype | None, shape: list[int] | None) -> Tensor:
    if key not in packed:
        raise ValueError(f"the tensor {key!r} is missing")
    x = packed.pop(key)
    if (dtype is not None and x.dtype != dtype) or (shape is not None and list(x.shape) != shape):
        raise ValueError(f"{key!r}: expected {_name(dtype)} {shape}, got {_name(x.dtype)} {list(x.shape)}")
    return x


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("stored models need safetensors: pip install 'commpress[model]'") from error
    return safetensors
