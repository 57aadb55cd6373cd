"""Ranks that were asked for different things all say so, with both values, before a gradient travels."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run

from commpress.comm.agreement import gather_settings, require_agreement
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

CPU = torch.device("cpu")


def gathered(settings: list[dict[str, object]]) -> list[dict[str, object]]:
    """What each rank knows of all of them."""
    return gather_settings(settings[dist.get_rank()], dist.group.WORLD, CPU)


def required(settings: list[dict[str, object]]) -> str:
    """What require_agreement says, and that the group is fit for use afterwards."""
    said = outcome(lambda: require_agreement(settings[dist.get_rank()], dist.group.WORLD, CPU))
    count = torch.ones(1)
    dist.all_reduce(count)
    assert count == dist.get_world_size()
    return said


def session(arguments: list[dict[str, Any]]) -> str:
    """What making a session says if rank r passes arguments[r]; `spec` is one of them."""
    own = dict(arguments[dist.get_rank()])
    said = outcome(lambda: replicas_session(own.pop("spec"), dist.group.WORLD, CPU, **own))
    dist.barrier()  # a rank that ends closes its connections, and another may still be making its session's
    return said


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_settings_arrive_in_the_order_of_the_ranks(world_size: int) -> None:
    settings: list[dict[str, object]] = [
        {"spec": "x" * 100 * r, "rank": r, "text": "é \u2713 | (0.01)", "flag": True, "none": None}
        for r in range(world_size)
    ]
    assert run(world_size, gathered, settings) == [settings] * world_size


def test_the_same_settings_are_no_error() -> None:
    assert run(3, required, [{"spec": "int4", "feedback": True}] * 3) == [""] * 3


@pytest.mark.parametrize("odd", [1, 2])
def test_all_ranks_name_the_odd_one_and_both_values(odd: int) -> None:
    settings = [{"same": 1, "spec": "int8" if r == odd else "int4"} for r in range(3)]
    message = f"ValueError: rank {odd} has spec 'int8', rank 0 has 'int4': all ranks must use the same spec"
    assert run(3, required, settings) == [message] * 3


def test_an_error_of_one_rank_is_that_of_all() -> None:
    settings = [{"spec": "int4"}, {"error": "unknown codec 'int5'"}, {"spec": "int8"}]
    assert run(3, required, settings) == ["ValueError: rank 1: unknown codec 'int5'"] * 3


@pytest.mark.parametrize(("usual", "other", "values"), [
    ({"spec": "int4"}, {"spec": "int8"}, ("int4", "int8")),
    ({"spec": "topk(0.01)"}, {"spec": "topk(0.02)"}, ("topk(0.01)", "topk(0.02)")),
    ({"spec": "int4"}, {"spec": "int4", "exchange": "one_shot"}, ("None", "one_shot")),
    ({"spec": "int4"}, {"spec": "int4", "error_feedback": False}, ("True", "False")),
    (
        {"spec": "int4", "parameters": (Segment("a", 10), Segment("b", 20))},
        {"spec": "int4", "parameters": (Segment("a", 10),)},
        ("2 with 30 values", "1 with 10 values"),
    ),
])  # fmt: skip
def test_every_setting_of_a_session_must_be_the_same(
    usual: dict[str, Any], other: dict[str, Any], values: tuple[str, str]
) -> None:
    said = run(3, session, [usual, usual, other])
    assert len(set(said)) == 1
    assert said[0].startswith("ValueError: rank 2 has ")
    assert all(value in said[0] for value in values)


@pytest.mark.parametrize(("bad", "reason"), [
    ({"spec": "int5"}, "unknown codec 'int5'"),
    ({"spec": "topk(2)"}, "the kept share must be in (0, 1]"),
    ({"spec": "int4", "exchange": "ring"}, "unknown exchange 'ring'"),
    ({"spec": "int4", "exchange": "all_reduce"}, "payloads of int4 cannot be summed"),
    ({"spec": 4}, "a spec is a string"),
])  # fmt: skip
@pytest.mark.parametrize("odd", [0, 1])
def test_a_bad_argument_on_one_rank_fails_on_all(bad: dict[str, Any], reason: str, odd: int) -> None:
    said = run(2, session, [bad if r == odd else {"spec": "int4"} for r in range(2)])
    assert len(set(said)) == 1
    assert said[0].startswith(f"ValueError: rank {odd}: ")
    assert reason in said[0]


def test_two_spellings_of_one_spec_agree() -> None:
    assert run(2, session, [{"spec": "topk(0.01)|int4"}, {"spec": " topk( 1e-2 ) | int4 "}]) == ["", ""]
