"""`topk(0.25->0.01, 500)`: a ratio that falls over the first steps, under DDP, by one spec and by patterns."""

from typing import Any

import pytest
import torch
from ranks import outcome, run
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, Trained, network, same, sgd, train

import commpress
from commpress.comm.ratio_warmup import ratio_warmup
from commpress.optim import DGC

STEPS, FALLING = 8, "topk(0.5->0.02, 5)|int4"
CODECS = [
    *("topk(0.5)|int4", "topk(0.263)|int4", "topk(0.138)|int4", "topk(0.0725)|int4", "topk(0.0381)|int4"),
    *("topk(0.02)|int4",) * 3,
]
PATTERNS = {"0.*": "int8", "*": FALLING}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("topk(0.25->0.01, 500)", "topk(0.25->0.01, 500)"),
        (" randomk ( .5 -> 1e-2 ,10 ) | int4(stochastic)", "randomk(0.5->0.01, 10)|int4(stochastic)"),
        ("topk(0.123456789->0.001,7)|sign", "topk(0.123456789->0.001, 7)|sign"),
    ],
)
def test_its_text_round_trips(spec: str, text: str) -> None:
    found = ratio_warmup(spec)
    assert str(found) == text
    assert ratio_warmup(text) == found


def test_the_ratio_falls_exponentially_in_five_stages() -> None:
    found = ratio_warmup(FALLING)
    assert found is not None
    assert [str(found.at(step)) for step in range(STEPS)] == CODECS
    longer = ratio_warmup("topk(0.25->0.01, 500)")
    assert longer is not None
    assert [str(longer.at(step)) for step in (0, 99, 100, 499, 500, 10**9)] == [
        *("topk(0.25)", "topk(0.25)", "topk(0.131)", "topk(0.019)", "topk(0.01)", "topk(0.01)"),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk(0.01->0.25, 5)", "expected a first ratio above the last, got 0.01 and 0.25"),
        (
            "topk(0.25->0.01)",
            "expected the first ratio, the last one and the steps between, as in topk(0.25->0.01, 500)",
        ),
        ("topk(0.25->0.01, 1e3)", "the steps between, as in topk(0.25->0.01, 500); got (0.25->0.01, 1e3)"),
        ("topk(0.25->0.01, 0)", "expected at least 1 step, got 0"),
        ("topk(2->0.01, 5)", "the kept share must be in (0, 1], got 2.0"),
        ("topk(0.25->few, 5)", "topk takes the kept share, as in topk(0.01), got (few)"),
        ("int4(0.25->0.01, 5)", "int4 has no ratio that could fall; expected topk or randomk"),
        ("tokp(0.25->0.01, 5)", "unknown codec 'tokp'"),
        ("topk(0.25->0.01, 5)|int5", "unknown codec 'int5'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_spec(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^spec ") as error:
        ratio_warmup(spec)
    assert message in str(error.value)
    assert spec in str(error.value)


def test_a_codec_has_one_ratio() -> None:
    for spec in ("topk(0.25->0.01, 500)", "rotate|topk(0.25->0.01, 500)"):
        with pytest.raises(ValueError, match="expected one ratio here, as in topk"):
            commpress.parse(spec)


def replica() -> DistributedDataParallel:
    return DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)


def trained(gradients: Any, accumulate: int = 1, **options: Any) -> tuple[Trained, dict[str, Any], str]:
    model = replica()
    session = commpress.attach(model, gradients, **options)
    return train(model, range(STEPS), accumulate=accumulate), session.report().to_dict(), str(session.receipt())


def all_of_them() -> tuple[Any, ...]:
    return trained(FALLING, 2), trained(PATTERNS), trained({"*": FALLING}), trained(FALLING, exchange="two_shot")


