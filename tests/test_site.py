"""The documentation site: links lead somewhere, pages are in the menu, error texts stand on the page that explains them."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch.distributed as dist
from browser import SIZES, Chromium
from commands import started_by_torchrun
from ranks import run
from test_documents import BLOCKS, Block

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
QUICKSTART = next(block for block in BLOCKS if block.file.name == "quickstart.md" and block.kind == "python")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors_of(document: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    for link in re.findall(r"\]\(([^()\s]+)\)", without_code(document.read_text())):
        address = urlsplit(link)
        if address.scheme:
            continue
        target = document.parent / unquote(address.path) if address.path else document
        assert target.exists(), link
        assert not address.fragment or address.fragment in anchors_of(target), link


def test_every_page_is_in_the_sites_menu_once() -> None:
    menu = re.findall(r"(\w+)\.md$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.MULTILINE)
    beside = ["changelog", "contributing", "overview"]
    assert sorted(menu) == sorted([*beside, *(page.stem for page in ROOT.glob("docs/*.md"))])


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of docs/errors.py."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return runpy.run_path(str(ROOT / "docs" / "errors.py"))


def test_every_text_of_an_error_or_a_warning_stands_on_the_page_with_what_to_do(errors: dict[str, Any]) -> None:
    """A new one wants `make docs`; one of a new file wants a section in docs/errors.py."""
    page = errors["PAGE"].read_text()
    assert len(errors["found"](errors["ERRORS"])) > 600
    assert len(errors["found"](errors["WARNINGS"])) > 20
    for called in errors["TABLES"].values():
        found = errors["found"](called)
        for text in found:
            assert text.replace("|", "\\|") in page, f"{text}: run `make docs`"
        assert {errors["anchor"](section) for section in found.values()} <= anchors_of(errors["PAGE"])
    assert page == errors["with_tables"](page), "run `make docs`"


@pytest.mark.parametrize(
    "text",
    [
        "budget.max_mb: … MB cannot be met, the closest of … is … MB",
        "the budget is not met: max_loss …: the loss of … is …, … above the dense model's …",
        "a network lab needs root, for network namespaces",
        "commpress.attach: ZenFlow is not supported",
        "commpress.attach: pipeline parallelism is not supported",
    ],
)
def test_a_text_that_is_made_before_it_is_raised_is_found(errors: dict[str, Any], text: str) -> None:
    """In a name that is raised, a string that a function of this or another file returns, the keys of a table."""
    assert text in errors["found"](errors["ERRORS"])


def test_names_and_calls_in_a_text_are_followed(errors: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(
        """
def missed(x):
    told = f"no room for {x}" if x else ""
    return None, told

def check(x, words):
    for what, is_so in {"a thing of glass": x, "a thing of Wood": not x}.items():
        if is_so:
            raise ValueError(f"{what} does not float")
    found, told = missed(x)
    reasons = [told]
    reasons.append("the door is shut")
    if found is None:
        raise KeyError("; ".join(reasons))
    warn("it rains" + (" and the roof leaks" if x else ""))
    raise TypeError(f"expected other words, got {', '.join(words)}")
"""
    )
    texts = {called: set(errors["texts_in"](tmp_path / "file.py", errors[called])) for called in ("ERRORS", "WARNINGS")}
    things = {"a thing of glass does not float", "a thing of Wood does not float"}
    reasons = {"no room for …", "the door is shut", "expected other words, got …"}
    assert texts == {"ERRORS": things | reasons, "WARNINGS": {"it rains", "it rains and the roof leaks"}}


def started(block: Block, port: int) -> str:
    """What the script prints on this rank, in the environment that torchrun gives it."""
    with started_by_torchrun(port), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block.code, "train.py", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def test_the_quickstart_learns_and_prints_its_report() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out, silence = run(2, started, QUICKSTART, store.port)
    assert not silence
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", out, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < 0.3
    assert "commpress int4: rank 0 of 2, 100 steps" in out
    assert re.search(r"│ all .*│ +7\.8 │", out), out


class Page(HTMLParser):
    """Names that can be jumped to, addresses that are asked for, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.asked: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said: dict[str, Any] = dict(attrs)
        self.names |= {said[key] for key in ("id", "name") if said.get(key)}
        self.asked += [said[key] for key in ("href", "src") if said.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_strictly_and_all_its_internal_links_resolve(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert {path.stem for path in pages} >= {"index", "overview", "api", "troubleshooting"}
    for path, page in pages.items():
        for asked in page.asked:
            address = urlsplit(asked)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.exists(), f"{path.name}: {asked}"
            if address.fragment and target in pages and address.fragment != "__tabbed":
                assert unquote(address.fragment) in pages[target].names, f"{path.name}: {asked}"
    for file in [*ROOT.glob("examples/*.py"), *ROOT.glob("docs/outputs/*.txt")]:
        assert file.read_text().rstrip() in pages[site / "examples.html"].text, file.name


MEASURE = """
new Promise(done => setTimeout(done, 300)).then(() => ({
  width: document.documentElement.clientWidth,
  scroll_width: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_no_page_of_the_site_scrolls_sideways(chromium: Chromium, site: Path, tmp_path: Path, size: str) -> None:
    for name in ("index", "overview", "quickstart", "auto", "measured", "extending"):
        chromium.open(site / f"{name}.html", *SIZES[size])
        found = chromium.evaluate(MEASURE)
        chromium.screenshot(tmp_path / f"{name}-{size}.png", found["width"], found["height"])
        assert found["scroll_width"] <= found["width"] <= SIZES[size][0], name
