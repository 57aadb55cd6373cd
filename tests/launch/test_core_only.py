"""What a user reads who has installed less than a part needs: which extra to install, and no traceback from a program."""

import pytest
from commands import Ended, run_code

from commpress import extras

EXTRAS = (
    *("tyro", "plotly", "tensorboard", "ray", "torchao", "torch_pruning", "pydantic", "safetensors", "yaml", "tomli"),
    *("optuna", "accelerate", "transformers", "lightning", "deepspeed"),
)
"""What `pip install .` does not install."""
BLOCKED = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n"
PROGRAMS = (
    "train",
    "demo",
    "lab",
    "explain",
    "probe",
    "report",
    "search",
    "export",
    "judge",
    "shrink",
    "ray_train",
    "cli",
    "figures",
)


def core_only(code: str, **environment: str) -> Ended:
    """Run code in a process that has imported nothing of ours and finds no package of an extra."""
    return run_code(BLOCKED + code, **environment)


@pytest.mark.slow
def test_a_program_of_ours_names_the_extra_and_nothing_else() -> None:
    """All in one process, each as `python -m` runs it."""
    code = f"""
import runpy
for name in {PROGRAMS}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"commpress.launch.{{name}}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(name, "|", end.code)
"""
    lines = core_only(code).out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == list(PROGRAMS)
    for line in lines:
        assert f"error: commpress.launch.{line.split()[0]}: found no " in line
        assert "expected it; pip install 'commpress[launch]'" in line or "pip install 'commpress[ray]'" in line


@pytest.mark.parametrize("rank", ["0", "1"])
def test_it_ends_with_1_and_no_traceback(rank: str) -> None:
    code = "import runpy\nsys.argv = ['train', '--help']\nrunpy._run_module_as_main('commpress.launch.train')"
    done = core_only(code, RANK=rank, COMMPRESS_HOST="host B")
    assert done.code == 1
    who = "rank 1 (host B): " if rank == "1" else ""
    said = "commpress.launch.train: found no tyro, expected it; pip install 'commpress[launch]'"
    assert done.err == f"error: {who}{said}\n"


def test_the_console_script_says_the_same() -> None:
    done = core_only("from commpress.launch.cli import main; main()")
    assert done.code == 1
    assert "found no plotly, expected it; pip install 'commpress[launch]'" in done.err
    assert "Traceback" not in done.err


IMPORTS = {
    "commpress.model": "found no pydantic, expected it; pip install 'commpress[model]'",
    "commpress.hooks.transformers": "found no transformers, expected it; pip install 'commpress[transformers]'",
    "commpress.hooks.lightning": "found no lightning, expected it; pip install 'commpress[lightning]'",
    "commpress.launch.train": "found no tyro, expected it; pip install 'commpress[launch]'",
    "commpress.launch.report": "found no plotly, expected it; pip install 'commpress[launch]'",
}


def test_an_import_and_an_attribute_name_the_extra() -> None:
    code = f"""
import commpress
def said(action):
    try:
        action()
    except ModuleNotFoundError as error:
        print(error)
for name in {tuple(IMPORTS)}:
    said(lambda: __import__(name))
    said(lambda: eval(name))
said(lambda: commpress.hooks.deepspeed.initialize())
from commpress.launch import data, model, records, scalars, settings, strategies  # these need none
from commpress.hooks import accelerate, fsdp
"""
    done = core_only(code)
    assert done.code == 0, done.err
    expected = [said for said in IMPORTS.values() for _ in range(2)]
    expected += ["found no deepspeed, expected it; pip install 'commpress[deepspeed]'"]
    lines = [line.split(": ", 1) for line in done.out.splitlines()]
    assert [said for _, said in lines] == expected
    assert all(name.startswith("commpress.") for name, _ in lines)


def test_all_parts_are_there_after_import_commpress_alone() -> None:
    code = """
import commpress
assert {"attach", "hooks", "launch", "model", "optim"} <= set(dir(commpress))
assert {"accelerate", "ddp", "deepspeed", "fsdp", "lightning", "transformers"} <= set(dir(commpress.hooks))
assert {"demo", "train"} <= set(dir(commpress.launch))
print(commpress.hooks.ddp.CommState, commpress.model.Recipe, commpress.launch.train.train, commpress.hooks.fsdp.attach)
print(hasattr(commpress, "nothing"), hasattr(commpress.hooks, "nothing"), hasattr(commpress.launch, "nothing"))
"""
    done = run_code(code)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1] == "False False False"


def test_an_error_of_a_library_is_no_end_of_the_program() -> None:
    error = extras.missing("commpress.model", ModuleNotFoundError("x", name="pydantic.fields"), "model")
    assert str(error) == "commpress.model: found no pydantic, expected it; pip install 'commpress[model]'"
