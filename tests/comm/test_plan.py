"""Which bucket gets which codec and exchange, and what the reason says if none."""

import pytest

from commpress.comm.codecs import parse
from commpress.comm.exchange import EXCHANGES
from commpress.comm.plan import FEWEST_VALUES, Plan

SPECS = ("none", "bf16", "fp16", "int8", "int4", "sign", "topk(0.01)", "topk(0.1)|int4", "randomk(0.1)")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_the_codecs_own_exchange_if_none_is_named(spec: str, world_size: int) -> None:
    """Two ranks that would use two_shot use one_shot: as many bytes, one step fewer."""
    plan = Plan.of(spec)
    assert plan.codec == parse(spec)
    assert plan.error_feedback
    own = plan.codec.exchange
    expected = "one_shot" if own == "two_shot" and world_size == 2 else own
    assert plan.choose(100_000, 4, world_size).exchange.name == expected


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_a_named_exchange_is_taken_if_it_fits(spec: str, exchange: str) -> None:
    if not EXCHANGES[exchange].flat:
        with pytest.raises(ValueError, match=f"exchange='{exchange}'.* needs .*leave exchange out"):
            Plan.of(spec, exchange)
    elif EXCHANGES[exchange].linear and not parse(spec).linear:
        with pytest.raises(ValueError, match=r"cannot be summed.*all_reduce") as caught:
            Plan.of(spec, exchange)
        assert spec in str(caught.value)
    else:
        assert Plan.of(spec, exchange).choose(100_000, 4, 3).exchange is EXCHANGES[exchange]


def test_an_unknown_exchange_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown exchange 'ring', known: all_reduce, two_shot, one_shot"):
        Plan.of("int4", "ring")


def test_a_codec_or_a_spec() -> None:
    assert Plan.of(parse("int4")) == Plan.of("int4")
    with pytest.raises(ValueError, match="int5"):
        Plan.of("int5")
    with pytest.raises(TypeError, match="int"):
        Plan.of(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [1, 1000, 100_000])
def test_one_rank_sends_nothing(spec: str, n: int) -> None:
    choice = Plan.of(spec).choose(n, 4, 1)
    assert choice.reason == "one rank: nothing to send"
    assert not choice.codec.lossy
    assert not choice.feedback


def test_none_says_so() -> None:
    choice = Plan.of("none", "two_shot").choose(100_000, 4, 2)
    assert (str(choice.codec), choice.exchange.name, choice.reason) == ("none", "two_shot", "spec is none")
    assert not choice.feedback


@pytest.mark.parametrize("spec", SPECS[1:])
def test_a_tiny_bucket_travels_dense(spec: str) -> None:
    below, enough = (Plan.of(spec).choose(n, 4, 2) for n in (FEWEST_VALUES - 1, FEWEST_VALUES))
    assert (str(below.codec), below.exchange.name, below.feedback) == ("none", "all_reduce", False)
    assert below.reason == "fewer than 256 values"
    assert (enough.codec, enough.reason, enough.feedback) == (parse(spec), "", True)


@pytest.mark.parametrize(("spec", "itemsize", "dense"), [
    ("bf16", 2, True), ("fp16", 2, True), ("bf16", 4, False), ("topk(1)", 4, True), ("topk(0.5)", 2, True),
    ("topk(0.5)", 4, False), ("int8", 2, False), ("topk(1)", 8, False),
])  # fmt: skip
def test_a_payload_that_would_not_be_smaller_is_not_sent(spec: str, itemsize: int, dense: bool) -> None:
    choice = Plan.of(spec).choose(10_000, itemsize, 2)
    assert (parse(spec).nbytes(10_000) >= 10_000 * itemsize) == dense
    assert str(choice.codec) == ("none" if dense else spec)
    assert choice.reason == (f"payload would be no smaller than {itemsize} bytes a value" if dense else "")


@pytest.mark.parametrize(("spec", "exchange", "n", "sent"), [
    ("bf16", "two_shot", 10_000, True), ("bf16", "two_shot", 10_001, True), ("fp16", "one_shot", 10_000, True),
    ("bf16", "all_reduce", 10_000, False), ("topk(0.5)", "one_shot", 10_000, False),
])  # fmt: skip
def test_a_named_exchange_that_sums_in_float32_carries_as_many_bytes_as_the_gradients(
    spec: str, exchange: str, n: int, sent: bool
) -> None:
    choice = Plan.of(spec, exchange).choose(n, 2, 4)
    assert (str(choice.codec), choice.exchange.name) == ((spec, exchange) if sent else ("none", "all_reduce"))
    assert bool(choice.reason) != sent


def test_feedback_can_be_left_out() -> None:
    assert not Plan.of("int4", error_feedback=False).choose(10_000, 4, 2).feedback


def test_settings_are_plain_values_that_differ_where_plans_do() -> None:
    plans = [Plan.of("int4"), Plan.of("int8"), Plan.of("int4", "one_shot"), Plan.of("int4", error_feedback=False)]
    settings = [plan.settings() for plan in plans]
    assert settings[0] == {"codec": "int4", "exchange": None, "error_feedback": True}
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])
