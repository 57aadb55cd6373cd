"""Memories follow their parameters: through new layouts, new chunk owners, a restart and a new loss scale."""

import io
import itertools

import pytest
import torch
from battery import normal
from torch import Tensor

from commpress.comm.exchange.two_shot import chunk_bounds
from commpress.comm.feedback import Feedback, Memory
from commpress.comm.scratch import Scratch, ScratchPool
from commpress.comm.segments import Segment, Segments, sizes

CPU = torch.device("cpu")
SIZES = {"a": 300, "b": 40, "c": 700, "d": 1, "e": 256}
TOTAL = sum(SIZES.values())


def layout(*names: str) -> Segments:
    """A bucket of these parameters."""
    return tuple(Segment(name, SIZES[name]) for name in names)


def memory(feedback: Feedback, rank: int, segments: Segments, granularity: int = 64) -> Memory:
    """The memory of a two_shot bucket on one rank."""
    cuts = chunk_bounds(sum(sizes(segments)), feedback.world_size, granularity)
    return feedback.memory(segments, True, (cuts[rank], cuts[rank + 1]), CPU)


def fill(feedback: Feedback, seed: int = 0) -> None:
    """Some values in all memories."""
    counter = itertools.count(seed)
    for kept in feedback.memories.values():
        for part in (kept.residual, kept.owner_residual):
            assert part is not None
            part.copy_(normal(part.numel(), next(counter)))


def by_parameter(ranks: list[Feedback]) -> dict[str, Tensor]:
    """What the memories of all ranks will add to the mean of each parameter: residual / W, and second as it is."""
    total = {name: torch.zeros(n, dtype=torch.float64) for name, n in SIZES.items()}
    for feedback in ranks:
        for segments, kept in feedback.memories.items():
            assert kept.residual is not None
            whole = kept.residual.double() / feedback.world_size
            if kept.owner_residual is not None:
                whole[kept.owner_start : kept.owner_start + kept.owner_residual.numel()] += kept.owner_residual.double()
            for segment, part in zip(segments, whole.split(sizes(segments)), strict=True):
                total[segment.name] += part
    return total


def assert_same_total(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name in SIZES:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_same_bucket_gets_the_same_memory() -> None:
    feedback = Feedback(2)
    first = feedback.memory(layout("a", "b"), True, None, CPU)
    assert feedback.memory(layout("a", "b"), True, None, CPU) is first
    assert feedback.memory(layout("c"), True, None, CPU) is not first


def test_memories_start_empty_and_as_large_as_they_must_be() -> None:
    feedback = Feedback(2)
    kept = feedback.memory(layout("a", "b"), True, (128, 340), CPU)
    assert kept.residual is not None
    assert kept.owner_residual is not None
    assert torch.equal(kept.residual, torch.zeros(340))
    assert torch.equal(kept.owner_residual, torch.zeros(212))
    assert kept.owner_start == 128
    assert feedback.memory(layout("c"), True, None, CPU).owner_residual is None
    without = feedback.memory(layout("e"), False, (0, 128), CPU)
    assert without.residual is None
    assert without.owner_residual is None


def test_residuals_move_with_their_parameters() -> None:
    feedback = Feedback(2)
    old = feedback.memory(layout("a", "b", "c"), True, None, CPU)
    assert old.residual is not None
    old.residual.copy_(torch.arange(1040.0))
    parts = dict(zip("abc", old.residual.clone().split([300, 40, 700]), strict=True))
    first = feedback.memory(layout("c", "a"), True, None, CPU)
    second = feedback.memory(layout("d", "b"), True, None, CPU)
    assert first.residual is not None
    assert second.residual is not None
    assert torch.equal(first.residual, torch.cat([parts["c"], parts["a"]]))
    assert torch.equal(second.residual, torch.cat([torch.zeros(1), parts["b"]]))
    assert set(feedback.memories) == {layout("c", "a"), layout("d", "b")}  # the old one is given up


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_nothing_is_lost_when_buckets_are_laid_out_anew(world_size: int) -> None:
    ranks = [Feedback(world_size) for _ in range(world_size)]
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("a", "b", "c"))
        memory(feedback, rank, layout("d", "e"))
        fill(feedback, 10 * rank)
    before = by_parameter(ranks)
    for new in (layout("e", "d", "c"), layout("b", "a")):
        for rank, feedback in enumerate(ranks):
            memory(feedback, rank, new)
        assert_same_total(before, by_parameter(ranks))  # half way through as well
    assert all(set(feedback.memories) == {layout("e", "d", "c"), layout("b", "a")} for feedback in ranks)
    assert all(sum(sum(sizes(s)) for s in feedback.memories) == TOTAL for feedback in ranks)


