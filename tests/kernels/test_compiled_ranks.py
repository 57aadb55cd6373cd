"""The cache of compiled loops, met by ranks that attach. Ranks read NUMBA_CACHE_DIR when commpress is imported: not up here."""

import warnings
from pathlib import Path

import numba
import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch.nn.parallel import DistributedDataParallel
from training import network


def attached(folder: str | None) -> tuple[list[str], list[torch.Tensor]]:
    """Attach and take a step; the warnings, and the gradients. In a fresh process: with the loops that lie in `folder`."""
    if folder is not None:
        numba.config.CACHE_DIR = folder
    import commpress

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = DistributedDataParallel(network())
        commpress.attach(model, "bf16")
        generator = torch.Generator().manual_seed(dist.get_rank())
        model(torch.randn(4, 32, generator=generator)).square().mean().backward()
        gradients = [p.grad for p in model.parameters()]
    said = [str(w.message) for w in caught if "compiled loops" in str(w.message)]
    return said, [g for g in gradients if g is not None]


def compiled(folder: str) -> None:
    """Compile in a fresh process what attaching needs, into `folder`."""
    numba.config.CACHE_DIR = folder
    from commpress.comm.codecs import parse
    from commpress.comm.coding import warm_up
    from commpress.kernels.cpu.fingerprint import fingerprint

    warm_up(parse("bf16"), torch.device("cpu"))
    fingerprint(torch.zeros(5, dtype=torch.float32, device="cpu"))


@pytest.mark.slow
def test_ranks_that_attach_at_once_over_a_damaged_cache_train_as_with_a_whole_one(tmp_path: Path) -> None:
    """Its time goes into compiling: what one rank has made is damaged, two make it anew, and find it."""
    (_, whole), (_, peer) = run(2, attached, None)
    assert all(torch.equal(a, b) for a, b in zip(whole, peer, strict=True))
    run(1, compiled, str(tmp_path), bare=True)
    broken = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(broken) > 4
    for i, path in enumerate(broken):
        path.write_bytes(path.read_bytes()[: i % 3 * path.stat().st_size // 3])
    results = run(2, attached, str(tmp_path), bare=True)
    assert any(said for said, _ in results)
    for said, gradients in results:
        assert len(said) <= 1
        assert all(str(tmp_path) in text for text in said)
        assert all(torch.equal(a, b) for a, b in zip(whole, gradients, strict=True))
    assert [said for said, _ in run(2, attached, str(tmp_path), bare=True)] == [[], []]
