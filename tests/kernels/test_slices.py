"""Slices of a bucket in several threads: the same bytes, no thread that a fork lacks, none that outlives the call."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from battery import gradient, same_bits
from ranks import run
from torch import Tensor

from commpress.comm import coding
from commpress.comm.codecs import parse
from commpress.comm.prologue import Prologue
from commpress.kernels.cpu import rotate, slices

SPECS = ("bf16", "fp16", "fp8", "fp8(e5m2)", "int8", "int4", "int4(stochastic)", "int2", "sign")
UNITED = ("topk(0.1)", "topk(0.02)|int4", "randomk(0.1)", "randomk(0.1)|int4", "rotate|int4", "rotate|sign")
"""Codecs whose payload is made of more than blocks, or of blocks in blocks."""
LENGTHS = (1, 300, 8 * 1024, 9 * 1024 + 301)
"""Fewer blocks than slices, whole blocks, and a tail."""


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets into how many slices every bucket is cut, however short it is."""

    def cut(count: int) -> None:
        monkeypatch.setattr(slices, "idle_cores", lambda: count)

    pool = ThreadPoolExecutor(3)
    monkeypatch.setattr(slices, "LEAST", 1)
    monkeypatch.setattr(rotate, "CHUNK", 2 * rotate.ROTATED)
    monkeypatch.setattr(slices, "_pool", lambda: pool)
    yield cut
    pool.shutdown()


def all_ops(spec: str, n: int, dtype: torch.dtype) -> list[Tensor]:
    """What every op makes of a bucket of n values: payloads, residuals and means."""
    codec, x = parse(spec), gradient(n).to(dtype)
    x[n // 2] = torch.inf
    residuals = [gradient(n, seed) for seed in (1, 2, 3)]
    update = Prologue(gradient(n, 4).abs(), gradient(n, 5), limit=1.5, fresh=0.1, kept=0.9)
    payloads = torch.cat(
        [
            codec.encode(x),
            coding.encode(codec, x, residuals[0]),
            coding.encode(codec, x.clone(), residuals[1], update),
        ]
    )
    means = [codec.mean(payloads, n, 3), codec.mean(payloads, n, 3, torch.empty(n, dtype=dtype)).float()]
    coded = [coding.recode(codec, payloads, n, 3), coding.recode(codec, payloads, n, 3, residuals[2])]
    return [payloads, *(x.view(torch.uint8) for x in (*residuals, *means)), *coded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS + UNITED)
def test_any_number_of_slices_gives_the_same_bytes(
    spec: str, dtype: torch.dtype, sliced: Callable[[int], None]
) -> None:
    for n in LENGTHS:
        sliced(1)
        whole = all_ops(spec, n, dtype)
        for count in (2, 3, 7):
            sliced(count)
            for one, other in zip(whole, all_ops(spec, n, dtype), strict=True):
                assert torch.equal(one, other), f"{count} slices, n = {n}"


def test_slices_meet_and_only_the_last_has_the_tail(sliced: Callable[[int], None]) -> None:
    for count, blocks in ((1, 5), (2, 5), (7, 20), (7, 3)):
        sliced(count)
        cuts: list[tuple[int, int]] = []
        slices.in_slices(lambda begin, end: cuts.append((begin, end)), 10 * blocks - 3, 10)  # noqa: B023
        assert len(cuts) == count
        assert [b for begin, end in sorted(cuts) for b in range(begin, end)] == list(range(blocks))
        assert [end for _, end in cuts].count(blocks) == 1


def test_a_short_bucket_is_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "idle_cores", lambda: 4)
    for n, count in ((1000, 1), (2 * slices.LEAST - 1, 1), (2 * slices.LEAST, 2), (3 * slices.LEAST, 3)):
        cuts: list[int] = []
        slices.in_slices(lambda begin, end: cuts.append(begin), n, 256)  # noqa: B023
        assert len(cuts) == count


def test_slices_run_side_by_side(sliced: Callable[[int], None]) -> None:
    sliced(2)
    both = threading.Barrier(2, timeout=20)
    slices.in_slices(lambda begin, end: both.wait(), 1000, 10)


def test_where_no_thread_is_free_the_caller_does_all(
    sliced: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sliced(3)
    ended = ThreadPoolExecutor(1)
    ended.shutdown()  # as at the end of the program
    monkeypatch.setattr(slices, "_pool", lambda: ended)
    seen: list[tuple[int, int, int]] = []
    slices.in_slices(lambda begin, end: seen.append((begin, end, threading.get_ident())), 30, 10)
    assert seen == [(i, i + 1, threading.get_ident()) for i in range(3)]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_in_a_slice_is_raised_when_all_have_ended(bad: int, sliced: Callable[[int], None]) -> None:
    sliced(3)
    running = set()

    def loop(begin: int, end: int) -> None:
        running.add(begin)
        try:
            if begin == bad:
                raise ValueError(f"slice {begin}")
        finally:
            running.remove(begin)

    with pytest.raises(ValueError, match=f"slice {bad}"):
        slices.in_slices(loop, 30, 10)
    assert not running


def test_backward_keeps_its_threads_and_other_ranks_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "cores", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for threads, ranks, idle in ((1, None, 15), (16, None, 1), (1, "4", 3), (4, "4", 1), (8, "4", 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert slices.idle_cores() == idle


def forked() -> tuple[int, int]:
    """Encode in slices here and in a fork; how the fork ended, and how many threads the slices took."""
    slices.idle_cores = lambda: 2  # type: ignore[assignment]
    codec, x = parse("int8"), gradient(2 * slices.LEAST + 5)
    payload = codec.encode(x)
    threads = sum(thread.name.startswith("commpress slice") for thread in threading.enumerate())
    if (child := os.fork()) == 0:
        again = same_bits(codec.encode(x).view(torch.float32), payload.view(torch.float32))
        alive = sum(thread.name.startswith("commpress slice") for thread in threading.enumerate())
        os._exit(0 if again and alive == threads else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), threads


def test_a_fork_makes_threads_of_its_own() -> None:
    # in a new process: a fork does not have the other threads of a session, which may hold a lock for ever
    assert run(1, forked, fresh=True) == [(0, 1)]
