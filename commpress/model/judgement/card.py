"""The model card: what a small model is and what was measured of it, a Markdown file that travels with the model's."""

from collections.abc import Sequence
from typing import Any

from commpress.model.judgement import words


def model_card(record: dict[str, Any]) -> str:
    """The card of a judgement."""
    machine = record["machine"]
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in record["inputs"])
    parts = [
        "# Model card",
        f"A small model ({words.described(record)}), against the dense one that it came from.",
        "\n".join(f"- {each}" for each in record["sentences"]),
        f"Measured on {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}: calls with inputs of "
        f"{shapes}; loss and predictions on {record['batches']} held-out batches. Memory is what a process takes above its "
        "loaded runtime.",
        *_part("Loss and predictions", words.quality_rows(record)),
        *_part("Time and memory", words.speed_rows(record)),
        *_part("Files", words.size_rows(record)),
        *_part("Values", words.count_rows(record)),
        *_part("model.safetensors by layer", words.layer_rows(record)),
        *_part("Kernels elsewhere, by their documents", words.target_rows(record)),
        *_part("Files that targets take", words.form_rows(record)),
    ]
    if record["left_out"]:
        parts += ["## Not measured", "\n".join(f"- {each}" for each in record["left_out"])]
    return "\n\n".join(parts) + "\n"


def _part(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A heading and a table; nothing without rows."""
    if len(rows) < 2 or len(rows[0]) < 2:
        return []
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [f"## {title}", "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])]
