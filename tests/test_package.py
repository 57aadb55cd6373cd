"""What is handed out: a wheel and an sdist that work in an empty environment, and files about the package that agree."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from commands import run_code

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
OURS = {"test", "dev"}
"""Extras of those who work on commpress."""
SOURCES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")),
    *(ROOT / "docs").glob("*.md"),
    *(path for folder in ("commpress", "hooks", "launch", "examples") for path in (ROOT / folder).rglob("*.py")),
    *(ROOT / "launch").glob("*.yaml"),
    *(ROOT / "launch").glob("*.sbatch"),
]


def mentions(text: str) -> set[str]:
    """The extras that a text tells one to install, or whose absence an error names."""
    lists = re.findall(r"(?:\bcommpress|'\.|pip install \.)\[([\w, ]+)\]", text)
    lists += re.findall(r"extras\.missing\([^()]*?, error, [\"'](\w+)[\"']\)", text)
    return {name.strip() for found in lists for name in found.split(",")}


def test_every_extra_that_a_text_or_an_error_names_is_one() -> None:
    found = {path.relative_to(ROOT).as_posix(): mentions(path.read_text()) for path in SOURCES}
    assert {path: names - EXTRAS for path, names in found.items() if names - EXTRAS} == {}
    assert {"launch", "model", "search"} <= set().union(*found.values())


def test_the_readme_has_all_extras() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Install\n")[1].split("\n## ")[0]
    named = mentions(section) | set(re.findall(r"`(\w+)`", section.split("The other extras are")[1].split(". ")[0]))
    assert named - {"Triton"} == EXTRAS - OURS


def test_one_headline_everywhere_and_the_tables_have_its_figures() -> None:
    headline = PROJECT["description"]
    within = f"{headline[0].lower()}{headline[1:]}"
    for page in ("README.md", "docs/index.md"):
        opening = " ".join((ROOT / page).read_text().partition("\n| ")[0].split())
        assert f": {within}" in opening, page
    assert (ROOT / "commpress" / "__init__.py").read_text().splitlines()[0] == f'"""commpress: {within}.'
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["abstract"] == f"{headline}."
    assert f"\nsite_description: {headline}\n" in (ROOT / "mkdocs.yml").read_text()
    told = re.search(r"(\d+) times fewer bytes after a warm-up, at ([\d.]+ %) more loss", headline)
    assert told is not None
    for table in ("README.md", "docs/adam.md"):
        rows = (ROOT / table).read_text().splitlines()
        row = next(line for line in rows if line.startswith(r"| ZeroOneAdamW every 4, `topk(0.1)\|sign` |"))
        cells = [cell.strip() for cell in row.split(" | ")]
        assert f"+{told[2]}" in cells, table
        assert cells[-1].rstrip(" |") == told[1], table


def test_the_oldest_versions_are_the_same_wherever_they_are_told() -> None:
    python = PROJECT["requires-python"].removeprefix(">=")
    torch = next(need.removeprefix("torch>=") for need in PROJECT["dependencies"] if need.startswith("torch>="))
    for name in ("README.md", "docs/quickstart.md"):
        text = (ROOT / name).read_text()
        assert f"Python {python} or newer" in text, name
        assert re.search(rf"(torch|PyTorch) {re.escape(torch)} or newer", text), name
    assert (ROOT / "constraints-oldest.txt").read_text() == f"torch=={torch}.0\n"
    assert f"PYTHON=python{python} " in (ROOT / "Makefile").read_text()


def test_the_citation_is_one_of_cff_1_2_0() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # what the format requires
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


