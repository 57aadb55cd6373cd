"""Hook of MkDocs: what the site needs that does not lie in docs/ as it shall be shown.

README, CONTRIBUTING and CHANGELOG become pages. Links from one to the other hold on the site as they do in the repository; one
to a source file becomes its name, since the site has none. A mark `<!-- file: PATH -->` becomes that file as a block of code.
Marks for tests go, and so do the backslashes that GitHub wants before a pipe in a table's code. `commpress.hooks` and
`commpress.launch` are packages of commpress once it is installed: the reference is read from such a copy.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
FILE = re.compile(r"<!-- file: (\S+) -->\n")
MARK = re.compile(r"<!-- (?!file:)\w+: .*? -->\n")
CODE = re.compile(r"`[^`\n]*`")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the sources to build/api/commpress, hooks and launch among them, before mkdocstrings looks for that folder."""
    package = ROOT / "build" / "api" / "commpress"
    shutil.rmtree(package, ignore_errors=True)
    for source, target in (("commpress", package), ("hooks", package / "hooks"), ("launch", package / "launch")):
        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text as MkDocs reads it."""
    source = next((name for name, target in PAGES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")
    lines = MARK.sub("", markdown).split("\n")
    lines = [CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line[:1] == "|" else line for line in lines]
    text = LINK.sub(lambda link: between_pages(link, source), "\n".join(lines))
    return FILE.sub(lambda mark: block_of(ROOT / mark[1]), text)


def block_of(path: Path) -> str:
    """Return a file as a block of code. Raises FileNotFoundError if it is not there."""
    return f"````{'python' if path.suffix == '.py' else 'text'}\n{path.read_text().rstrip()}\n````\n"


def between_pages(link: re.Match[str], source: str) -> str:
    """Return a link of the file `source` of the repository (its path from the root) as one between pages."""
    picture, text, target, anchor = link.group(1, 2, 3, 4)
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    path = (ROOT / source).parent.joinpath(target).resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    if name in PAGES:
        return f"{picture}[{text}]({PAGES[name]}{anchor or ''})"
    if name.startswith("docs/"):
        return f"{picture}[{text}]({name.removeprefix('docs/')}{anchor or ''})"
    return text if path.exists() else link[0]
