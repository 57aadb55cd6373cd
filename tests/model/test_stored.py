"""Stored models: sizes on disk, bits that come back, and the format read by hand."""

import copy
import functools
import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from commpress.files import DamagedFileError
from commpress.launch.model import GPT, Shape
from commpress.model import pruning, quantization
from commpress.model.masks import Masks
from commpress.model.quantization import Quantization
from commpress.model.stored import Stored, encode, load, save

LIBRARIES = ("torchao.quantization",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")


def mlp(width: int = 64) -> nn.Sequential:
    """Linears, and what is never quantised: biases, a norm, and buffers, one of them int64 without dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 33))
    model(torch.randn(8, width))
    return model.eval()


def prepared(settings: Quantization, model: nn.Module | None = None) -> nn.Module:
    model = model or mlp()
    quantization.prepare(model, settings)
    quantization.enable(model)
    return model


def pruned(model: nn.Module, share: float) -> Masks:
    """Masks of all matrices, applied."""
    generator = torch.Generator().manual_seed(1)
    masks = Masks(dict(model.named_parameters()))
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    masks.replace({name: torch.rand(p.shape, generator=generator) >= share for name, p in matrices.items()})
    return masks


def same_stored(one: Stored, other: Stored) -> bool:
    def tensors(of: Stored) -> dict[str, Tensor]:
        codes = {f"{name} {part}": getattr(c, part) for name, c in of.integers.items() for part in ("values", "scale")}
        return of.tensors | codes | {f"{name} mask": mask for name, mask in of.masks.items()}

    a, b = tensors(one), tensors(other)
    return (
        one.shared == other.shared
        and {n: c.bits for n, c in one.integers.items()} == {n: c.bits for n, c in other.integers.items()}
        and a.keys() == b.keys()
        and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    )


SETTINGS = [Quantization(bits, group) for bits in (8, 4) for group in (None, 32)]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("settings", [None, *SETTINGS])
def test_what_is_stored_is_what_the_model_computes_with(
    tmp_path: Path, settings: Quantization | None, share: float
) -> None:
    model, plain, x = mlp(), mlp(), torch.randn(20, 64)
    masks = pruned(model, share) if share else None
    if settings is not None:
        prepared(settings, model)
    save(tmp_path / "m", model, masks=masks.of if masks else None)
    stored = load(tmp_path / "m")
    assert same_stored(stored, encode(model, masks=masks.of if masks else None))
    assert stored.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(stored.state_dict())
    assert torch.equal(plain(x), model(x))
    assert sorted(stored.integers) == ([] if settings is None else ["0.weight", "3.weight"])
    assert stored.masks.keys() == (masks.of.keys() if masks else set())
    for name, mask in stored.masks.items():
        assert masks is not None
        assert torch.equal(mask, masks.of[name])
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_converted_model_is_stored_as_the_prepared_one(tmp_path: Path, settings: Quantization) -> None:
    model = prepared(settings)
    masks = pruned(model, 0.8).of
    save(tmp_path / "prepared", model, masks=masks)
    save(tmp_path / "converted", quantization.convert(copy.deepcopy(model)), masks=masks)
    assert (tmp_path / "prepared").read_bytes() == (tmp_path / "converted").read_bytes()


def test_what_torchao_converted_itself_is_stored_too() -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    theirs, plain, x = mlp(), mlp(), torch.randn(20, 64)
    quantize_(theirs, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    stored = encode(theirs)
    assert stored.integers["0.weight"].bits == 4
    plain.load_state_dict(stored.state_dict())
    assert torch.equal(plain(x), theirs(x))
    quantize_(plain, IntxWeightOnlyConfig(weight_dtype=torch.int4, mapping_type=MappingType.ASYMMETRIC))
    with pytest.raises(ValueError, match=r"expected symmetric int4 or int8 .* zero points"):
        encode(plain)


def test_a_gpt_with_shared_weights_and_two_kinds_of_codes(tmp_path: Path) -> None:
    def gpt() -> GPT:
        torch.manual_seed(0)
        model = GPT(Shape(layers=2, width=64, heads=4, context=32))
        model.head.weight = model.tokens.weight
        return model

    model, plain = gpt(), gpt()
    masks = pruned(model, 0.8).of
    prepared(Quantization(8, layers=("tokens", "positions", "head")), model)
    prepared(Quantization(4, 32), model)
    x = torch.randint(256, (4, 32))
    save(tmp_path / "m", model, masks=masks)
    stored = load(tmp_path / "m")
    assert stored.shared == {"head.weight": "tokens.weight"}
    assert stored.integers["tokens.weight"].bits == 8
    assert stored.integers["blocks.1.down.weight"].bits == 4
    plain.load_state_dict(stored.state_dict())
    assert torch.equal(plain(x), model(x))
    assert os.stat(tmp_path / "m").st_size < sum(p.nbytes for p in model.parameters()) / 8


def test_a_model_of_bfloat16_comes_back(tmp_path: Path) -> None:
    for bits in (8, 4):
        model, plain, x = (
            prepared(Quantization(bits), mlp().bfloat16()),
            mlp().bfloat16(),
            torch.randn(20, 64).bfloat16(),
        )
        save(tmp_path / "m", model)
        plain.load_state_dict(load(tmp_path / "m").state_dict())
        assert torch.equal(plain(x), model(x))


# Size


def times_smaller(path: Path, settings: Quantization | None, share: float = 0.0, two_of_four: bool = False) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 256))
    torch.save(model.state_dict(), path / "float32")
    masks = pruned(model, share) if share else None
    if two_of_four:
        masks = Masks(dict(model.named_parameters()))
        masks.replace({f"{i}.weight": torch.tensor([1, 0, 0, 1]).bool().repeat(m.weight.numel() // 4).view_as(m.weight)
                       for i, m in enumerate(model) if isinstance(m, nn.Linear)})  # fmt: skip
    if settings is not None:
        quantization.prepare(model, settings)
    save(path / "small", model, masks=masks.of if masks else None)
    return os.stat(path / "float32").st_size / os.stat(path / "small").st_size


@pytest.mark.parametrize(
    ("least", "settings", "how"),
    [
        (0.99, None, {}),
        (3.9, Quantization(8), {}),
        (7.0, Quantization(4, 32), {}),
        (7.4, Quantization(4, 64), {}),
        (7.8, Quantization(4), {}),
        (4.2, None, {"share": 0.8}),
        (12.0, Quantization(8), {"share": 0.8}),
        (13.5, Quantization(4, 32), {"share": 0.8}),
        (6.3, Quantization(8), {"two_of_four": True}),
        (9.0, Quantization(4, 32), {"two_of_four": True}),
    ],
)
def test_the_file_is_as_small_as_it_should_be(
    tmp_path: Path, least: float, settings: Quantization | None, how: dict[str, Any]
) -> None:
    assert times_smaller(tmp_path, settings, **how) >= least


@pytest.mark.parametrize("settings", [None, Quantization(8), Quantization(4, 32)])
def test_two_of_four_comes_back_as_it_was(tmp_path: Path, settings: Quantization | None) -> None:
    model = mlp()
    masks = Masks(dict(model.named_parameters()))
    masks.replace(pruning.n_of_m({f"{i}.weight": model[i].weight.detach().abs() for i in (0, 3)}, 2, 4))
    if settings is not None:
        prepared(settings, model)
    save(tmp_path / "m", model, masks=masks.of)
    found = load(tmp_path / "m")
    pruning.require_n_of_m(found.masks, 2, 4)
    for name, mask in masks.of.items():
        assert torch.equal(found.masks[name], mask)
        assert not found.state_dict()[name][~mask].any()
        assert found.state_dict()[name][mask].count_nonzero() > 0.4 * mask.numel()


def test_a_mask_that_saves_nothing_is_left_out() -> None:
    model = prepared(Quantization(4))
    masks = pruned(model, 0.2).of  # 0.8 codes of 4 bits and a bit are more than 4 bits
    assert not encode(model, masks=masks).masks
    assert encode(model, masks=pruned(model, 0.3).of).masks.keys() == masks.keys()


# The format


def test_the_format_is_what_the_first_lines_say(tmp_path: Path) -> None:
    model = nn.Linear(5, 2)
    model.weight.data = torch.tensor([[0.0, -7.5, 0, 2, 3], [2, 0, 0, 2.5, -3.75]])
    model = prepared(Quantization(4), nn.Sequential(model))
    mask = {"0.weight": model[0].weight != 0}
    save(tmp_path / "m", model, masks=mask)
    raw = load_file(tmp_path / "m")
    assert raw.keys() == {"0.weight", "0.weight:scale", "0.weight:mask", "0.bias"}
    assert raw["0.weight:mask"].tolist() == [0b00111010, 0b11]
    assert raw["0.weight"].tolist() == [0x28, 0x43, 0x85]  # -8 (-7.5, half to even), 2, 3, 4, 5, -8
    assert raw["0.weight:scale"].dtype == torch.bfloat16
    assert raw["0.weight:scale"].tolist() == [[1.0], [0.5]]
    assert torch.equal(raw["0.bias"], model[0].bias)
    with safe_open(tmp_path / "m", "pt") as file:
        assert file.metadata().keys() == {"commpress"}
        assert json.loads(file.metadata()["commpress"]) == {
            "version": 2,
            "checksum": f"{crc_of((tmp_path / 'm').read_bytes()):08x}",
            "layout": {
                "0.weight": {"shape": [2, 5], "bits": 4, "masked": True},
                "0.bias": {"shape": [2], "dtype": "float32", "masked": False},
            },
            "shared": {},
        }


@pytest.mark.parametrize("n", [0, 1, 2, 255])
def test_an_odd_number_of_codes_is_packed(tmp_path: Path, n: int) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16)[:n]
    scale = torch.ones(1, 1)
    values = torch.zeros(1, 600, dtype=torch.int8)
    values[0, :n] = codes
    mask = torch.arange(600).view(1, 600) < n
    stored = Stored({}, {"w": quantization.Codes(values, scale, 4)}, {"w": mask}, {})
    stored.write(tmp_path / "m")
    assert load_file(tmp_path / "m")["w"].shape == (-(-n // 2),)
    assert same_stored(load(tmp_path / "m"), stored)


# What goes wrong


def test_masks_that_do_not_fit_are_refused() -> None:
    model = prepared(Quantization(8))
    with pytest.raises(KeyError, match=r"mask of '1.wieght': no such parameter, known: 0.weight"):
        encode(model, masks={"1.wieght": torch.ones(2).bool()})
    with pytest.raises(ValueError, match=r"mask of '0.weight': expected bool \(96, 64\), got bool \(64, 96\)"):
        encode(model, masks={"0.weight": torch.ones(64, 96).bool()})
    mask = torch.ones(96, 64).bool()
    mask[0, :3] = False
    model[0].weight.data[0, :3] = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"mask of '0.weight': 2 weights that it prunes are not 0"):
        encode(model, masks={"0.weight": mask})


def test_weights_that_are_not_finite_are_refused() -> None:
    model = prepared(Quantization(8))
    model[3].weight.data[2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"'3.weight' has weights that are not finite"):
        encode(model)


CHECKSUM = re.compile(rb'(?<=checksum\\": \\")[0-9a-f]{8}')


def crc_of(whole: bytes) -> int:
    """The checksum as the first lines say: of the file with eight zeros in its place."""
    return zlib.crc32(CHECKSUM.sub(b"00000000", whole, count=1))


def sealed(whole: bytes) -> bytes:
    """A file with the checksum that it should have, as if it had been written so."""
    return CHECKSUM.sub(f"{crc_of(whole):08x}".encode(), whole, count=1)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    path.write_bytes(sealed(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(commpress='{"version": 1}'), "no checksum in its header"),
        (
            lambda t, m: m.update(commpress=m["commpress"].replace('"version": 2', '"version": 3')),
            "format version 3, exp",
        ),
        (lambda t, m: t["3.weight:scale"].fill_(float("nan")), "3.weight:scale: expected .*, finite and not below 0"),
        (lambda t, m: m.pop("commpress"), "a safetensors file, but not written by commpress"),
        (lambda t, m: t.pop("0.bias"), "the tensor '0.bias' is missing"),
        (lambda t, m: t.pop("0.weight:scale"), "the tensor '0.weight:scale' is missing"),
        (lambda t, m: t.update({"3.bias": torch.ones(32)}), r"'3.bias': expected float32 \[33\], got float32 \[32\]"),
        (lambda t, m: t.update({"3.bias": torch.ones(33).half()}), r"'3.bias': expected float32 \[33\], got float16"),
        (lambda t, m: t.update({"0.weight": t["0.weight"][1:]}), r"'0.weight': expected int8 \[\d+\], got int8"),
        (
            lambda t, m: t.update({"0.weight:mask": t["0.weight:mask"][1:]}),
            r"'0.weight:mask': expected uint8 \[768\], got uint8 \[767\]",
        ),
        (lambda t, m: t["0.weight:mask"].bitwise_not_(), r"'0.weight': expected int8 \[\d+\], got int8"),
        (
            lambda t, m: t.update({"0.weight:scale": torch.ones(96, 5)}),
            r"groups that divide .*\(96, 64\), got \(96, 5\)",
        ),
        (lambda t, m: t.update(more=torch.ones(1)), "tensors that its header does not explain: more"),
    ],
)
def test_a_file_that_is_not_as_its_header_says_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object], message: str
) -> None:
    path = tmp_path / "m"
    model = prepared(Quantization(8))
    save(path, model, masks=pruned(model, 0.8).of)
    load(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, mlp())
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"PK" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=f"{path}: .*damaged"):
            load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def small(path: Path) -> bytes:
    """A file with all that a file may have."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[1].weight.data[:, :4].clone())
    model.append(model[2])
    masks = pruned(model, 0.5).of
    for layer, settings in (("0", Quantization(4, 4, layers=("0",))), ("1", Quantization(8, layers=("1",)))):
        assert quantization.prepare(model, settings) == [layer]
    quantization.enable(model)
    save(path, model, masks=masks)
    stored = load(path)
    assert stored.integers.keys() == {"0.weight", "1.weight"}
    assert stored.masks
    assert stored.shared.keys() == {"3.weight", "3.bias"}
    return path.read_bytes()


def test_any_bit_that_flips_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    whole, draw = small(path), random.Random(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=f"^{path}: "):
            load(path)


def outcome_of_load(path: Path) -> str:
    """ "read", or what was wrong; anything but the promised error is a failure of the test."""
    try:
        loaded = load(path)
        loaded.state_dict()
    except DamagedFileError as error:
        return str(error).removeprefix(f"{path}: ")
    return "read"


WRONG: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    4,
    8,
    2**40,
    2**70,
    -(2**70),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "float32",
]
WRONG += [
    "nn",
    "Tensor",
    "quint4x2",
    "F4",
    "0.weight",
    "0.weight:mask",
    "9" * 99,
    [],
    [[]],
    [0],
    [-6],
    [2**63],
    [6, 8],
    [1] * 99,
]
WRONG += [[None], ["a"], {}, {"a": []}, {"0.bias": "1.bias"}, {"0.bias": {"shape": [6]}}]
"""What a header may have in the place of what it should have."""


