"""Export a model, from a run or your own, in the formats of targets.

    commpress export runs/small --formats onnx pt2e --out out
    commpress export --model my_project.models:build --state model.safetensors --example my_project.models:inputs

Files are those of `commpress.model.export` (docs/export.md); export.json in the same folder says what the table does.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import nn

from commpress import extras
from commpress.launch import recipes, run_folder, tasks
from commpress.launch.exported import bytes_of, show_exported
from commpress.launch.model_size import called
from commpress.launch.predictions import require

try:
    from tyro.conf import Positional

    from commpress.launch import command_line
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.export", error, "launch") from None

if TYPE_CHECKING:
    from commpress.model import Exported

Format = Literal["safetensors", "onnx", "pt2e", "executorch", "litert", "integer", "torchao"]


@dataclass(frozen=True)
class Export:
    """Write a model in the forms that devices run: ONNX, ExecuTorch, integers, ..."""

    folder: Annotated[Path | None, Positional] = None
    """Folder of a run of `commpress train`: its checkpoint and recipe are used. Leave it out for a model without a run."""
    formats: tuple[Format, ...] = ("onnx",)
    """Formats to write."""
    model: str | None = None
    """Your own model, module:factory; the factory takes no argument and returns the model. For a run of a model of your own the
    factory that it was trained by. Its code runs."""
    data: str | None = None
    """For a run of a model of your own: the module:function that it was trained by. Its code runs."""
    state: Path | None = None
    """Values of --model: commpress's model.safetensors, or a state dict that torch.save wrote."""
    recipe: Path | None = None
    """The recipe that --model was trained with, if the factory does not prepare it."""
    example: str | None = None
    """Example inputs of --model, module:function; it returns a tuple of tensors with 2 rows or more."""
    out: Path = Path("runs/exported")
    """Folder for the files and export.json."""

    def run(self) -> None:
        """Export and print. Ends the program with code 1 and a sentence if that cannot be."""
        try:
            self.require_sense()
            self.print(self.exported())
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)

    def require_sense(self) -> None:
        """Raise ValueError for flags that do not go together."""
        require(
            self.folder is not None or self.model is not None,
            "expected the folder of a run, or --model module:factory, such as my_project.models:build",
        )
        for name in ("state", "recipe", "example"):
            alone = getattr(self, name) is None or (self.model is not None and self.folder is None)
            require(
                alone, f"--{name} {getattr(self, name)}: has an effect only with --model, without the folder of a run"
            )
        require(
            self.data is None or self.folder is not None,
            f"--data {self.data}: has an effect only with the folder of a run",
        )
        require(
            self.model is None or self.folder is not None or self.example is not None,
            "--example: expected module:function, such as my_project.models:inputs",
        )
        run_folder.require_writable(self.out)

    def exported(self) -> "list[Exported]":
        """Return the files. Raises ValueError that names the flag, or the errors of `commpress.model.export`."""
        from commpress.model import export
        from commpress.model.export.by_recipe import two_rows

        if self.folder is not None:
            model: nn.Module = recipes.model_of_run(self.folder, self.model)
            require(
                self.model is not None or self.data is None, f"--data {self.data}: the run in {self.folder} has a GPT"
            )
            own = self.model is not None
            inputs: tuple[Any, ...] = (
                two_rows(next(tasks.held_out_of(self.folder, self.data))[0]) if own else bytes_of(model)
            )
        else:
            model, inputs = self.own_model(), self.own_inputs()
        return export(model, self.out, formats=self.formats, example_inputs=inputs)

    def own_model(self) -> nn.Module:
        """Return the model of --model, --recipe and --state."""
        assert self.model is not None
        model = called(self.model, "--model")
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {self.model}: returns a {type(model).__name__}, expected a torch.nn.Module")
        if self.recipe is not None:
            from commpress.model import Recipe, prepare

            prepare(model, Recipe.load(self.recipe))
        if self.state is not None:
            try:
                load(model, self.state)
            except RuntimeError as error:
                raise ValueError(f"--state {self.state}: {error}") from error
        return model

    def own_inputs(self) -> tuple[Any, ...]:
        """Return the inputs of --example."""
        assert self.example is not None
        inputs = called(self.example, "--example")
        if not isinstance(inputs, tuple):
            raise ValueError(f"--example {self.example}: returns a {type(inputs).__name__}, expected a tuple")
        return inputs

    def print(self, files: "list[Exported]") -> None:
        """Print what was written, and say in export.json whose it is."""
        from commpress.model.export import record

        show_exported(files)
        record.keep(self.out, str(self.folder or self.model), files)


def load(model: nn.Module, path: Path) -> None:
    """Give a model the values of a file. Raises ValueError or RuntimeError if they are not its own, or damaged."""
    if path.suffix == ".safetensors":
        from commpress.model import stored
        from commpress.model.restored import restore

        restore(model, stored.load(path))
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of what torch cannot read it raises what it likes
        raise ValueError(f"--state {path}: not a file of torch.save, or damaged: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict):
        raise ValueError(f"--state {path}: has a {type(state).__name__}, expected a state dict")
    model.load_state_dict(state)


if __name__ == "__main__":
    command_line.read(Export, "python -m commpress.launch.export").run()
