"""Rates, delays and shares as people type them."""

from collections.abc import Callable

import pytest

from commpress.launch import units


def test_numbers_as_people_type_them() -> None:
    assert [units.parameters(t) for t in ("7e9", "7b", "7B", "350m", "1.5b", "1000")] == [
        7_000_000_000, 7_000_000_000, 7_000_000_000, 350_000_000, 1_500_000_000, 1000,
    ]  # fmt: skip
    assert [units.rate(t) for t in ("10gbit", "100mbit", "2.5Gbit", "800bit")] == [1e10, 1e8, 2.5e9, 800]
    assert [units.seconds(t) for t in ("0ms", "20ms", "50us", "1s")] == [0, 0.02, pytest.approx(5e-5), 1]
    assert [units.share(t) for t in ("0%", "0.1%", "50%")] == [0, 0.001, 0.5]
    assert [units.bandwidth(b) for b in (1e9, 2.5e9, 1e8, 800)] == ["1 Gbit/s", "2.5 Gbit/s", "100 Mbit/s", "800 bit/s"]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((units.rate, text) for text in ("fast", "0gbit", "10gb")),
        *((units.seconds, text) for text in ("20", "-1s")),
        *((units.share, text) for text in ("100%", "0.1")),
        *((units.parameters, text) for text in ("0", "many")),
    ],
)
def test_what_is_no_number_is_refused_with_the_value(read: Callable[[str], float], text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}': expected"):
        read(text)
