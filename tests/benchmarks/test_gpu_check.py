"""The check of a GPU, on the CPU: it finds what is wrong, names it, and says so in its table and in the report."""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import ended, run_command
from ranks import run
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import copies
import gpu_bytes
import gpu_check
import gpu_ranks
import gpu_worker
import passes

from commpress.comm.codecs import parse
from commpress.comm.exchange import Transfer, TwoShot
from commpress.kernels import table
from commpress.launch import gpu_record, report

CPU = torch.device("cpu")
Record = dict[str, Any]
SMALLEST = gpu_bytes.Inputs(lengths=(0, 257), short=(257,), named=(300,), large=1025, passes=(7,))


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["bf16", "int4", "topk(0.1)|int4", "randomk(0.1)"])
def test_a_codec_whose_kernels_are_right_is_compared_in_full(spec: str) -> None:
    codec = parse(spec)
    assert gpu_bytes.Comparison(codec, CPU).all(SMALLEST) > 100


WRONG: dict[tuple[str, str], str] = {
    (
        "encode",
        "payload",
    ): r"int4: encode, float32, n = 257, 'gradient': 1 of \d+ bytes differ, the first at 0: \d+, expected",
    ("encode", "residual"): r"int4: residual of encode with feedback, float32, n = 257, 'gradient': 1 of 257 values",
    ("mean", "out"): r"int4: decode, float32, n = 257, 'gradient': 1 of 257 values differ, the first at 0: ",
    ("recode", "payload"): r"int4: recode, float32, n = 257, 3 payloads: 1 of \d+ bytes differ",
}