def places(found: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in nested dicts and lists."""
    pairs = list(found.items()) if isinstance(found, dict) else list(enumerate(found))
    inner = [place for _, each in pairs if isinstance(each, dict | list) for place in places(each)]
    return [(found, key) for key, _ in pairs] + inner


def with_headers(whole: bytes, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """A file whose two headers, safetensors' and the one within it, were changed, and whose checksum fits."""
    size = int.from_bytes(whole[:8], "little")
    outer = json.loads(whole[8 : 8 + size])
    inner = json.loads(outer["__metadata__"]["commpress"])
    change(outer, inner)
    if isinstance(outer.get("__metadata__"), dict) and "commpress" in outer["__metadata__"]:
        outer["__metadata__"]["commpress"] = json.dumps({"checksum": "00000000", **inner})
    header = json.dumps(outer).encode()
    return len(header).to_bytes(8, "little") + header + whole[8 + size :]


def damaged(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A file with other headers, other data, or anything else, and of which kind it is."""
    kind = draw.choice(["headers", "headers", "data", "raw"])

    def change(outer: dict[str, Any], inner: dict[str, Any]) -> None:
        for _ in range(draw.randint(1, 3)):
            container, key = draw.choice(places(draw.choice([inner, outer])) or [(inner, "more")])
            if draw.random() < 0.7:
                container[key] = copy.deepcopy(draw.choice(WRONG))
            elif isinstance(container, dict):
                value = container.pop(key, None)
                container[draw.choice(["0.weight", "0.weight:mask", "bits", "dtype", "shape", "x"])] = value

    if kind == "headers":
        return kind, with_headers(whole, change)
    data = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        start = 0 if kind == "raw" else 8 + int.from_bytes(whole[:8], "little")
        data[draw.randrange(start, len(whole))] = draw.randrange(256)
    return kind, bytes(data[: draw.randrange(len(data))] if kind == "raw" and draw.random() < 0.3 else data)


def test_two_thousand_damaged_files_are_refused_with_the_one_error(tmp_path: Path) -> None:
    path = tmp_path / "m"
    whole = small(path)
    outcomes: Counter[str] = Counter()
    for number in range(2000):
        kind, content = damaged(whole, random.Random(number))
        path.write_bytes(sealed(content))  # what is behind the checksum must hold as well
        outcome = outcome_of_load(path)
        assert str(tmp_path) not in outcome.partition(":")[0], number  # it was in front, and is taken off
        outcomes[kind + " read" * (outcome == "read")] += 1
    assert outcomes["headers"] > 800
    assert outcomes["raw"] > 400
    assert outcomes["data read"] > 200  # other values, as if written so


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, i: i.update(layout=[]), "no layout"),
        (lambda o, i: i["layout"].update({"0.bias": [6]}), "no layout"),
        (lambda o, i: i.update(shared={"a": 3}), "no table of shared tensors"),
        (lambda o, i: i.update(shared={"a": "nowhere"}), "'a' is shared with 'nowhere'"),
        (lambda o, i: i.update(shared={"0.bias": "1.bias"}), "'0.bias' is shared with '1.bias'"),
        (lambda o, i: i.update(version="2"), "format version 2, expected 2"),
        (lambda o, i: i["layout"]["0.bias"].update(dtype="nn"), "expected bits or a dtype, got 'nn'"),
        (lambda o, i: i["layout"]["0.bias"].update(dtype=["float32"]), "expected bits or a dtype"),
        (lambda o, i: i["layout"]["0.bias"].update(shape=[-6]), r"expected a shape, got \[-6\]"),
        (lambda o, i: i["layout"]["0.bias"].update(shape=[True] * 6), "expected a shape"),
        (lambda o, i: i["layout"]["0.bias"].update(shape=6), "expected a shape, got 6"),
        (lambda o, i: i["layout"]["0.bias"].update(masked=1), "expected masked true or false, got 1"),
        (lambda o, i: i["layout"]["0.weight"].update(bits=2), "expected rows of 4 or 8 bits"),
        (lambda o, i: i["layout"]["0.weight"].update(bits=True), "expected rows of 4 or 8 bits"),
        (lambda o, i: i["layout"]["0.weight"].update(shape=[48]), "expected rows of 4 or 8 bits"),
        (
            lambda o, i: i["layout"]["0.weight"].update(shape=[2**39, 2**39]),
            r"'0.weight:mask': expected uint8 \[\d+\], got",
        ),
        (lambda o, i: i["layout"]["0.weight"].update(shape=[8, 6]), "groups that divide the rows"),
        (lambda o, i: o["0.bias"].update(data_offsets=[0, 10**18]), "not a safetensors file, or damaged"),
        (
            lambda o, i: o["0.bias"].update(data_offsets=o["1.bias"]["data_offsets"]),
            "not a safetensors file, or damaged",
        ),
        (lambda o, i: o["0.bias"].update(dtype="F99"), "not a safetensors file, or damaged"),
        (lambda o, i: o["__metadata__"].update(deep="[" * 100_000), "no .*|read"),
        (lambda o, i: i.update(version=functools.reduce(lambda deep, _: [deep], range(900), [])), "format version"),
    ],
)
def test_headers_made_by_hand_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "m"
    path.write_bytes(sealed(with_headers(small(path), change)))
    assert re.search(message, outcome_of_load(path))


def empty_and_endless(outer: dict[str, Any], inner: dict[str, Any]) -> None:
    end = max(how["data_offsets"][1] for key, how in outer.items() if key != "__metadata__")
    inner["layout"]["z"] = {"shape": [0, *[2**39] * 3], "dtype": "float32", "masked": True}
    for key, dtype in (("z", "F32"), ("z:mask", "U8")):
        outer[key] = {"dtype": dtype, "shape": [0], "data_offsets": [end, end]}


def test_a_shape_that_torch_cannot_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(sealed(with_headers(small(path), empty_and_endless)))
    assert "overflowed" in outcome_of_load(path)


def test_two_tensors_of_one_name_are_not_written_over_each_other(tmp_path: Path) -> None:
    stored = Stored({"a": torch.zeros(64), "a:mask": torch.ones(3)}, {}, {"a": torch.zeros(64).bool()}, {})
    with pytest.raises(ValueError, match="'a:mask' would be two tensors of the file"):
        stored.write(tmp_path / "m")


def test_a_header_nested_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    small(path)
    deep = '{"version": 2, "checksum": "00000000", "layout": ' + "[" * 50_000
    rewritten(path, lambda tensors, metadata: metadata.update(commpress=deep))
    assert "its metadata is not JSON" in outcome_of_load(path)


def test_who_reads_while_it_is_written_reads_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, mlp())
    before = path.read_bytes()
    with open(path, "rb") as reader:
        save(path, prepared(Quantization(8)))
        assert reader.read() == before
    assert path.read_bytes() != before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, mlp())
    before = path.read_bytes()
    broken = Stored({"x": torch.ones(2).to_sparse()}, {}, {}, {})
    with pytest.raises((ValueError, RuntimeError)):
        broken.write(path)
    assert path.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        save(tmp_path / "folder", mlp())
    assert sorted(os.listdir(tmp_path)) == ["folder", "m"]


# Ranks


def encoded_under_fsdp() -> tuple[Stored, Stored]:
    model, alone = mlp(), mlp()
    masks = pruned(alone, 0.8).of
    pruned(model, 0.8)
    settings = Quantization(4, 32)
    for of_it in (model, alone):
        prepared(settings, of_it)
    fully_shard(model[0])
    fully_shard(model)
    model(torch.randn(4, 64))  # leaves the root's parameters gathered
    return encode(model, masks=masks), encode(alone, masks=masks)


def test_sharded_parameters_are_stored_whole() -> None:
    for sharded, alone in run(2, encoded_under_fsdp):
        assert same_stored(sharded, alone)
