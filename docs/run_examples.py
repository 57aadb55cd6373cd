"""What the examples print, kept for their page: `python docs/run_examples.py [NAME ...]` writes docs/outputs/NAME.txt.

The command of an example is the one that docs/examples.md has for it. It is run as it stands there, in a folder of its own
that holds a link to examples/, so that nothing it leaves behind gets into the repository. Kept is its standard output.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "examples.md"
OUTPUTS = ROOT / "docs" / "outputs"
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
NAME = re.compile(r"examples[./](\w+)")


def commands() -> dict[str, str]:
    """Return the command of each example, by the name of its file without `.py`."""
    blocks = BLOCK.findall(PAGE.read_text())
    return {found[1]: block for block in blocks if (found := NAME.search(block))}


def printed(command: str) -> str:
    """Return what a command writes to its standard output. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "examples").symlink_to(ROOT / "examples")
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


if __name__ == "__main__":
    for name, command in commands().items():
        if name in (sys.argv[1:] or commands()):
            (OUTPUTS / f"{name}.txt").write_text(printed(command))
            sys.stdout.write(f"{name}: {OUTPUTS.relative_to(ROOT)}/{name}.txt\n")
