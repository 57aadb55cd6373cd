"""Specs by patterns of names, under DDP: each parameter by its own codec, the report and errors by name."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, Trained, network, same, same_training, train

import commpress
from commpress.comm.rules import rules_for, small_tensors
from commpress.comm.segments import Segment

RULES = {"0.*": "int8", "*.bias": "none", "*": "int4"}
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def test_the_first_pattern_that_fits_decides() -> None:
    rules = rules_for(RULES, NAMES)
    assert {name: str(codec) for name, codec in rules.codecs.items()} == {
        "0.weight": "int8",
        "0.bias": "int8",
        "2.weight": "int4",
        "2.bias": "none",
    }
    parts = rules.parts((Segment("2.bias", 4), Segment("2.weight", 8), Segment("0.bias", 2), Segment("0.weight", 6)), 0)
    assert [(part, str(codec)) for part, codec in parts] == [
        ((Segment("2.bias", 4),), "none"),
        ((Segment("2.weight", 8),), "int4"),
        ((Segment("0.bias", 2), Segment("0.weight", 6)), "int8"),
    ]


PARAMETERS = (Segment("w", 4000, (40, 100)), Segment("norm", 400, (400,)), Segment("tiny", 9, (3, 3)))


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        ({"*": "int2"}, ["norm", "tiny"]),
        ({"*": "topk(0.1->0.01, 5)|int4"}, ["norm", "tiny"]),
        ({"norm": "int2", "*": "sign"}, ["tiny"]),
        ({"w": "int2", "*": "sign"}, ["norm", "tiny"]),
        ({"*": "int4"}, []),
        ({"*": "auto"}, []),
        ({"?*": "int2"}, []),
    ],
)
def test_small_tensors_are_exact_where_all_others_are_coded_coarsely(given: dict[str, str], exact: list[str]) -> None:
    rules = rules_for(given, [part.name for part in PARAMETERS], small_tensors(PARAMETERS))
    assert [name for name, codec in rules.codecs.items() if str(codec) == "none"] == exact
    shares = rules.shares(PARAMETERS)
    assert shares.get("norms, biases and small tensors: none", 0) == sum(p.n for p in PARAMETERS if p.name in exact)
    assert sum(shares.values()) == 4409


def exact_biases() -> tuple[Any, ...]:
    """What is left after a few steps by `*: sign`, the rows of the report by rule, and the values that were not compressed."""
    model = replica()
    session = commpress.attach(model, {"*": "sign"})
    return train(model, range(6)).parameters, session.report().to_dict()["rules"], session.receipt().uncompressed


def test_biases_have_their_own_row_beside_a_coarse_spec() -> None:
    first, second = run(2, exact_biases)
    assert same(first[0], second[0])
    biases = sum(p.numel() for name, p in network().named_parameters() if name.endswith("bias"))
    assert first[1]["norms, biases and small tensors: none"]["values"] == biases
    assert first[1]["norms, biases and small tensors: none"]["ratio"] == 1
    assert first[1]["*: sign"]["ratio"] > 10
    assert first[2]["norms, biases and small tensors: none"] == biases


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"*.wieght": "int8", "*": "int4"}, "'*.wieght': decides for none of 4 parameters, as '0.weight'"),
        (
            {"*": "int4", "0.*": "int8"},
            "'0.*': decides for none of 4 parameters, all that it fits are decided by patterns before",
        ),
        ({"0.*": "int8"}, "no pattern fits parameter '2.weight' (2 in all); end with '*'"),
        ({"*": "int5"}, "gradients, '*': spec 'int5': unknown codec 'int5'"),
        ({1: "int4"}, "expected patterns of names, such as '*.bias', got 1"),
    ],
)
def test_patterns_that_make_no_sense_are_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        rules_for(given, NAMES)
    assert message in str(error.value)


def replica() -> DistributedDataParallel:
    return DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)


def trained_by(gradients: Any) -> tuple[Trained, dict[str, Any]]:
    model = replica()
    session = commpress.attach(model, gradients)
    return train(model, range(6)), session.report().to_dict()


def by_rules_and_plain() -> tuple[Any, ...]:
    return (
        trained_by(RULES),
        trained_by({"*": "none"}),
        trained_by("none"),
        trained_by({"*": "int4"}),
        trained_by("int4"),
    )


@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_each_parameter_travels_by_its_own_codec(world_size: int) -> None:
    ranks = run(world_size, by_rules_and_plain)
    (mixed, report), *rest = ranks[0]
    assert all(same(mixed.parameters, other[0][0].parameters) for other in ranks)
    sent = {(row["spec"], row["values"]) for row in report["rows"]}
    assert {spec for spec, _ in sent} == {"int8", "int4", "none"}
    # per step and spec: the layers' sizes
    values = {
        spec: sum(r["values"] * r["steps"] for r in report["rows"] if r["spec"] == spec) / 6
        for spec in ("int8", "int4")
    }
    assert values == {"int8": 32 * 64 + 64, "int4": 64 * 64 + 640}
    assert list(report["rules"]) == ["0.*: int8", "*.bias: none", "*: int4"]
    assert {rule: sums["values"] for rule, sums in report["rules"].items()} == {
        "0.*: int8": values["int8"],
        "*.bias: none": sum(r["values"] * r["steps"] for r in report["rows"] if r["spec"] == "none") / 6,
        "*: int4": values["int4"],
    }
    for spec, rule in (("int8", "0.*: int8"), ("none", "*.bias: none"), ("int4", "*: int4")):
        rows = [row for row in report["rows"] if row["spec"] == spec]
        assert report["rules"][rule]["sent_bytes"] == sum(row["sent_bytes"] for row in rows)
        assert report["rules"][rule]["dense_bytes"] == sum(row["dense_bytes"] for row in rows)
    assert report["rules"]["*.bias: none"]["ratio"] == 1.0 < report["rules"]["0.*: int8"]["ratio"]
    (all_none, _), (none, _), (all_int4, _), (int4, _) = rest
    assert same_training(all_none, none)
    assert same_training(all_int4, int4)
    for (_, plain), one, other in ((rest[1], mixed, none),):
        assert plain["ratio"] == 1.0
        assert not same(one.parameters, other.parameters)
        distance = sum(float((a - b).norm()) for a, b in zip(one.parameters, other.parameters, strict=True))
        assert distance < 0.1 * sum(float(p.norm()) for p in other.parameters)


def interrupted(folder: str) -> tuple[Trained, Trained]:
    """Six steps in one go, and three and three with a restart between."""
    whole, first, second = replica(), replica(), replica()
    commpress.attach(whole, RULES)
    one = train(whole, range(6))
    session, again = commpress.attach(first, RULES), commpress.attach(second, RULES)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    train(first, range(3), optimizer=optimizer)
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(session.state_dict())
    return one, train(second, range(3, 6), optimizer=resumed)


def test_a_restart_goes_on_bit_for_bit() -> None:
    for whole, resumed in run(2, interrupted, ""):
        assert same(whole.parameters, resumed.parameters)


def refusals() -> dict[str, str]:
    me, model = dist.get_rank(), replica()
    optimizer = commpress.optim.OneBitAdamW(model.parameters(), lr=0.1, warmup_steps=1)
    other = {**RULES, "0.*": ("int8", "int4")[me]}
    return {
        "optimizer": outcome(lambda: commpress.attach(model, RULES, optimizer=optimizer)),
        "exchange": outcome(lambda: commpress.attach(model, RULES, exchange="one_shot")),
        "differ": outcome(lambda: commpress.attach(model, other)),
        "one rank": outcome(lambda: commpress.attach(model, ({"nothing": "int4"}, "int4")[me])),
    }


def test_refusals_are_errors_on_all_ranks() -> None:
    for got in run(2, refusals):
        assert "OneBitAdamW needs one spec of the gradients" in got["optimizer"]
        assert "or auto; got patterns" in got["optimizer"]
        assert "with patterns each codec uses its own" in got["exchange"]
        assert "rank 1 has spec '0.*: int4, *.bias: none, *: int4', rank 0 has '0.*: int8" in got["differ"]
        assert "'nothing': decides for none of 6 parameters" in got["one rank"]


def with_auto() -> tuple[list[Any], str, str]:
    model = replica()
    session = commpress.attach(model, {"0.*": "int8", "*": "auto"})
    trained = train(model, range(40))
    return trained.parameters, session.report().spec, str(session.receipt())


def test_auto_decides_for_the_rest() -> None:
    one, other = run(2, with_auto)
    assert same(one[0], other[0])
    assert one[1].startswith("0.*: int8, *: auto; auto: ")
    assert "commpress 0.*: int8, *: auto (" in one[2]
