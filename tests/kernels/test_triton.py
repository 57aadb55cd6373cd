"""The kernels for CUDA, without a GPU: the bytes that they give, and the machine code that is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import slow
from triton_accesses import too_narrow, unused
from unseen import SeenError, nothing_is_asked

HERE = Path(__file__).parent
CODE = HERE / "triton_code.py"
SHARED = 48 * 1024
"""Bytes of shared memory that every GPU gives a program without being asked."""
SPECS = "bf16 fp16 fp8 fp8(e5m2) int8 int8(stochastic) int4 int4(stochastic) int2 sign"
OUTER_SPECS = (
    "randomk(0.3)|fp16 randomk(0.1) randomk(0.02)|int4 randomk(0.001)|int4 randomk(0.0001) rotate|int4 rotate|sign"
)
"""Those whose values are coded in turn; the ratios are such that strata are long and short."""
RUNS = {
    # a name: checks, specs, how many values each input of `topk` has, and the tier
    "few": ("interpreted.py", "int4 topk(0.1)|int4", "300", "not slow"),
    "all": ("interpreted.py", SPECS, "", "slow or not slow"),
    "outer": ("interpreted.py", OUTER_SPECS, "", "slow or not slow"),
    "topk": ("interpreted.py", "topk(0.1)", "1 7 300 5000", "slow or not slow"),
    "topk in blocks": ("interpreted.py", "topk(0.05)|sign", "300 5000", "slow or not slow"),
    "topk of all": ("interpreted.py", "topk(1)", "300 2200", "slow or not slow"),
    "topk of some": ("interpreted.py", "topk(0.001)|fp16 topk(0.3)|int8", "257 4099", "slow or not slow"),
    "topk of two": ("interpreted.py", "topk(0.00003)", "70001", "not slow"),
    "passes": ("interpreted_passes.py", "", "", "slow or not slow"),
    "low rank": ("interpreted_low_rank.py", "", "", "slow or not slow"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", ["90", "80", "100"])  # the longest first
def test_machine_code_spills_nothing_fuses_nothing_and_moves_16_bytes_at_once(capability: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(CODE), capability],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    of_codecs, passes = 9 * 6 + 17 + 9 + 41, 17  # of randomk 17, rotate 9, topk 41
    of_factors = 3 * (2 + 1 + 2 * 2) + 1  # for each width; an expansion looks at its factors first
    of_types = 7 * 5 + 3 * 5 + 2 + 7 + 32 if capability == "90" else 0
    assert len(rows) == of_codecs + passes + of_factors + of_types
    for row in rows:
        assert row["stack"] == row["spilled"] == 0, row
        assert row["fused"] == 0, row
        assert row["shared"] <= SHARED, row
        assert (row["wide"] > 0) == any("16" in sizes for sizes in row["accesses"].values()), row
    assert too_narrow(rows) == []
    if capability == "90":  # with the ops on all dtypes
        assert unused(rows) == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # the interpreter, and LLVM below, beside three other workers
@pytest.mark.parametrize(("checks", "specs", "lengths", "tier"), RUNS.values(), ids=list(RUNS))
def test_kernels_on_the_interpreter_give_the_bytes_of_the_definition(
    checks: str, specs: str, lengths: str, tier: str
) -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip(f"the interpreter of Triton {triton.__version__} cannot run these kernels, that of 3.9 can")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--durations=4",
            "-m",
            tier,
            str(HERE / checks),
        ],
        env={**environment, "TRITON_INTERPRET": "1", "SPECS": specs, "LENGTHS": lengths},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


MORE = {
    # bytes a value that these ops move at most: more than the least, at which all others are
    "randomk(0.1) encode": 4.41,
    "randomk(0.001)|int4 encode": 4.02,
    "rotate|int4 encode": 12.8,
    "rotate|int4 feedback": 37.6,
    "rotate|int4 momentum": 53.6,
    "rotate|int4 mean of 4": 14.4,
    "rotate|int4 recode 4": 18.9,
    "topk(0.01) encode": 8.9,
    "topk(0.01) feedback": 21.2,
    "topk(0.01) momentum": 37.3,
    "topk(0.01) mean of 4": 4.6,
}
FACTORS = ("project", "expand")
"""Whose least is that of the matrix alone, without its factors."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_move_no_more_bytes_than_they_must() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "triton_bytes.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8 * 5 + 3 * 4 + 11 + 4 + 5
    for row in rows:
        limit = MORE.get(row["op"], row["least"] * (1.1 if row["op"].startswith(FACTORS) else 1.01))
        assert row["least"] <= row["memory"] <= limit, row


