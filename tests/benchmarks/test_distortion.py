"""The picture of errors against bits: its figures are those of theory where there is one, and it is the same each time."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

distortion = pytest.importorskip("distortion", reason="rich is not installed")


def test_a_gradient_is_taken_after_each_of_the_steps() -> None:
    first, second = distortion.gradients((1, 2))
    assert first.numel() == second.numel() > 800_000
    assert not torch.equal(first, second)
    assert 0 < first.square().sum() < 1e4


def test_no_spec_beats_the_bound_on_normal_values() -> None:
    xs = [torch.randn(50_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for spec in distortion.SPECS:
        found = distortion.point(spec, xs)
        assert len(found.errors) == 2
        assert found.error > 2 ** (-2 * found.bits), spec
        assert found.above > 0, spec


def test_one_bit_loses_of_normal_values_what_theory_says() -> None:
    found = distortion.point("sign", [torch.randn(200_000, generator=torch.Generator().manual_seed(0))])
    assert found.error == pytest.approx(1 - 2 / torch.pi, rel=0.01)
    assert found.bits == pytest.approx(1 + 32 / 1024, rel=1e-3)


def test_the_same_points_give_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [distortion.Point("int4", 4.125, (0.02, 0.03)), distortion.Point("topk(0.01)|int4", 0.127, (0.2, 0.3))]
    for name in ("a.svg", "b.svg"):
        distortion.draw(points, "gradients", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    for words in ("int4", "topk(0.01)|int4", "bits a value, R", "relative squared error, lower is better"):
        assert f"<!-- {words} -->" in drawn
