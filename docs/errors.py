"""The tables of warnings and of error texts in docs/troubleshooting.md, from the sources: `python docs/errors.py` writes them.

Which texts these are, docs/source_texts.py says. Where one leads to is the section of the page that `SECTIONS` names for its
file; a file that none names is an error.
"""

import functools
import re
import sys

from source_texts import ERRORS, ROOT, WARNINGS, texts_in

PAGE = ROOT / "docs" / "troubleshooting.md"
TABLES = {"warnings": WARNINGS, "index": ERRORS}
"""What is called with the texts of a table, by the name of its marks on the page."""
SECTIONS = {
    "Specs and settings": (
        *(
            "commpress/comm/codecs",
            "commpress/comm/auto.py",
            "commpress/comm/choice.py",
            "commpress/comm/plan.py",
            "commpress/comm/ratio_warmup.py",
            "commpress/comm/rules.py",
        ),
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
            "commpress/comm/masks_index.py",
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
            "launch/specs.py",
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
    "Not an error": re.compile("loops are compiled|compiled anew|cache of compiled loops"),
    "Checkpoints and files": re.compile("cannot restore|damaged|state_dict"),
    "Missing package": re.compile("pip install|Install commpress"),
}
"""Texts whose words say more than their file."""


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
def found(called: re.Pattern[str]) -> dict[str, str]:
    """Return the section of each text of commpress/, hooks/ and launch/ in the calls of what has such a name."""
    files = [file for folder in ("commpress", "hooks", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
    return {
        text: section_of(file.relative_to(ROOT).as_posix(), text) for file in files for text in texts_in(file, called)
    }


def anchor(section: str) -> str:
    """Return the anchor of a section, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", section.lower()).replace(" ", "-")


def table(texts: dict[str, str]) -> str:
    """Return texts and their sections as a table, sorted by text."""
    rows = ["| section | text |\n|---|---|\n"]
    for text, section in sorted(texts.items(), key=lambda row: row[0].lstrip("…: -").lower()):
        quote = "``" if "`" in text else "`"
        code = text.replace("|", "\\|")
        rows.append(f"| [{section}](#{anchor(section)}) | {quote}{code}{quote} |\n")
    return "".join(rows)


def with_tables(page: str) -> str:
    """Return the page with the tables as the sources have them."""
    for name, called in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{table(found(called))}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
    counts = ", ".join(f"{name} {len(found(called))}" for name, called in TABLES.items())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {counts}\n")
