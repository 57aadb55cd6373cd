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
from commpress.comm.links import link_bytes
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
    for receipt, said in run(2, counted):
        assert receipt.link_bytes is not None
        assert receipt.link_bytes > receipt.sent_bytes  # headers, both ranks, and all others who use it
        assert re.search(r"; the kernel counted [\d.]+ MB for this host", said)