@pytest.mark.parametrize(("n", "count"), [(1, 1), (16 * 1024, 16), (5000, 2), (70001, 3)])
def test_no_kernel_is_compiled_again_for_another_number_of_values_or_of_payloads(n: int, count: int) -> None:
    pytest.importorskip("triton")
    import triton_code

    known, found = triton_code.keys(1 << 20, 4), triton_code.keys(n, count)
    assert known
    assert all(known.values())
    assert {op: set(keys) - set(known[op]) for op, keys in found.items() if set(keys) - set(known[op])} == {}


def test_no_kernel_of_a_code_of_blocks_is_compiled_again_for_a_payload_behind_another() -> None:
    pytest.importorskip("triton")
    import triton_code

    known, found = (triton_code.keys(1 << 20, start=start) for start in (0, 4))
    blocks = [op for op in known if op.startswith(("int", "fp8", "sign", "rotate"))]
    assert len(blocks) > 40
    assert [op for op in blocks if found[op] != known[op]] == []


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16, slow(torch.float16)])
def test_a_warm_up_compiles_what_any_part_of_a_gradient_needs(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    import triton_code

    for spec in triton_code.FAMILIES:
        warm, needed = triton_code.warm_keys(spec, dtype), triton_code.parts_keys(spec, dtype)
        assert len(needed) > 2
        assert needed - warm == set(), spec


def test_warm_ups_compile_the_passes_for_gradients_and_parameters_that_begin_anywhere() -> None:
    pytest.importorskip("triton")
    import triton_code

    warm, needed = triton_code.warm_passes_keys(), triton_code.placed_passes_keys()
    assert len(needed) > 50
    assert needed - warm == set()


def test_no_kernel_takes_an_integer_for_which_it_would_be_compiled_again() -> None:
    pytest.importorskip("triton")
    import triton_code

    taken: dict[str, bool] = {}

    def note(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        for parameter, argument in zip(kernel.params, arguments, strict=False):
            if isinstance(argument, int):
                taken[f"{kernel.fn.__module__}.{kernel.fn.__name__}: {parameter.name}"] = parameter.do_not_specialize

    with triton_code.instead_of_launching(90, note):
        for _, run in triton_code.ops(5000):
            run()
    assert len(taken) > 50
    assert [name for name, free in taken.items() if not free] == []


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique2"}
"""What torch runs where the host must know a value or a number of values."""


def test_what_starts_the_kernels_asks_for_no_value_of_a_tensor() -> None:
    pytest.importorskip("triton")
    import triton_code
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ran(TorchDispatchMode):
        """The names of what torch runs."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(function._schema.name)
            return function(*args, **(kwargs or {}))

    waiting: dict[str, set[str]] = {}
    with triton_code.as_on_cuda(lambda *_, **__: None):
        for op, run in triton_code.ops(5000):
            names: set[str] = set()
            with Ran(), nothing_is_asked():  # what torch runs of `tolist` or `numpy` on a CPU shows in no name
                run()
            waiting[op] = names & WAITS
    with pytest.raises(SeenError), nothing_is_asked():
        torch.ones(2).tolist()
    with Ran():
        torch.ones(2).nonzero()[0].item()
    assert names >= {"aten::nonzero", "aten::_local_scalar_dense"}
    assert {op: found for op, found in waiting.items() if found} == {}
