"""The examples that people copy: each runs on two ranks, learns, and sends less; without its marked lines it is plain torch."""

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import started_by_torchrun
from ranks import run
from tiers import slowly

BY_COMMANDS = ("search", "shrink")
"""The examples that send nothing by themselves: the tests of their commands run them."""
EXAMPLES = sorted(p for p in Path(__file__).parents[1].joinpath("examples").glob("*.py") if p.stem not in BY_COMMANDS)
RUNNER = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "run_examples.py"))
FEWER = {"ddp": 7, "fsdp": 4, "diloco": 200, "one_bit_adam": 3, "recipe": 8, "bert": 7}
"""How many times fewer bytes each sends, at least."""


def started(path: Path, port: int, folder: Path, *arguments: str) -> str:
    """What an example prints on this rank, started with the environment that torchrun gives it."""
    os.chdir(folder)
    sys.argv = [str(path), *arguments]
    with started_by_torchrun(port), contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue()


def ratio_in(out: str) -> float:
    """The ratio of all bytes, in the last line of a report's table."""
    head = next(line for line in out.splitlines() if "┃" in line and "ratio" in line)
    column = [cell.strip() for cell in head.split("┃")].index("ratio")
    return float([line for line in out.splitlines() if line.startswith("│ all ")][-1].split("│")[column])


def stored(name: str) -> str:
    """What the page on the examples shows as the output of one."""
    return (RUNNER["OUTPUTS"] / f"{name}.txt").read_text()  # type: ignore[no-any-return]


def losses_in(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", out, re.MULTILINE)]


def bytes_in(out: str) -> list[list[str]]:
    """The cells of a report's table up to the ratio, and how it was sent: all but milliseconds, without where lines break."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line[:1] == "│"]
    whole: list[list[str]] = []
    for row in rows:
        if any(row[1:5]) or not whole:
            whole.append(row)
        else:
            whole[-1] = [f"{above} {below}".strip() for above, below in zip(whole[-1], row, strict=True)]
    return [[*row[:5], re.sub(r"[\d.]+ ms", "ms", row[-1])] for row in whole]


def without_numbers(out: str) -> list[str]:
    """The lines of a program, but for what depends on how busy the machine is."""
    lines = [" ".join(re.sub(r"[-+]?\d[\d,.]*", "#", line).split()) for line in out.splitlines()]
    return [re.sub("faster|slower", "as fast", line) for line in lines if "had other work" not in line]


def test_the_page_on_the_examples_has_them_all() -> None:
    names = sorted(path.stem for path in Path(__file__).parents[1].glob("examples/*.py"))
    assert sorted(RUNNER["commands"]()) == names
    assert sorted(path.stem for path in RUNNER["OUTPUTS"].iterdir()) == names
    page = RUNNER["PAGE"].read_text()
    for name in names:
        assert (
            page.count(f"<!-- file: examples/{name}.py -->")
            == page.count(f"<!-- file: docs/outputs/{name}.txt -->")
            == 1
        )
        words = " ".join(RUNNER["commands"]()[name].replace("\\\n", "").split())
        assert f"    {words}" in page_of(name), name


def page_of(name: str) -> str:
    """What an example says of itself."""
    return (Path(__file__).parents[1] / "examples" / f"{name}.py").read_text().split('"""')[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_COMMANDS)
def test_a_command_on_an_example_prints_what_its_page_shows(name: str) -> None:
    assert without_numbers(RUNNER["printed"](RUNNER["commands"]()[name])) == without_numbers(stored(name))


def test_each_example_says_how_many_times_fewer_bytes_it_sends() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(FEWER)


@pytest.mark.usefixtures("ranks_of_our_own")
@pytest.mark.parametrize("name", slowly(FEWER, quick=("ddp",)))
def test_each_example_learns_and_sends_less(name: str, tmp_path: Path) -> None:
    path = next(path for path in EXAMPLES if path.stem == name)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out, silence = run(2, started, path, store.port, tmp_path, timeout=240)
    assert not silence  # rank 0 alone speaks
    losses = losses_in(out)
    if sys.version_info[:2] == (3, 11):  # the text is Python's own library, of which each version has another
        assert losses == pytest.approx(losses_in(stored(name)), abs=0.2)
    assert bytes_in(out) == bytes_in(stored(name))
    assert len(losses) == 5, out
    assert losses[-1] < losses[0] - 0.3, out
    assert losses[-1] < 3.2, out
    assert ratio_in(out) >= FEWER[name], out
    assert re.fullmatch(r"commpress .+: sent [\d.]+ MB a step, mean of \d+ steps: .+", out.splitlines()[-1]), out
    if name == "recipe":
        assert (tmp_path / "small.safetensors").stat().st_size < 150_000  # of 820 KB in float32


@pytest.mark.slow
@pytest.mark.usefixtures("ranks_of_our_own")
def test_bert_takes_a_checkpoint_of_the_users_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        [Path(__file__).read_text()], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=made, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "own")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=made.get_vocab_size(), **shape)).save_pretrained(tmp_path / "own")
    path = next(path for path in EXAMPLES if path.stem == "bert")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out, _ = run(2, started, path, store.port, tmp_path, str(tmp_path / "own"), timeout=240)
    assert len(re.findall(r"^step \d+: loss", out, re.MULTILINE)) == 5
    assert (tmp_path / "student.safetensors").exists()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_lines_of_ours_are_marked_and_few(path: Path) -> None:
    lines = path.read_text().split('"""', 2)[2].splitlines()
    ours = [line for line in lines if "# commpress" in line]
    assert not [line for line in lines if "commpress" in line and line not in ours]
    assert 3 <= len(ours) <= 12
    assert 40 <= len(path.read_text().splitlines()) <= 80