PROGRAM_RUN = """
import runpy, sys
import commpress
assert not [name for name in sys.modules if name.startswith(("commpress.launch", "commpress.hooks"))]
runpy.run_module("commpress", run_name="not the program", alter_sys=True)
assert not [name for name in sys.modules if name.startswith("commpress.launch")]
sys.modules.update(dict.fromkeys(BLOCKED))
sys.argv = ["", "lab", "--help"]
runpy.run_module("commpress", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_python_m_commpress_is_the_command() -> None:
    done = run_code(f"BLOCKED = ()\n{PROGRAM_RUN}")
    assert done.code == 0, done.err
    assert done.out.startswith("usage: commpress lab ")


def test_python_m_commpress_without_the_extra_ends_with_a_sentence_and_nothing_imports_it_before() -> None:
    done = run_code(f"BLOCKED = ('tyro', 'plotly')\n{PROGRAM_RUN}")
    assert done.code == 1
    assert done.err == "error: the commpress command: found no plotly, expected it; pip install 'commpress[launch]'\n"


# --- what is built -----------------------------------------------------------------------------------------------

DATA = (
    "commpress/py.typed",
    "commpress/launch/slurm.sbatch",
    "commpress/launch/kubeflow.yaml",
    "commpress/launch/compose.yaml",
    "commpress/launch/Dockerfile",
)
PROGRAM = """
import importlib.resources as resources
import commpress, torch
for package, name in (("commpress", "py.typed"), ("commpress.launch", "slurm.sbatch"), ("commpress.launch", "kubeflow.yaml")):
    assert resources.files(package).joinpath(name).is_file(), name
x = torch.linspace(-1, 1, 1000)
codec = commpress.parse("int4")
payload = codec.encode(x)
assert payload.numel() == codec.nbytes(1000)
assert (codec.decode(payload, 1000) - x).abs().max() < 0.15
import commpress.hooks.ddp, commpress.optim
print(commpress.__file__)
"""


def call(*words: object, cwd: Path) -> str:
    """Run a program to its end; what it wrote."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of a copy of the tree; the wheel is made of the sdist."""
    pytest.importorskip("build", reason="build is not installed")
    folder = tmp_path_factory.mktemp("built")
    for name in ("commpress", "hooks", "launch"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "tree", cwd=folder)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_have_license_and_data(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert set(DATA) <= set(names)
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "hooks/", "launch/"))]
    with tarfile.open(sdist) as file:
        inside = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "launch/slurm.sbatch", "hooks/ddp.py"} <= inside


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_is_installed_into_an_empty_environment_and_works(
    built: tuple[Path, Path], kind: str, tmp_path: Path
) -> None:
    """What it needs comes from the environment of the tests, by a path, so that nothing large is downloaded."""
    call(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "--no-deps", built[kind == "sdist"], cwd=tmp_path)
    place = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    import torch

    others = {str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")}
    Path(place, "others.pth").write_text("\n".join(sorted(others)) + "\n")
    assert call(python, "-c", PROGRAM, cwd=tmp_path).startswith(place)
    said = call(tmp_path / "empty" / "bin" / "commpress", "--version", cwd=tmp_path)
    assert said.splitlines()[0].split() == ["commpress", PROJECT["version"]]
    assert call(python, "-m", "commpress", "--version", cwd=tmp_path) == said
    tree = built[0].parents[1] / "tree"  # there Python takes the sources, not what is installed
    assert call(python, "-m", "commpress", "--version", cwd=tree) == said
    assert (
        call(python, "-c", "import commpress; print(commpress.hooks.__file__)", cwd=tree)
        == f"{tree}/hooks/__init__.py\n"
    )


@pytest.mark.slow
def test_what_the_wheel_needs_is_found_for_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    """By pip, in the versions of constraints.txt; nothing is installed. torch is the build that these tests run with."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("pip would draw several GB: torch for CUDA")
    (tmp_path / "torch.txt").write_text(f"torch=={torch.__version__}\n")
    call(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    words = ["-m", "pip", "install", "--dry-run", "--only-binary", ":all:", "-c", ROOT / "constraints.txt"]
    command = [tmp_path / "empty" / "bin" / "python", *words, "-c", tmp_path / "torch.txt", f"{built[0]}[launch]"]
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    if "No matching distribution found for torch" in done.stderr:
        pytest.skip(f"no index that pip knows has torch {torch.__version__}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"(\S+)-(\d[^-\s]*)(?=\s|$)", done.stdout.split("Would install ")[1]))
    assert found["commpress"] == PROJECT["version"]
    assert {"torch", "numpy", "numba", "rich", "tyro", "plotly"} <= found.keys()
    pinned = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("numpy", "numba", "rich", "tyro", "plotly"):
        assert found[name] == pinned[name]
    assert not [name for name in found if name.startswith(("nvidia", "triton"))]
