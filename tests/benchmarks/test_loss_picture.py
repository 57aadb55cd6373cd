"""The picture of the time to a loss: seconds between validations by a straight line, and only what was measured is drawn."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

labels = pytest.importorskip("labels", reason="matplotlib is not installed")
loss_picture = pytest.importorskip("loss_picture", reason="matplotlib is not installed")


def record(
    folder: Path, rate: str, slowness: float, last: float = 3.0, names: tuple[str, ...] = ("plain DDP", "auto")
) -> Path:
    rows = [
        {
            "name": name,
            "steps": [0, 10, 20],
            "seconds": [0, 10 * each, 20 * each],
            "loss": [5.0, 3.3, last],
            "chosen": "",
        }
        for name, each in zip(names, (slowness, 1.0), strict=False)
    ]
    link = {"hosts": 2, "ranks_per_host": 1, "rate": rate, "delay": "0ms", "loss": "0%", "shaped": True}
    rest = {"machine": "some processor", "torch": "t", "world_size": 2, "model": "GPT", "parameters": 17_000_000}
    path = folder / f"{rate}-{names[0]}-{last}.json"
    path.write_text(json.dumps({"what": "loss by time", "link": link, **rest, "tokens_per_step": 1, "rows": rows}))
    return path


def test_seconds_to_a_loss_lie_between_validations_or_are_not_known() -> None:
    row = {"seconds": [0.0, 10.0, 20.0, 30.0], "loss": [5.0, 3.2, 3.1, 3.3]}
    assert loss_picture.seconds_to(row, 3.15) == pytest.approx(15.0)
    assert loss_picture.seconds_to(row, 3.2) == pytest.approx(10.0)
    assert loss_picture.seconds_to(row, 3.0) is None


def test_records_of_one_link_are_put_together_and_a_way_that_never_got_there_is_left_out(tmp_path: Path) -> None:
    cut = record(tmp_path, "100mbit", 4.0, last=3.2)
    long = record(tmp_path, "100mbit", 8.0, names=("plain DDP",))
    longer = json.loads(long.read_text())  # it counts, though it was slower than the other
    for key, value in (("steps", 30), ("seconds", 240), ("loss", 2.9)):
        longer["rows"][0][key].append(value)
    long.write_text(json.dumps(longer))
    links = loss_picture.by_link([record(tmp_path, "1gbit", 2.0), cut, long])
    assert list(links) == [1e8, 1e9]
    assert links[1e8] == {"plain DDP": pytest.approx(120.0), "auto": None}
    assert links[1e9] == {"plain DDP": pytest.approx(30.0), "auto": pytest.approx(15.0)}


def test_the_picture_says_what_it_found_and_is_the_same_each_time(tmp_path: Path) -> None:
    files = [record(tmp_path, "1gbit", 2.0), record(tmp_path, "100mbit", 8.0)]
    for name, order in (("a.svg", files), ("b.svg", files[::-1])):
        loss_picture.draw(order, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    for words in ("8.0x at 100 Mbit/s, 2.0x at 1 Gbit/s", "plain DDP, 120 s", "auto, 15 s", "seconds, lower is better"):
        assert f"<!-- {words} -->" in drawn
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"what": "losses"}))
    with pytest.raises(ValueError, match=r"other\.json: expected a record of benchmarks/time_to_loss\.py"):
        loss_picture.draw([other], tmp_path / "c.svg")


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    assert labels.apart([10.0, 50.0, 11.0], 15.0) == pytest.approx([3.0, 50.0, 18.0])
    assert labels.apart([0.0, 5.0, 10.0], 5.0) == pytest.approx([0.0, 5.0, 10.0])
    found = labels.apart([0.0, 1.0, 2.0, 3.0], 4.0)
    assert found == sorted(found)
    assert sum(found) / 4 == pytest.approx(1.5)
