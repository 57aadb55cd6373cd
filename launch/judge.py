"""Judge a small model against the dense one: loss, predictions, bytes, latency and memory, in each installed runtime.

    commpress judge runs/dense runs/small                                # two runs of `commpress train`
    commpress judge out/dense out/small --data my_project.data:held_out  # two folders of `commpress.model.export`

The function of --data takes no argument and returns batches (inputs, targets); runs have their own held-out text.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich import box
from rich.table import Table
from torch import nn

from commpress import extras
from commpress.files import write_atomically
from commpress.launch import checkpoint, recipes, run_folder, tasks
from commpress.launch.model_size import called
from commpress.launch.predictions import require, say, show

try:
    from tyro.conf import arg

    from commpress.launch import command_line, report
    from commpress.launch.sections.judgements import conditions
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.judge", error, "launch") from None

if TYPE_CHECKING:
    from commpress.model import Judgement

PAGE = "judgement.html"


@dataclass(frozen=True)
class Judge:
    """Measure a small model against the dense one: loss, bytes, latency, memory."""

    dense: Annotated[Path, arg(help_behavior_hint="(required)")]
    """The dense model: the folder of a run of `commpress train`, or of exported files."""
    small: Annotated[Path, arg(help_behavior_hint="(required)")]
    """The small model: also the folder of a run, or of exported files."""
    data: str | None = None
    """A function that returns batches (inputs, targets), module:function; for runs also a text file or folder, or the function
    that they were trained by."""
    model: str | None = None
    """For runs of a model of your own: the module:factory that they were trained by. Its code runs."""
    runtimes: tuple[str, ...] = ()
    """Some of torch, onnxruntime, pt2e, executorch, integer, litert. Default: all that are installed; of exported files not
    pt2e, whose file runs code where it is loaded. pt2e and executorch take about a minute a model."""
    out: Path = Path("runs/judged")
    """Folder for judgement.json, judgement.html, model_card.md, and the exported files of runs."""

    def run(self) -> None:
        """Measure and print. Ends the program with code 1 and a sentence if that cannot be."""
        try:
            run_folder.require_writable(self.out)
            self.print(self.judged())
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)

    def judged(self) -> "Judgement":
        """Return the judgement. Raises ValueError that names a wrong flag."""
        from commpress.model import judge

        dense, small = self.model_of(self.dense), self.model_of(self.small)
        run = isinstance(dense, nn.Module) or isinstance(small, nn.Module)
        require(
            run or self.model is None,
            f"--model {self.model}: has an effect only with the folder of a run, none is given",
        )
        return judge(dense, small, self.batches(), runtimes=self.runtimes or None, folder=self.out)

    def model_of(self, folder: Path) -> nn.Module | Path:
        """The model of a run, prepared as its recipe says; or the folder itself, for exported files. Raises ValueError."""
        return recipes.model_of_run(folder, self.model) if run_folder.holds_checkpoint(folder, "judge") else folder

    def batches(self) -> Iterable[Any]:
        """Return held-out batches: those of --data's function, or windows of a run's text. Raises ValueError."""
        run = next((each for each in (self.dense, self.small) if checkpoint.exists(each)), None)
        of_run = run is not None and self.data is not None and tasks.data_named_by(run) == self.data
        if self.data is not None and ":" in self.data and not Path(self.data).exists() and not of_run:
            found = called(self.data, "--data")
            require(
                isinstance(found, Iterable),
                f"--data {self.data}: returns a {type(found).__name__}, expected batches (inputs, targets)",
            )
            assert isinstance(found, Iterable)
            return found
        require(run is not None, "--data: expected module:function, such as my_project.data:held_out; no run is given")
        assert run is not None
        return tasks.held_out_of(run, self.data)

    def print(self, judgement: "Judgement") -> None:
        """Print the results, and write the files; the card is written beside the small model's, too."""
        from commpress.model.judgement import CARD, words

        record = judgement.record
        say(f"The small model ({words.described(record)}) against the dense one. {conditions(record)}")
        tables = {
            "time and memory": words.speed_rows(record),
            "loss and predictions": words.quality_rows(record),
            "files": words.size_rows(record),
            "values": words.count_rows(record),
            "model.safetensors by layer": words.layer_rows(record),
            "kernels elsewhere, by their documents": words.target_rows(record),
            "files that targets take": words.form_rows(record),
        }
        for title, (head, *rows) in tables.items():
            if rows:
                made = Table(*head, title=title, box=box.SIMPLE_HEAD)
                for row in rows:
                    made.add_row(*row)
                show(made)
        for each in (*record["sentences"], *(f"Not measured: {why}" for why in record["left_out"])):
            say(f"- {each}")
        judgement.write(self.out)
        write_atomically(self.small / CARD, lambda file: file.write(judgement.card.encode()))
        report.write(self.out / PAGE, report.page([record]))
        say(f"record, pictures and card in {self.out}; the card is in {self.small}, too")


if __name__ == "__main__":
    command_line.read(Judge, "python -m commpress.launch.judge").run()
