"""What the links do, for `auto`: the load of other programs, and the words for all of it."""

import re
from pathlib import Path

import pytest
from ranks import run
from torch.nn.parallel import DistributedDataParallel
from training import network, train

import commpress
from commpress.comm import links
from commpress.comm.link_speed import LinkSpeed
from commpress.comm.links import LinkCounter, Links


def test_the_load_is_what_the_kernel_has_counted_beyond_the_exchange() -> None:
    found = Links().with_load([(5e6, 3e6), None, (4e6, 1e6)], 2e6)
    assert found.load == (3e6, 1e6)
    assert Links().with_load([(1e6, 1e6)], 2e6).load == (0.0, 0.0)
    assert Links().with_load([None, None], 2e6).load is None


def test_a_counter_has_the_bytes_since_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eth7").mkdir()

    def count(sent: int, received: int) -> None:
        (tmp_path / "eth7/tx_bytes").write_text(f"{sent}\n")
        (tmp_path / "eth7/rx_bytes").write_text(f"{received}\n")

    count(1000, 50)
    monkeypatch.setattr(links, "COUNTERS", f"{tmp_path}/{{}}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    counter = LinkCounter()
    count(3000, 150)
    assert counter.sent() == 2000
    rates = counter.rates()
    assert rates is not None
    assert rates[0] == pytest.approx(20 * rates[1])
    counter.start()
    assert counter.sent() == 0
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert LinkCounter().sent() is None
    assert LinkCounter().rates() is None


def test_links_are_told_in_one_line() -> None:
    between, inside = LinkSpeed(2e-4, 118e6, 2**20, 5), LinkSpeed(3e-5, 3.2e9, 2**20, 5)
    told = str(Links(between, inside, (1e6, 0.0)))
    assert told == (
        "links: between hosts 944 Mbit/s each way, 0.2 ms one way; inside a host 3.2 GB/s, 0.03 ms one way; "
        "other traffic in the plain steps 8 Mbit/s out, 0 Mbit/s in\n"
    )
    assert str(Links()) == ""


def explained() -> str:
    model = DistributedDataParallel(network())
    session = commpress.attach(model)
    train(model, range(50))
    return session.explain()


@pytest.mark.slow
def test_explain_says_what_the_links_do() -> None:
    first, second = run(2, explained)
    assert re.search(r"^links: inside a host [\d.]+ GB/s, [\d.e-]+ ms one way$", first, re.MULTILINE)
    assert first == second