def test_a_new_layout_in_the_order_of_another_rank_is_the_same() -> None:
    """Which of two new buckets comes first makes no difference to what they take over."""
    results = []
    for order in itertools.permutations([layout("e", "c"), layout("b", "d", "a")]):
        feedback = Feedback(3)
        memory(feedback, 1, layout("a", "b", "c"))
        memory(feedback, 1, layout("d", "e"))
        fill(feedback)
        for new in order:
            memory(feedback, 1, new)
        results.append(
            [feedback.memories[layout("e", "c")].residual, feedback.memories[layout("b", "d", "a")].residual]
        )
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_a_bucket_that_loses_some_parameters_keeps_those_of_the_others() -> None:
    ranks = [Feedback(2) for _ in range(2)]
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("a", "b", "c"))
        fill(feedback, 10 * rank)
    before = by_parameter(ranks)
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("b"))
        assert layout("a", "b", "c") in feedback.memories
    assert_same_total(before, by_parameter(ranks))
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("c", "a"))
        assert set(feedback.memories) == {layout("b"), layout("c", "a")}
    assert_same_total(before, by_parameter(ranks))


def test_a_layout_that_comes_back_finds_what_was_kept_meanwhile() -> None:
    feedback = Feedback(1)
    memory(feedback, 0, layout("a", "b"))
    memory(feedback, 0, layout("b", "a"))
    fill(feedback)
    before = by_parameter([feedback])
    memory(feedback, 0, layout("a", "b"))
    assert set(feedback.memories) == {layout("a", "b")}
    assert_same_total(before, by_parameter([feedback]))


def test_a_bucket_that_comes_back_whole_takes_back_what_had_left_it() -> None:
    ranks = [Feedback(2) for _ in range(2)]
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("a", "b", "c"))
        fill(feedback, 10 * rank)
        memory(feedback, rank, layout("b"))
    before = by_parameter(ranks)
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("a", "b", "c"))
        assert set(feedback.memories) == {layout("a", "b", "c")}
    assert_same_total(before, by_parameter(ranks))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_chunk_that_passes_to_another_owner_keeps_its_second_memory(world_size: int) -> None:
    ranks = [Feedback(world_size) for _ in range(world_size)]
    for rank, feedback in enumerate(ranks):
        memory(feedback, rank, layout("a", "c"))
        for kept in feedback.memories.values():
            assert kept.owner_residual is not None
            kept.owner_residual.fill_(
                rank + 1.0
            )  # the first memories stay empty: all that is kept is in the second ones
    before = by_parameter(ranks)
    assert all(part.abs().sum() > 0 for part in (before["a"], before["c"]))
    for rank, feedback in enumerate(ranks):
        kept = memory(feedback, rank, layout("c", "a"))
        assert kept.owner_residual is not None
        assert not kept.owner_residual.any()
    assert_same_total(before, by_parameter(ranks))


