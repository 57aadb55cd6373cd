"""Every block of code in README.md, CONTRIBUTING.md and docs/*.md does what it says.

A Python block runs on two ranks, each a process of its own that has imported nothing of ours, after the smallest prelude that
the text around it promises. Which one, an HTML comment above the block says:

    <!-- test: prelude=NAME -->             one of PRELUDES
    <!-- test: prelude=NAME then=train -->  and the training loop of the prelude runs afterwards
    <!-- test: prelude=NAME after=1 -->     after the block before it, or the one so many before it
    <!-- test: by=FILE -->                  another test runs it

A line `...` stands for that loop. The commands of bash blocks are parsed by the programs that they call. TOML blocks are read
as recipes or specs by pattern.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import run_code, run_command
from ranks import run
from test_package import PROJECT
from tiers import slowly

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- test: (?P<test>[^>]*) -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)```", re.DOTALL)
SCRIPT = """
import commpress
import torch
from torch.nn.parallel import DistributedDataParallel

net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
x, y = torch.randn(16, 32), torch.randint(10, (16,))


def train(steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped()(x), y).backward()
        optimizer.step()


def wrapped():
    return globals().get("ddp", globals().get("model"))
"""
# where no compiler is: docs/deepspeed.md, "Start"
DEEPSPEED = "import deepspeed\ndeepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
OPTIMIZER = "\noptimizer = torch.optim.AdamW(net.parameters())\n"
PRELUDES = {
    "model": SCRIPT + "model = net" + OPTIMIZER,
    "ddp": SCRIPT + "model = ddp = DistributedDataParallel(net)" + OPTIMIZER,
    "session": SCRIPT + "model = DistributedDataParallel(net)\nsession = commpress.attach(model, 'int4')" + OPTIMIZER,
    "checkpoint": SCRIPT
    + "model = DistributedDataParallel(net)\nsession = commpress.attach(model, 'int4')\nfolder = '../checkpoint'"
    + OPTIMIZER,
    "fsdp": SCRIPT + "from torch.distributed.fsdp import fully_shard\nmodel = fully_shard(net)" + OPTIMIZER,
    "buffers": SCRIPT + "model = net\nddp = DistributedDataParallel(net)" + OPTIMIZER,
    "gpt": SCRIPT + "GPT = lambda _: net\n",
    "vector": "import commpress\nimport torch\nx = torch.randn(1000)\n",
    "recipe": SCRIPT
    + "import copy\nfrom torch.nn.functional import cross_entropy\nmodel, teacher = net, copy.deepcopy(net).eval()\n"
    + "batches = [(x, y)] * 3"
    + OPTIMIZER,
    "search": SCRIPT
    + "from torch import nn\nfrom torch.nn.functional import cross_entropy\nbatches = [(x, y)] * 3\n"
    + "network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 10)))\n"
    + "def accuracy(model):\n    return (model(x).argmax(1) == y).float().mean().item()\n",
    "deepspeed": DEEPSPEED,
    "deepspeed-recipe": SCRIPT
    + DEEPSPEED
    + "import copy\nfrom torch.nn.functional import cross_entropy\nmodel, teacher = net, copy.deepcopy(net).eval()\n"
    + "deepspeed.init_distributed()\nbatches = [(x, y)] * 12\n"
    + "config = {'train_micro_batch_size_per_gpu': 16, 'zero_optimization': {'stage': 2},\n"
    + "    'zero_allow_untested_optimizer': True}"
    + OPTIMIZER,
}


@dataclass(frozen=True)
class Block:
    file: Path
    line: int
    kind: str
    code: str
    test: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks_of(file: Path) -> list[Block]:
    text = file.read_text()
    found = []
    for match in FENCE.finditer(text):
        line = text[: match.start("kind")].count("\n") + 1
        said = dict(word.split("=") for word in (match["test"] or "").split())
        found.append(Block(file, line, match["kind"], match["code"], said))
    return found


BLOCKS = [block for file in FILES for block in blocks_of(file)]
PYTHON = [block for block in BLOCKS if block.kind == "python"]
BASH = [block for block in BLOCKS if block.kind == "bash"]
TOML = [block for block in BLOCKS if block.kind == "toml"]


def by_prelude() -> list[Any]:
    """The blocks to run. Those that begin as another does are slow, and so is DeepSpeed, which takes long to import."""
    blocks = [block for block in PYTHON if "prelude" in block.test]
    first = {block.test["prelude"]: block for block in reversed(blocks)}
    return slowly(blocks, quick=[block for prelude, block in first.items() if not prelude.startswith("deepspeed")])


def execute(sources: list[str], folder: Path) -> dict[str, Any]:
    """Run sources in this process, one after another, in a folder of its own; what they left, by type."""
    place = folder / os.environ.setdefault("RANK", str(_rank()))
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    place.mkdir()
    os.chdir(place)
    for file in folder.glob("*.toml"):
        (place / file.name).write_text(file.read_text())
    assert not [name for name in sys.modules if name.split(".")[0] == "commpress"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, "<block>", "exec"), names)
    return {name: type(value).__name__ for name, value in names.items()}


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def in_full(block: Block) -> str:
    """The code, with the training loop where it says `...`."""
    code = re.sub(r"^( *)\.\.\.(?=\s|$)", r"\1train()", block.code, flags=re.MULTILINE)
    return code + ("\ntrain()\n" if block.test.get("then") == "train" else "")


def run_fresh(sources: list[str], folder: Path) -> list[dict[str, Any]]:
    # the store in rank 0's process stays until all are done
    return run(2, execute, sources, folder, bare=True, timeout=100)


def test_every_block_is_tested_or_says_by_whom() -> None:
    assert len(PYTHON) >= 18
    assert len(BASH) >= 9
    assert len(TOML) >= 6
    assert {block.kind for block in BLOCKS} == {"python", "bash", "toml"}
    for block in PYTHON:
        assert block.test.keys() & {"prelude", "by"}, f"{block.name}: no `<!-- test: ... -->` above it"
        compile(block.code, block.name, "exec")
        if "by" in block.test:
            other = (ROOT / block.test["by"]).read_text()
            assert "exec(compile(block" in other, f"{block.name}: {block.test['by']} runs no blocks"


@pytest.mark.parametrize("block", by_prelude(), ids=lambda block: block.name)
def test_a_python_block_runs_on_two_ranks_of_its_own(block: Block, tmp_path: Path) -> None:
    if block.test["prelude"].startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    if block.test["prelude"] == "recipe":
        toml = next(b for b in BLOCKS if b.file == block.file and b.kind == "toml")
        (tmp_path / "recipe.toml").write_text(toml.code)
    before = []
    if "after" in block.test:
        others = [b for b in PYTHON if b.file == block.file]
        before = [in_full(others[others.index(block) - int(block.test["after"])])]
    for names in run_fresh([PRELUDES[block.test["prelude"]], *before, in_full(block)], tmp_path):
        assert names["commpress" if block.test["prelude"] != "deepspeed" else "engine"]


def test_the_hook_registers_by_hand_as_the_page_on_specs_says(tmp_path: Path) -> None:
    """After `import commpress` alone."""
    line = re.search(r"`(ddp\.register_comm_hook\(.*?)`", (ROOT / "docs" / "choosing.md").read_text())
    assert line is not None
    run_fresh([PRELUDES["ddp"], line[1], "train()"], tmp_path)


@pytest.mark.slow
def test_every_name_of_ours_is_there_after_import_commpress() -> None:
    """Whatever stands as commpress.x.y in the documents, in a process without anything of ours.

    Behind `:::` stands where the source of a name is; the site is not built if it is not there (tests/test_site.py).
    """
    text = re.sub(r"^::: .*$", "", "\n".join(file.read_text() for file in FILES), flags=re.MULTILINE)
    found = set(re.findall(r"(?<![\w./-])commpress(?:\.[a-zA-Z_]\w*)+", text))
    names = sorted(name for name in found if not name.endswith((".json", ".py", ".md")))
    assert {"commpress.hooks.ddp.CommState", "commpress.model.masks.Masks", "commpress.Report.merge"} <= set(names)
    names = [name for name in names if not name.endswith("ray_train")]  # Ray is not among the tests' packages
    code = "import commpress, operator\n" + "".join(
        f"operator.attrgetter({name.split('.', 1)[1]!r})(commpress)\n" for name in names
    )
    done = run_code(code)
    assert done.code == 0, done.err


# --- TOML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", TOML, ids=lambda block: block.name)
def test_a_toml_block_is_a_recipe_or_specs_by_pattern(block: Block, tmp_path: Path) -> None:
    from commpress.launch import patterns
    from commpress.launch.model import Shape
    from commpress.model import Recipe

    path = tmp_path / "file.toml"
    path.write_text(block.code)
    if re.match(r"(#.*\n)*\[", block.code):  # tables, where patterns are keys with a text
        assert Recipe.load(path).to_dict()
    else:
        table = patterns.table_of(patterns.text_of(str(path)))
        assert table
        patterns.require_fit(table, Shape(layers=2, width=32, heads=2, context=16))


# --- bash --------------------------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def arguments_after(words: list[str], *start: str) -> list[str]:
    for i in range(len(words)):
        if tuple(words[i : i + len(start)]) == start:
            return words[i + len(start) :]
    raise AssertionError(f"{' '.join(words)}: no {' '.join(start)} in it")


def settings_of(words: list[str]) -> Any:
    """What the flags of the training program say, or None if the command is none of its."""
    from commpress.launch import train

    if "commpress.launch.train" not in words:
        return None
    return settings_from(arguments_after(words, "commpress.launch.train"), train)


def settings_from(flags: list[str], train: Any) -> Any:
    from commpress.launch import command_line, recipes

    settings = command_line.read(train.Train, "train", flags).settings
    train.check(settings)
    return settings if settings.recipe else recipes.with_specs(settings)


def require_known(words: list[str]) -> None:
    """A command that a reader can type: its program, files, targets, extras and flags exist."""
    from commpress.launch import command_line
    from commpress.launch.demo import Demo
    from commpress.launch.explain import Explain
    from commpress.launch.export import Export
    from commpress.launch.judge import Judge
    from commpress.launch.lab import Lab
    from commpress.launch.probe import Probe
    from commpress.launch.report import Report
    from commpress.launch.search import Search
    from commpress.launch.shrink import Shrink
    from commpress.launch.train import Train

    match words:
        case ["make", target]:
            target = {".venv/installed": r"\$\(INSTALLED\)"}.get(target, target)
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        case ["source", ".venv/bin/activate"]:
            assert "\nVENV := .venv\n" in (ROOT / "Makefile").read_text()
        case ["pip", "install", what]:
            name, _, extra = what.rstrip("]").partition("[")
            if name == ".":
                assert not extra or extra in PROJECT["optional-dependencies"], words
            else:
                ours = [need for needs in PROJECT["optional-dependencies"].values() for need in needs]
                assert any(need.startswith(name.split("==")[0]) for need in ours), words
                assert any(name.split("==")[1] in need for need in ours), words
        case ["commpress", command, *flags]:
            programs = {"train": Train, "demo": Demo, "report": Report, "lab": Lab, "explain": Explain, "probe": Probe}
            programs |= {"search": Search, "export": Export, "judge": Judge, "shrink": Shrink}
            assert command in programs, words
            command_line.read(programs[command], command, list(flags))
        case ["torchrun", *_] if "commpress.launch.probe" in words:
            command_line.read(Probe, "probe", arguments_after(words, "commpress.launch.probe"))
        case ["torchrun", *_] if "commpress.launch.shrink" in words:
            command_line.read(Shrink, "shrink", arguments_after(words, "commpress.launch.shrink"))
        case ["torchrun", *_] if "commpress.launch.search" in words:
            command_line.read(Search, "search", arguments_after(words, "commpress.launch.search"))
        case ["torchrun", *_, script] if script.startswith("examples/"):
            assert (ROOT / script).is_file(), words
        case ["torchrun" | "deepspeed", *_]:
            if settings_of(words) is None:
                assert words[-1] == "train.py", words  # the block above it
        case ["pytest", *_]:
            paths = [word for word in words[1:] if word.startswith("tests/") and "NAME" not in word]
            assert all((ROOT / path).exists() for path in paths), words
        case ["pip", "uninstall", "commpress"]:
            pass
        case ["export", assignment]:
            assert re.fullmatch(r"[A-Z_]+_SOCKET_IFNAME=\w+", assignment), words
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        case _:
            raise AssertionError(f"{' '.join(words)}: this test does not know such a command")


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.name)
def test_the_commands_of_a_bash_block_exist(block: Block) -> None:
    assert commands_of(block)
    for words in commands_of(block):
        require_known(words)


def trained(by_command: list[dict[str, Any]]) -> None:
    from commpress.launch import train

    for settings in by_command:
        assert train.train(train.Settings(**settings))


def test_the_commands_of_the_page_on_training_train(tmp_path: Path) -> None:
    """As they stand there, one after another, but with a small model, few steps and little text."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    small = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "warmup_steps": 1, "threads": 1}
    small |= {"data": tmp_path / "text", "out": tmp_path / "run"}
    block = next(b for b in BASH if b.file.name == "train.md" and "--resume" in b.code)
    found = [settings for words in commands_of(block) if (settings := settings_of(words))]
    assert [settings.resume for settings in found] == [False, True]
    run(2, trained, [{**vars(settings), **small, "steps": 2 + i} for i, settings in enumerate(found)])


def test_the_prediction_of_the_page_on_training_prints() -> None:
    block = next(b for b in BASH if b.file.name == "train.md" and "commpress explain" in b.code)
    (words,) = commands_of(block)
    assert words[0] == "commpress"
    done = run_command(*words[1:])
    assert done.code == 0, done.err
    assert "int4" in done.out


@pytest.mark.slow
def test_every_program_has_help() -> None:
    """`python -m commpress.launch.NAME --help`, all in one process."""
    programs = ("cli", "demo", "explain", "export", "lab", "probe", "report", "search", "train")
    code = f"""
import runpy, sys
for name in {programs}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"commpress.launch.{{name}}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("ended", end.code)
"""
    done = run_code(code)
    assert done.code == 0, done.err
    assert done.out.count("ended 0") == done.out.count("usage:") == len(programs)
