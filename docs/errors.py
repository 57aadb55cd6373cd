"""The index of error texts at the end of docs/troubleshooting.md, from the sources: `python docs/errors.py` writes it.

A text is what stands in a call of an exception, or of `require`, with `…` for what is filled in. Where it leads to is the
section of the page that `SECTIONS` names for its file; a file that none names is an error.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- index: begin -->\n", "<!-- index: end -->\n"
SECTIONS = {
    "Specs and settings": (
        *("commpress/comm/codecs", "commpress/comm/auto.py", "commpress/comm/plan.py", "commpress/comm/rules.py"),
        *("commpress/comm/sharded_auto.py", "commpress/comm/exchange", "commpress/comm/verify.py"),
        *(
            "commpress/comm/replicas.py",
            "hooks/broadcast.py",
            "commpress/comm/broadcasts.py",
            "commpress/comm/session.py",
        ),
    ),
    "Ranks differ": ("commpress/comm/agreement.py", "commpress/comm/question.py", "launch/runtime.py"),
    "A lost rank": (
        *("commpress/comm/exchange/wire.py", "commpress/comm/joining.py", "commpress/comm/failure.py"),
        *("commpress/comm/exchange/label.py", "commpress/store.py", "commpress/model/first_rank.py"),
    ),
    "Attaching": (
        *(
            "commpress/__init__.py",
            "commpress/comm/parameters.py",
            "commpress/comm/step_buffer.py",
            "hooks/__init__.py",
        ),
        *("hooks/ddp.py", "hooks/deepspeed", "hooks/fsdp", "hooks/parameters.py", "launch/__init__.py"),
    ),
    "Optimizers": ("commpress/optim",),
    "Outer syncs": ("hooks/outer.py", "commpress/optim/outer.py"),
    "Checkpoints and files": (
        *(
            "commpress/comm/resize.py",
            "commpress/comm/rank_state.py",
            "commpress/comm/feedback.py",
            "commpress/files.py",
        ),
        *("hooks/fsdp/reshard.py", "hooks/rank_checkpoint.py", "launch/checkpoint.py", "launch/run_state.py"),
    ),
    "Trainers": (
        *("hooks/accelerate.py", "hooks/lightning.py", "hooks/transformers.py"),
        *("hooks/eval_batches.py", "hooks/limits.py", "hooks/recipe_traffic.py"),
    ),
    "Recipes": ("commpress/model",),
    "Export": ("commpress/model/stored.py", "commpress/model/export"),
    "Search": ("commpress/model/search", "launch/search.py"),
    "Training program": (
        *(
            "launch/data.py",
            "launch/model.py",
            "launch/identity.py",
            "launch/tasks.py",
            "launch/patterns.py",
            "launch/recipes.py",
            "launch/run_folder.py",
        ),
        *(
            "launch/settings.py",
            "launch/budgets.py",
            "launch/endings.py",
            "launch/recipe_search.py",
            "launch/train.py",
            "launch/command_line.py",
            "launch/scalars.py",
        ),
    ),
    "Other programs": (
        *("launch/demo.py", "launch/explain.py", "launch/lab.py", "launch/link.py", "launch/model_size.py"),
        *("launch/predictions.py", "launch/probe.py", "launch/ray_train.py", "launch/records.py", "launch/report.py"),
        *("launch/units.py", "commpress/comm/meter.py", "commpress/comm/cost.py", "launch/figures.py", "launch"),
    ),
    "Codecs by hand": ("commpress/comm/coding.py", "commpress/comm/collectives.py", "commpress/kernels"),
}
BY_WORDS = {
    "Checkpoints and files": re.compile("cannot restore|damaged|state_dict"),
    "Missing package": re.compile("pip install"),
}
"""Texts whose words say more than their file."""


def literal(node: ast.expr) -> str:
    """Return the text of an expression, `…` for what is not fixed in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return "…"


def fixed(text: str) -> str:
    """Return the longest fixed part of a text."""
    return max((part.strip() for part in text.split("…")), key=len)


def called(function: ast.expr) -> str:
    """Return the last name of what is called; `type` for `type(error)(...)`."""
    if isinstance(function, ast.Call):
        return called(function.func)
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def texts_in(file: Path) -> Iterator[str]:
    """Return the error texts of a file that say something by themselves: six letters or more."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = called(node.func)
        if name.endswith("Error") or name in ("kind", "require", "type"):
            for argument in node.args:
                text = " ".join(literal(argument).split())
                if len(re.findall("[a-z]", fixed(text))) >= 6:
                    yield re.sub("…+", "…", text)


def section_of(file: str, text: str) -> str:
    """Return the section that tells what to do. Raises KeyError for a file that none names."""
    for section, words in BY_WORDS.items():
        if words.search(text):
            return section
    fits = {
        len(start): section
        for section, starts in SECTIONS.items()
        for start in starts
        if file == start or file.startswith(f"{start}/")
    }
    if not fits:
        raise KeyError(f"{file}: no section of docs/errors.py is for it")
    return fits[max(fits)]


@functools.cache
def found() -> dict[str, str]:
    """Return the section of each text of commpress/, hooks/ and launch/."""
    files = [file for folder in ("commpress", "hooks", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
    return {text: section_of(file.relative_to(ROOT).as_posix(), text) for file in files for text in texts_in(file)}


def anchor(section: str) -> str:
    """Return the anchor of a section, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", section.lower()).replace(" ", "-")


def table() -> str:
    """Return the index as a table, sorted by text."""
    rows = ["| section | text |\n|---|---|\n"]
    for text, section in sorted(found().items(), key=lambda row: row[0].lstrip("…: -").lower()):
        quote = "``" if "`" in text else "`"
        code = text.replace("|", "\\|")
        rows.append(f"| [{section}](#{anchor(section)}) | {quote}{code}{quote} |\n")
    return "".join(rows)


def with_index(page: str) -> str:
    """Return the page with the index as the sources have it."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {len(found())} texts\n")
    PAGE.write_text(with_index(PAGE.read_text()))