@pytest.mark.parametrize(("op", "what"), WRONG)
def test_a_wrong_kernel_is_named_with_its_op_dtype_length_and_input(
    op: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = table.KERNELS[op, "int4", "cpu"]

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        place = {"residual": 2, "out": 3, "payload": -1}[what]
        if (spoilt := arguments[place]) is not None:
            spoilt[0] += 1

    monkeypatch.setitem(table.KERNELS, (op, "int4", "cpu"), dataclasses.replace(right, run=wrong))
    with pytest.raises(gpu_bytes.UnequalError, match=WRONG[op, what]):
        gpu_bytes.Comparison(parse("int4"), CPU).all(SMALLEST)


def test_a_kernel_that_is_wrong_in_one_dtype_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = table.KERNELS["encode", "sign", "cpu"]

    def wrong(codec: Any, x: Tensor, *rest: Any) -> None:
        right(codec, x if x.dtype != torch.bfloat16 else -x, *rest)

    monkeypatch.setitem(table.KERNELS, ("encode", "sign", "cpu"), dataclasses.replace(right, run=wrong))
    with pytest.raises(gpu_bytes.UnequalError, match="sign: encode, bfloat16, n = 257, 'gradient'"):
        gpu_bytes.Comparison(parse("sign"), CPU).all(SMALLEST)


def test_a_kernel_that_fails_is_named_with_its_op_dtype_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise ZeroDivisionError("no such kernel")

    job = gpu_worker.Job("bytes", ["int4"], ["cpu"], small=True, values=4096, repeat=1)
    right = table.KERNELS["recode", "int4", "cpu"]
    monkeypatch.setitem(table.KERNELS, ("recode", "int4", "cpu"), dataclasses.replace(right, run=failing))
    said = "int4: recode, float32, n = 1, 3 payloads: ZeroDivisionError: no such kernel (test_gpu_check.py, line "
    assert gpu_worker.compared("int4", job, CPU)["error"].startswith(said)
    with pytest.raises(RuntimeError, match="recode 4, float32, n = 4096: ZeroDivisionError: no such kernel"):
        gpu_worker.timed("int4", job, CPU)


UNALIGNED: dict[tuple[str, str], str] = {
    ("encode", "x"): r"int4: encode, float32, n = 300, unaligned, 'gradient': ",
    ("encode", "residual"): r"int4: encode with feedback, float32, n = 300, unaligned, 'gradient': ",
    ("encode", "payload"): r"int4: encode, float32, n = 300, unaligned, 'gradient': ",
    ("mean", "payloads"): r"int4: decode, float32, n = 300, unaligned, 'gradient': ",
    ("mean", "out"): r"int4: decode, float32, n = 300, unaligned, 'gradient': ",
    ("recode", "residual"): r"int4: recode with feedback, float32, n = 300, unaligned, 3 payloads: ",
    ("recode", "payload"): r"int4: recode, float32, n = 300, unaligned, 3 payloads: ",
}


@pytest.mark.parametrize(("op", "what"), UNALIGNED)
def test_a_kernel_that_is_wrong_where_a_tensor_is_not_aligned_is_found(
    op: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = table.KERNELS[op, "int4", "cpu"]
    places = {"encode": {"x": 1, "residual": 2, "payload": 4}, "mean": {"payloads": 1, "out": 3}}
    place = (places | {"recode": {"residual": 4, "payload": 5}})[op][what]

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        if (at := arguments[place]) is not None and at.data_ptr() % 16:
            arguments[3 if op == "mean" else -1][-8:].zero_().add_(1)

    monkeypatch.setitem(table.KERNELS, (op, "int4", "cpu"), dataclasses.replace(right, run=wrong))
    inputs = gpu_bytes.Inputs(lengths=(257,), short=(), named=(), unaligned=(300,), large=1025)
    with pytest.raises(gpu_bytes.UnequalError, match=UNALIGNED[op, what]):
        gpu_bytes.Comparison(parse("int4"), CPU).all(inputs)


@pytest.mark.parametrize("spec", ["int4", "topk(0.1)|int4"])
def test_all_ops_are_replayed_in_a_graph_and_one_that_another_run_changes_is_named(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = gpu_bytes.Comparison(parse(spec), CPU)
    comparison.in_a_graph(1025)
    assert comparison.count == 10
    noted: list[tuple[str, bool, bool]] = []
    word = parse(spec).word
    for op in ("encode", "mean", "recode", "clear"):
        if (right := table.KERNELS.get((op, word, "cpu"))) is not None:

            def note(codec: Any, *rest: Any, op: str = op, right: table.Kernel = right) -> None:
                noted.append(
                    (op, op in ("encode", "recode") and rest[-2 - (op == "encode")] is not None, rest[-2] is None)
                )
                right(codec, *rest)

            monkeypatch.setitem(table.KERNELS, (op, word, "cpu"), dataclasses.replace(right, run=note))
    comparison.in_a_graph(1025)
    assert {(op, kept) for op, kept, _ in noted} >= {("encode", False), ("encode", True), ("mean", False)}
    assert spec != "int4" or ("recode", True) in {(op, kept) for op, kept, _ in noted}
    assert spec == "int4" or "clear" in {op for op, *_ in noted}
    monkeypatch.setattr(gpu_bytes, "captured", lambda run, device: lambda: None)  # a graph that has lost all
    with pytest.raises(gpu_bytes.UnequalError, match=r"payload of encode, .* in a CUDA graph, n = 1025: \d+ of "):
        comparison.in_a_graph(1025)
    rows = {row["op"]: row["error"] for row in gpu_bytes.compare_passes(CPU, (7,))}
    graphs = [op for op, error in rows.items() if "in a CUDA graph, tensor " in error]
    assert {"pack", "unpack", "keep", "local_step", "prologue", "project", "orthonormalize"} <= set(graphs)
    assert not rows["count_pruned"]


def test_where_triton_is_missing_every_op_that_should_have_a_kernel_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    from_cpu = {key: kernel for key, kernel in table.KERNELS.items() if key[2] == "cpu"}
    monkeypatch.setattr(table, "KERNELS", from_cpu)
    monkeypatch.setattr(gpu_bytes, "KERNELS", from_cpu)
    monkeypatch.setattr(table, "_add_triton", lambda: None)
    monkeypatch.setattr(gpu_bytes.Comparison, "all", lambda self, inputs: 1)
    job = gpu_worker.Job("bytes", ["int4"], ["cuda:0"])
    errors = {
        spec: gpu_worker.compared(spec, job, cuda)["error"] for spec in ("int4", "topk(0.1)|int4", "randomk(0.1)")
    }
    assert errors["int4"] == "int4: no kernel on cuda for encode, mean, recode: plain torch has run"
    assert "for encode, mean, clear: " in errors["topk(0.1)|int4"]
    assert (
        "for encode, mean, clear: " in errors["randomk(0.1)"]
    )  # re-encoded by a mean and an encode, as docs/gpu.md says
    assert gpu_bytes.lacking(None, "cuda")[:3] == ["prologue", "pack", "unpack"]
    assert gpu_bytes.lacking("powersgd", "cuda") == ["project", "orthonormalize", "project_back", "expand"]
    assert gpu_bytes.lacking("int4", "cpu") == []


def test_with_triton_no_op_lacks_a_kernel() -> None:
    pytest.importorskip("triton")
    for word in {word for _, word, device in list(table.KERNELS) if device == "cpu"}:
        assert gpu_bytes.lacking(word, "cuda") == []


def test_passes_meet_nan_and_inf_and_one_that_loses_them_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(9))
    right = passes.Ahead.apply

    def wrong(ahead: passes.Ahead, x: Tensor) -> None:
        right(ahead, x)
        if not next(calls):
            x.nan_to_num_(0, 0, 0)

    monkeypatch.setattr(passes.Ahead, "apply", wrong)
    rows = {row["op"]: row["error"] for row in gpu_bytes.compare_passes(CPU, (1025,))}
    assert rows["momentum_ahead"].startswith(
        "momentum_ahead, float32, n = 1025, tensor 0: 2 of 1025 values differ, the first at 7"
    )
    assert [op for op, error in rows.items() if error] == ["momentum_ahead"]
    for each in passes.passes(1025, CPU)[:-4]:
        each.call()
        floats = [x for x in each.tensors if x.is_floating_point()]
        assert not floats or not all(x.isfinite().all() for x in floats), each.op


def test_passes_are_compared_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(row["error"] for row in gpu_bytes.compare_passes(CPU, (1, 1025)))
    calls = iter([lambda out: out.add_(1), lambda out: None])
    right = passes.keep_

    def wrong(x: Tensor, kept: Tensor) -> None:
        right(x, kept)
        next(calls, lambda out: None)(x)

    monkeypatch.setattr(passes, "keep_", wrong)
    rows = {row["op"]: row for row in gpu_bytes.compare_passes(CPU, (7,))}
    assert rows["keep"]["error"].startswith("keep, float32, n = 7, tensor 0: 7 of 7 values differ")
    assert not rows["pack"]["error"]


# --- rates -------------------------------------------------------------------------------------------------------


def test_events_time_each_call_by_itself_and_the_copies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Event:
        """An event of a device whose time goes on by what is enqueued."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, later: "Event") -> float:
            return later.at - self.at

    def lasting(ms: float) -> object:
        clock[0] += ms
        return None

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    calls = {"slow": lambda: lasting(30.0), "fast": lambda: lasting(5.0)}
    found, times = copies._by_events(calls, lambda: lasting(10.0), 3)
    assert found == pytest.approx([0.01] * 6)
    assert times == {"slow": pytest.approx([0.03] * 3), "fast": pytest.approx([0.005] * 3)}


def test_rates_are_shares_of_a_copy_and_say_what_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    job = gpu_worker.Job("rates", ["int4"], ["cpu"], values=4096, repeat=2)
    found = gpu_worker.timed("int4", job, CPU)
    assert set(found["shares"]) == set(gpu_record.ACTIONS) == set(found["kernels"])
    # a copy moves 8 bytes a value, encode of int4 4 and its payload
    payload = parse("int4").nbytes(4096) / 4096
    assert found["shares"]["encode"] * found["copies"]["encode"] == pytest.approx((4 + payload) / 8)
    monkeypatch.delitem(table.KERNELS, ("recode", "int4", "cpu"))
    monkeypatch.delitem(table.KERNELS, ("mean", "int4", "cpu"))
    assert gpu_worker.timed("int4", job, CPU)["kernels"] == ["encode", "feedback", "momentum"]


# --- ranks -------------------------------------------------------------------------------------------------------


SUMMED = sum(parse(spec).sum_dtype is not None for spec in gpu_ranks.SPECS)
"""Specs that go by `all_reduce` as well as by `two_shot`, `one_shot` and `hierarchical`."""


def errors(records: list[Record]) -> dict[str, str]:
    return {record["item"]: record["error"] for record in records}


def records_of(names: list[str], steps: int, size: int) -> list[Record]:
    return list(gpu_ranks.records(names, CPU, steps, (size,)))


def test_trainings_and_exchanges_run_on_two_ranks_and_agree_on_their_losses() -> None:
    names = [gpu_ranks.COLLECTIVES, "DDP, int4"]
    one, other = run(2, records_of, names, 3, 65536)
    assert [record["item"] for record in one] == names
    assert not any(record["error"] for record in one)
    assert [record.get("losses") for record in one] == [record.get("losses") for record in other]
    assert one[1]["losses"][-1] < one[1]["losses"][0]
    assert one[1]["sent_bytes"] > 0


@pytest.mark.slow
def test_every_training_and_every_exchange_runs_on_two_ranks() -> None:
    names = [gpu_ranks.EXCHANGED, *gpu_ranks.RUNS]
    found = run(2, records_of, names, 10, 65536, timeout=120)[0]
    assert errors(found) == dict.fromkeys(names, "")
    assert found[0]["comparisons"] == 3 * len(gpu_ranks.SPECS) + SUMMED


@pytest.mark.slow
def test_every_exchange_runs_on_two_nodes_of_two_ranks() -> None:
    for records in run(4, records_of, [gpu_ranks.EXCHANGED], 1, 65536, timeout=120):
        assert errors(records) == {gpu_ranks.EXCHANGED: ""}
        assert records[0]["comparisons"] == 3 * len(gpu_ranks.SPECS) + SUMMED


def spoilt(size: int) -> list[Record]:
    """Exchange with a mean that is wrong on both ranks."""
    right = table.KERNELS["mean", "int8", "cpu"]

    def wrong(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
        right(codec, payloads, count, out)
        out[0] += 1

    table.KERNELS["mean", "int8", "cpu"] = dataclasses.replace(right, run=wrong)
    try:
        return records_of([gpu_ranks.EXCHANGED], 1, size)
    finally:
        table.KERNELS["mean", "int8", "cpu"] = right


def test_a_wrong_mean_is_named_with_its_spec_and_exchange_on_both_ranks() -> None:
    for records in run(2, spoilt, 65536):
        assert records[0]["error"].startswith("int8 by ")
        assert "64 KB: a value is off by" in records[0]["error"]


class Nobody:
    """The wire of a rank that has no peers: nothing travels."""

    rank, world_size, device, by_message, peers = 0, 1, CPU, True, ()
    board = SimpleNamespace(explain=lambda error: error)

    def __init__(self, *_: object) -> None: ...

    def part(self, *_: object) -> "Nobody":
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *_, last=True, **settings: Transfer([], 0, 0, last)


def test_one_rank_alone_runs_every_exchange_and_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ranks, "Wire", Nobody)
    assert gpu_ranks.exchanged_alone(CPU, 65536)["comparisons"] == 3 * len(gpu_ranks.SPECS) + SUMMED
    right = table.KERNELS["mean", "int4", "cpu"]

    def wrong(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
        right(codec, payloads, count, out)
        out.mul_(-1)

    monkeypatch.setitem(table.KERNELS, ("mean", "int4", "cpu"), dataclasses.replace(right, run=wrong))
    with pytest.raises(gpu_ranks.ItemError, match=r"int4 by one_shot, 64 KB, one rank: the result is off by 2 of x"):
        gpu_ranks.exchanged_alone(CPU, 65536)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_exchange_on_one_rank_that_writes_nothing_back_or_too_little_is_named(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: TwoShot, x: Tensor, encoder: Any, *_: Any) -> Iterator[Transfer]:
        encoder.encode(x, slice(None), out=torch.empty(encoder.codec.nbytes(x.numel()), dtype=torch.uint8))
        yield Transfer([], 0, 0, True)
        x.mul_(share)

    monkeypatch.setattr(gpu_ranks, "Wire", Nobody)
    monkeypatch.setattr(gpu_ranks, "SPECS", ("bf16", "int8"))
    monkeypatch.setattr(TwoShot, "run", wrong)
    with pytest.raises(
        gpu_ranks.ItemError, match=r"int8 by two_shot, 64 KB, one rank: \d+ of 16384 values are not those"
    ):
        gpu_ranks.exchanged_alone(CPU, 65536)


def test_an_exchange_on_one_rank_goes_through_the_sequencer_and_its_error_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no such kernel")

    monkeypatch.setattr(gpu_ranks, "Wire", Nobody)
    right = table.KERNELS["recode", "fp8", "cpu"]
    monkeypatch.setitem(table.KERNELS, ("recode", "fp8", "cpu"), dataclasses.replace(right, run=failing))
    with pytest.raises(RuntimeError, match=r"fp8 by two_shot, 64 KB, one rank: ZeroDivisionError: no such kernel"):
        gpu_ranks.exchanged_alone(CPU, 65536)


def test_losses_that_differ_from_those_of_the_cpu_are_an_error_with_both_values() -> None:
    reference = {"item": "DDP, int4", "error": "", "losses": [3.0, 2.0]}
    row = {**reference, "name": "DDP, int4"}
    assert gpu_check.against(row | {"losses": [3.001, 2.0]}, reference)["error"] == ""
    for wrong, said in ((2.1, "2.1000"), (float("nan"), "nan")):
        found = gpu_check.against(row | {"losses": [3.0, wrong]}, reference)
        assert found["error"] == f"DDP, int4: the loss of step 2 is {said}, on the CPU 2.0000: expected it within 0.5%"
    found = gpu_check.against(row, reference | {"error": "DDP, int4: killed"})
    assert found["error"] == "nothing to compare with, on the CPU: DDP, int4: killed"


# --- the program -------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_sentence_and_ends_with_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = ended(lambda: sys.exit(gpu_check.main([])))
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"error: torch {torch.__version__} finds no GPU on this machine; --device cpu rehearses the check without one\n"
    )


def test_kernels_that_ranks_need_are_compiled_side_by_side_before_there_are_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[gpu_worker.Job] = []

    def failing(job: gpu_worker.Job, *_: Any) -> list[Record]:
        jobs.append(job)
        return [{"item": item, "error": f"{item}: killed"} for item in job.items]

    monkeypatch.setattr(gpu_check.gpu_parts, "work_off", failing)
    rows = gpu_check.run(gpu_check.Check("cpu", folder=tmp_path))["rows"]
    kinds = [job.kind for job in jobs]
    assert list(dict.fromkeys(kinds)) == ["compile", "bytes", "rates", "ranks"]
    items = [item for job in jobs if job.kind == "compile" for item in job.items]
    assert sorted(items) == sorted({*gpu_ranks.SPECS, "powersgd(2)", gpu_worker.PASSES})
    words = {parse(item).word for item in items if item != gpu_worker.PASSES}
    assert {parse(re.findall(r"[\w().|]+", name)[-1].removeprefix("delta|")).word for name in gpu_ranks.RUNS} <= words
    assert all(row["error"] for row in rows)


def test_what_is_compiled_for_ranks_is_what_their_sessions_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.dtype, bool]] = []
    monkeypatch.setattr(
        gpu_worker.coding, "warm_up", lambda codec, device, dtype, prologue: asked.append((str(codec), dtype, prologue))
    )
    monkeypatch.setattr(gpu_worker, "compiled_dtypes", lambda device: (torch.float32, torch.bfloat16))
    monkeypatch.setattr(gpu_worker.loops, "warm_up", lambda device: asked.append(("passes", torch.float32, True)))
    job = gpu_worker.Job("compile", ["int4", gpu_worker.PASSES], ["cpu"])
    assert [record["error"] for record in gpu_worker.alone(job, CPU)] == ["", ""]
    assert asked == [("int4", torch.float32, True), ("int4", torch.bfloat16, True), ("passes", torch.float32, True)]


def sample(**changes: object) -> Record:
    """A record as a GPU would give it."""
    fast = dict.fromkeys(gpu_record.ACTIONS, 0.9)
    row = {"part": "codecs", "name": "int4", "error": "", "comparisons": 590, "kernels": list(fast), "shares": fast}
    return {
        **{
            "what": "gpu check",
            "rehearsal": False,
            "machine": "GPU <9>",
            "gpus": 1,
            "torch": "2.13.0",
            "triton": "3.9.0",
        },
        **{"values": 1 << 25, "copy_seconds": 1e-4, "seconds": 300.0},
        "rows": [
            row,
            row | {"name": "sign", "shares": fast | {"encode": 0.79}},
            row | {"name": "topk(0.01)|int4", "shares": fast | {"encode": 0.39, "decode": 0.41}},
            row | {"name": "randomk(0.1)", "shares": fast | {"encode": 0.1}, "kernels": []},
            {
                "part": "passes",
                "name": "pack",
                "error": "",
                "comparisons": 8,
                "kernel": True,
                "shares": {"float32": 0.7},
            },
            {"part": "NCCL, 1 rank", "name": "DDP, int4", "error": "", "losses": [2.5], "off": 1e-5},
            {"part": "NCCL, 1 rank", "name": "FSDP2", "error": "FSDP2: killed"},
        ],
        **changes,
    }


def test_the_table_marks_what_failed_what_is_below_its_goal_and_what_has_no_kernel(tmp_path: Path) -> None:
    by_part = dict(gpu_record.lines(sample()))
    int4, sign, topk, randomk = by_part["codecs"]
    assert int4[2:] == ["90%"] * 6
    assert (sign[2], topk[2], topk[5], randomk[2]) == ("79% <", "39% <", "41%", "10%*")
    assert by_part["passes"][0][1] == "8 results are right, 70% in float32 of a copy's rate"
    assert [cells[1] for cells in by_part["NCCL, 1 rank"]] == [
        "losses as on the CPU to 1.0e-05 (the last is 2.500)",
        "FAILED: FSDP2: killed",
    ]
    assert gpu_record.answer(sample()) == (
        "FAILED: 1 of 7 rows, after 300 s; of 24 rates 2 are below their goal, 6 are of plain torch"
    )
    with contextlib.redirect_stdout(sys.stderr):
        assert gpu_check.finish(sample(), tmp_path) == 1
        assert gpu_check.finish(sample(rows=sample()["rows"][:-1]), tmp_path) == 0


def test_a_rehearsal_says_that_it_is_one_and_judges_no_rate() -> None:
    record = sample(rehearsal=True)
    assert gpu_record.title(record).startswith("REHEARSAL on the CPU, no GPU has been used: ")
    assert dict(gpu_record.lines(record))["codecs"][1][2] == "79%"
    assert gpu_record.answer(record).endswith("this was a rehearsal on the CPU, which says nothing about a GPU")


def test_the_report_reads_the_record(tmp_path: Path) -> None:
    place, out = tmp_path / "gpu-check.json", tmp_path / "report.html"
    place.write_text(json.dumps(sample()))
    assert run_command("report", out, place).code == 0
    html = out.read_text()
    assert "<h2>Check of a GPU</h2>" in html
    assert "GPU &lt;9&gt;, torch 2.13.0, Triton 3.9.0; a copy of 134 MB: 0.1 ms, 2684 GB/s." in html
    assert "FAILED: FSDP2: killed" in html
    assert "Rehearsal" in report.page([sample(rehearsal=True)])
    place.write_text(json.dumps(sample(rows=[{"name": "int4", "error": ""}])))
    assert "not what `make gpu-check` found: row 0, it has no 'part'" in run_command("report", out, place).err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_program_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIMIT", "COMPILE", "BYTES", "RATES", "CPU", "RANKS", "PROGRAM"):  # other tests run beside it
        monkeypatch.setattr(gpu_check, f"{name}_SECONDS", 5 * getattr(gpu_check, f"{name}_SECONDS"))
    monkeypatch.setattr(gpu_check.gpu_parts, "STALL_SECONDS", 450.0)
    few = ("int4", "topk(0.1)|int4")
    small: dict[str, Any] = {"mb": 0.4, "repeat": 1, "steps": 3, "sizes": (65536,), "small": True}
    runs = ("DDP, int4", "FSDP2, int4, parameters int8")
    check = gpu_check.Check("cpu", specs=few, timed=few, compiled=few, runs=runs, folder=tmp_path, **small)
    record = gpu_check.run(check)
    assert [(row["name"], row["error"]) for row in record["rows"] if row["error"]] == []
    parts = [row["part"] for row in record["rows"]]
    assert list(dict.fromkeys(parts)) == [
        "codecs",
        "passes",
        "Gloo in NCCL's place, 1 rank",
        "Gloo, 2 ranks on one device",
    ]
    assert record["rehearsal"]
    with contextlib.redirect_stdout(sys.stderr):
        assert gpu_check.finish(record, tmp_path) == 0
    assert run_command("report", tmp_path / "report.html", tmp_path / "gpu-check.json").code == 0
