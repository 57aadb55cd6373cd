"""A receipt ends with one line on all that matters of a run."""

from dataclasses import replace

from commpress.comm.receipt import Receipt

GIVEN = Receipt("int4", 100, 1e6, 8e6, 4e6)
BYTES = "sent 1.000 MB a step, mean of 100 steps: a dense exchange in float32 sends 8.0x of that, in bfloat16 4.0x"


def test_of_a_spec_that_was_given_the_line_is_all() -> None:
    assert str(GIVEN) == GIVEN.summary
    assert GIVEN.summary.startswith(f"commpress int4: {BYTES}; steps without compression were not measured")


def test_the_last_line_says_how_fast_where_that_was_measured() -> None:
    measured = replace(GIVEN, seconds=0.1, plain_seconds=0.2, uncompressed={"fewer than 256 values": 10})
    lines = str(measured).splitlines()
    assert lines[-1] == f"commpress int4: {BYTES}; 2.00 times as fast as without compression"
    assert lines[0].startswith("commpress int4: a step takes 0.1000 s, without compression 0.2000 s")
    assert lines[1:-1] == ["not compressed: 10 values a step, fewer than 256 values"]


def test_beside_a_spec_of_its_own_for_parameters_plain_is_not_called_so() -> None:
    assert "without compression" not in str(replace(GIVEN, seconds=0.1, plain_seconds=0.2, whole=False))


def test_where_compression_is_off_the_last_line_says_so() -> None:
    off = replace(GIVEN, spec="none", seconds=0.2, plain_seconds=0.2)
    assert off.summary.endswith("; compression does not pay here, it is off")
