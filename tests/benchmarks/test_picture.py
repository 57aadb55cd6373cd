"""The picture of the step times: the same records give the same bytes, and others are refused by name."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

picture = pytest.importorskip("picture", reason="matplotlib is not installed")

ROWS = {"no communication": 0.0, "plain DDP": 32.0, "powersgd(4)": 0.3, "int8": 8.0, "int4": 4.0, "sign": 1.0}


def record(folder: Path, name: str, rate: str, megabits: float, delay: str = "0ms") -> Path:
    rows = [
        {"name": row, "kind": "torch", "seconds": 0.2, "quartiles": [0.2, 0.2, 0.2], "tokens_per_second": 1.0}
        | {"ratio": 1 + 20 * bits / megabits, "error": ""}
        for row, bits in ROWS.items()
    ]
    link = {"hosts": 2, "ranks_per_host": 1, "rate": rate, "delay": delay, "loss": "0%", "shaped": True}
    rest = {"machine": "m", "torch": "t", "world_size": 2, "model": "GPT", "parameters": 1, "tokens_per_step": 1}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"what": "step times", "link": link, **rest, "steps": 1, "rows": rows}))
    return path


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    slow, fast = record(tmp_path, "slow", "100mbit", 100.0), record(tmp_path, "fast", "1gbit", 1000.0)
    for out, files in (("a.svg", [slow, fast]), ("b.svg", [fast, slow])):
        picture.draw(picture.by_rate(files), tmp_path / out)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    named = ("plain DDP, 7.4x", "powersgd(4), 1.1x", "int8, 2.6x", "int4, 1.8x")
    for words in (*named, "100 Mbit/s", "1 Gbit/s", "no communication = 1", "step time, lower is better"):
        assert f"<!-- {words} -->" in drawn
    assert "<!-- sign" not in drawn
    assert "At 100 Mbit/s a step takes" in drawn
    assert "7.4x by plain DDP, 1.8x by int4" in drawn


def test_a_record_of_other_links_is_refused_by_name(tmp_path: Path) -> None:
    slow, late = record(tmp_path, "slow", "100mbit", 100.0), record(tmp_path, "late", "1gbit", 1000.0, "20ms")
    with pytest.raises(ValueError, match=r"late\.json: expected the model and the links of .*slow\.json but for the"):
        picture.by_rate([slow, late])