def test_each_step_is_sent_and_counted_by_its_own_ratio() -> None:
    ranks = run(2, all_of_them)
    one, patterns, alone, by_two_shot = ranks[0]
    for mine, other in zip(*ranks, strict=True):
        assert same(mine[0].parameters, other[0].parameters)
    for (_, report, receipt), share in ((one, 1.0), (patterns, None), (alone, 1.0)):
        sparse = [row for row in report["rows"] if row["spec"].startswith("topk")]
        steps: dict[str, set[int]] = {}
        for row in sparse:
            assert row["sent_bytes"] == row["steps"] * commpress.parse(row["spec"]).nbytes(row["values"])
            steps.setdefault(row["spec"], set()).add(row["steps"])
        assert list(steps) == list(dict.fromkeys(CODECS))
        assert steps["topk(0.02)|int4"] == {3}  # DDP lays its buckets out anew after the first step, so before these
        assert sum(row["steps"] * row["values"] for row in sparse if row["spec"] == CODECS[-1]) <= 3 * 6922
        assert FALLING in receipt
        assert FALLING in report["spec"]
        if share:
            assert sum(row["steps"] * row["values"] for row in report["rows"]) == STEPS * 6922
    exact = "norms, biases and small tensors: none"
    assert list(patterns[1]["rules"]) == ["0.*: int8", f"*: {FALLING}", exact]
    assert list(alone[1]["rules"]) == [f"*: {FALLING}", exact]
    assert {row["exchange"] for row in by_two_shot[1]["rows"] if not row["reason"]} == {"two_shot"}


def interrupted(gradients: Any) -> tuple[Trained, Trained, list[int]]:
    """Eight steps in one go, and two, two and four with restarts between."""
    whole = replica()
    commpress.attach(whole, gradients)
    one, parts, model, state, optimizer = train(whole, range(STEPS)), [], None, None, None
    for steps in (range(2), range(2, 4), range(4, STEPS)):
        before, model = model, replica()
        session, made = commpress.attach(model, gradients), sgd(model)
        if before is not None and optimizer is not None and state is not None:
            model.load_state_dict(before.state_dict())
            made.load_state_dict(optimizer.state_dict())
            session.load_state_dict(state)
        last = train(model, steps, optimizer=made)
        optimizer, state = made, session.state_dict()
        parts.append(state["step"])
    return one, last, parts


@pytest.mark.parametrize("gradients", [FALLING, pytest.param(PATTERNS, marks=pytest.mark.slow)])
def test_it_goes_on_after_restarts(gradients: Any) -> None:
    for whole, resumed, steps in run(2, interrupted, gradients):
        assert same(whole.parameters, resumed.parameters)
        assert steps == [2, 4, 8]


def refusals() -> dict[str, str]:
    model = replica()
    dgc = DGC(model.parameters(), lr=0.1, warmup_steps=5)
    masked = commpress.attach(replica(), FALLING)
    masked.set_masks({"0.weight": torch.ones(64, 32, dtype=torch.bool)})
    return {
        "DGC": outcome(lambda: commpress.attach(model, FALLING, optimizer=dgc)),
        "wrong": outcome(lambda: commpress.attach(model, "topk(0.1->0.5, 5)")),
        "in patterns": outcome(lambda: commpress.attach(model, {"*": "topk(0.1->0.5, 5)"})),
        "hook": outcome(lambda: commpress.hooks.ddp.CommState("topk(0.1->0.5, 5)").buckets(torch.device("cpu"))),
        "buffers": outcome(lambda: commpress.attach(model, "int4", buffers=FALLING)),
    }


def test_refusals_are_errors_on_all_ranks() -> None:
    for got in run(2, refusals):
        assert "topk(0.5->0.02, 5)|int4: DGC does not send gradients as they are; expected one ratio" in got["DGC"]
        assert "which DGC warms up by its warmup_steps" in got["DGC"]
        for where in ("wrong", "in patterns", "hook"):
            assert "expected a first ratio above the last, got 0.1 and 0.5" in got[where]
        assert "expected one ratio here, as in topk(0.01)" in got["buffers"] or "no buffers" in got["buffers"]