def test_state_round_trip_through_a_file() -> None:
    feedback = Feedback(2)
    memory(feedback, 1, layout("a", "b"))
    memory(feedback, 1, layout("c"))
    fill(feedback)
    feedback.memory(layout("d"), False, None, CPU)
    file = io.BytesIO()
    torch.save(feedback.state_dict(), file)
    file.seek(0)
    restored = Feedback(2)
    restored.memory(layout("e"), True, None, CPU)  # to be forgotten
    restored.load_state_dict(torch.load(file, weights_only=True), CPU)
    assert list(restored.memories) == list(feedback.memories)
    for segments, kept in feedback.memories.items():
        other = restored.memories[segments]
        assert other.owner_start == kept.owner_start
        for one, two in ((kept.residual, other.residual), (kept.owner_residual, other.owner_residual)):
            assert (one is None) == (two is None)
            assert one is None or two is None or torch.equal(one, two)
    moved = restored.memory(layout("b", "a"), True, None, CPU)  # the homes are known again
    again = feedback.memory(layout("b", "a"), True, None, CPU)
    assert moved.residual is not None
    assert again.residual is not None
    assert torch.equal(moved.residual, again.residual)


def test_saved_state_does_not_change_afterwards() -> None:
    feedback = Feedback(2)
    memory(feedback, 0, layout("a"))
    fill(feedback)
    saved = feedback.state_dict()
    copy = saved[0]["residual"].clone()
    restored = Feedback(2)
    restored.load_state_dict(saved, CPU)
    feedback.rescale(0.0)
    restored.rescale(2.0)
    assert torch.equal(saved[0]["residual"], copy)


def test_rescale_multiplies_both_memories() -> None:
    feedback = Feedback(2)
    kept = memory(feedback, 1, layout("a", "c"))
    without = feedback.memory(layout("d"), False, None, CPU)
    fill_of = {"residual": normal(1000, 1), "owner_residual": normal(1000 - kept.owner_start, 2)}
    assert kept.residual is not None
    assert kept.owner_residual is not None
    kept.residual.copy_(fill_of["residual"])
    kept.owner_residual.copy_(fill_of["owner_residual"])
    feedback.rescale(0.25)
    assert torch.equal(kept.residual, fill_of["residual"] * 0.25)
    assert torch.equal(kept.owner_residual, fill_of["owner_residual"] * 0.25)
    assert without.residual is None


def test_buffers_stay_allocated_until_their_size_changes() -> None:
    kept = Scratch()
    first = kept.buffer("payload", 100, CPU)
    assert (first.dtype, first.numel()) == (torch.uint8, 100)
    assert kept.buffer("payload", 100, CPU) is first
    assert kept.buffer("other", 100, CPU) is not first
    assert kept.buffer("payload", 104, CPU).numel() == 104


def test_scratch_of_a_layout_that_is_gone_is_freed() -> None:
    pool = ScratchPool(CPU)
    first, second = layout("a"), layout("b")
    scratch = pool.of(first, [first])
    assert pool.of(first, []) is scratch
    pool.of(second, [second])
    assert pool.of(first, [first, second]) is not scratch


def test_a_snapshot_is_what_was_remembered_then() -> None:
    feedback = Feedback(2)
    kept = memory(feedback, 1, layout("a", "c"))
    fill(feedback)
    before = {name: values.clone() for name, values in kept.tensors().items()}
    feedback.snapshot(layout("a", "c"), kept)
    fill(feedback, seed=7)
    feedback.restore_snapshot()
    assert kept.tensors().keys() == before.keys() == {"residual", "owner_residual"}
    assert all(torch.equal(values, before[name]) for name, values in kept.tensors().items())


def test_a_snapshot_of_an_earlier_step_brings_nothing_back() -> None:
    feedback = Feedback(2)
    kept = memory(feedback, 1, layout("a", "c"))
    feedback.snapshot(layout("a", "c"), kept)
    fill(feedback)
    now = {name: values.clone() for name, values in kept.tensors().items()}
    feedback.begin_step()  # in which these parameters are frozen
    feedback.restore_snapshot()
    assert any(values.any() for values in now.values())
    assert all(torch.equal(values, now[name]) for name, values in kept.tensors().items())
