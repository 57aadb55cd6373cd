"""A receipt ends with one line on all that matters of a run, the kernel's count of bytes among it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from ranks import run
from torch.nn.parallel import DistributedDataParallel
from training import network, train

import commpress
from commpress.comm import links
from commpress.comm.choice import Choice, Trial
from commpress.comm.links import link_bytes
from commpress.comm.meter import SPEC_IS_NONE, Report, Row
from commpress.comm.receipt import Receipt, receipt

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


def test_what_the_guard_has_turned_off_is_not_said_not_to_pay() -> None:
    off = replace(GIVEN, spec="none", seconds=0.2, plain_seconds=0.2, cause="the loss was nan under int8")
    assert off.summary.endswith("; compression is off: the loss was nan under int8")
    assert str(off).startswith("commpress: compression is off: the loss was nan under int8: a step takes 0.2000 s")
    assert "not pay" not in str(off)


def of(*rows: Row, choice: Choice | None = None) -> Receipt:
    choices = [] if choice is None else [choice]
    report = Report("a", 0, 2, 10, 0, 0, 0, {}, list(rows), choices=choices)
    return receipt(report, choice, "a", None, None)


def test_what_a_rule_leaves_exact_is_listed_by_the_rule_and_what_auto_tries_is_not() -> None:
    exact = ("float32", "none", "all_reduce", SPEC_IS_NONE)
    biases = Row(0, 100, *exact, rules={"*.bias: none": 60, "*.norm: none": 40, "*: auto": 0}, steps=10)
    tried = Row(0, 500, *exact, rules={"*.bias: none": 0, "*.norm: none": 0, "*: auto": 500}, steps=4)
    small = Row(1, 30, "float32", "none", "all_reduce", "fewer than 256 values", rules={"*: int8": 30}, steps=10)
    found = of(biases, tried, Row(0, 600, *exact, steps=10), small).uncompressed
    assert found == {"*.bias: none": 60, "*.norm: none": 40, "fewer than 256 values": 30}


def test_the_steps_of_a_duel_are_told_beside_those_of_the_search() -> None:
    choice = Choice("int4", 90, [Trial("none", 0.2, 0.2, step=50), Trial("int4", 0.1, 0.12, step=50)])
    choice.trials = choice.with_seconds({"int4": 0.1}, 90)
    found = of(choice=choice)
    assert (found.seconds, found.step, found.plain_seconds, found.plain_step) == (0.1, 90, 0.2, 50)
    assert "(both measured in this run, up to steps 90 and 50): 2.00 times as fast" in str(found)


def test_the_kernel_s_count_is_that_of_the_first_interface_of_gloo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in {"eth7": 12_345, "eth8": 1, "lo": 2}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tx_bytes").write_text(f"{count}\n")
        (tmp_path / name / "rx_bytes").write_text(f"{2 * count}\n")
    monkeypatch.setattr(links, "COUNTERS", f"{tmp_path}/{{}}")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert link_bytes() is None
    for names, count in {"eth7": 12_345, "eth7,eth8": 12_345, "lo": None, "eth9": None, "": None}.items():
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", names)
        assert link_bytes() == count
        assert link_bytes("rx") == (None if count is None else 2 * count)


def counted() -> tuple[Receipt, str]:
    """A session whose ranks speak over loopback, whose count by the kernel it is shown as that of a link."""
    model = DistributedDataParallel(network())
    with (
        mock.patch.object(links, "COUNTERS", links.COUNTERS.format("lo")),
        mock.patch.object(links, "os", SimpleNamespace(environ={"GLOO_SOCKET_IFNAME": "link"})),  # Gloo has no such
    ):
        session = commpress.attach(model, "int4")
        train(model, range(10))
        return session.receipt(), str(session.receipt())


@pytest.mark.skipif(not Path(links.COUNTERS.format("lo")).exists(), reason="this system does not count")
def test_the_receipt_has_the_bytes_that_the_kernel_has_counted_since_the_session_began() -> None:
    for found, said in run(2, counted):
        assert found.link_bytes is not None
        assert found.link_bytes > found.sent_bytes  # headers, both ranks, and all others who use it
        assert re.search(r"; the kernel counted [\d.]+ MB for this host", said)
