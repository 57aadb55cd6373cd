"""The section about judgements: what a small model costs and brings against its dense one, in words, pictures and tables."""

from collections.abc import Sequence
from html import escape

from commpress.launch import figures, palette
from commpress.launch.records import Record
from commpress.launch.sections.html import figure, numbers, table

MOST_LAYERS = 20
"""More would be a figure of many screens; the table has all."""


def judgements(found: Sequence[Record]) -> list[str]:
    """The parts of each judgement."""
    return [part for record in found for part in _judgement(record)]


def conditions(record: Record) -> str:
    """Return what was measured where, in one line."""
    machine = record["machine"]
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in record["inputs"])
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; calls with inputs of {shapes}; "
        f"loss and predictions of {record['batches']} held-out batches."
    )


def _judgement(record: Record) -> list[str]:
    from commpress.model.judgement import words

    parts = [
        f"<h2>The small model ({escape(words.described(record))}) against the dense one</h2>",
        f"<p>{escape(conditions(record))}</p>",
        "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in record["sentences"]) + "</ul>",
        "<h3>Time</h3>",
        _dense_and_small(_latencies(record), "ms a call, median; lower is better"),
        numbers(table(words.speed_rows(record))),
        "<h3>Size</h3>",
        _dense_and_small(_files(record), "MB; lower is better"),
        numbers(table(words.size_rows(record)) + table(words.count_rows(record))),
    ]
    if layers := _layers(record):
        most = sorted(layers, key=lambda layer: -layers[layer][0])[:MOST_LAYERS]
        parts.append("<h3>Size by layer</h3>")
        parts += [f"<p>The {MOST_LAYERS} largest of {len(layers)}.</p>"] if len(layers) > MOST_LAYERS else []
        shown = {layer: pair for layer, pair in layers.items() if layer in most}
        parts.append(_dense_and_small(shown, "MB in model.safetensors; lower is better"))
        parts.append(numbers(table(words.layer_rows(record))))
    parts += ["<h3>Loss and predictions</h3>", table(words.quality_rows(record))]
    if record["targets"]:
        parts += ["<h3>Kernels elsewhere, by their documents</h3>", table(words.target_rows(record), text=True)]
    if len(forms := words.form_rows(record)) > 1:
        parts += ["<h3>Files that targets take</h3>", table(forms, text=True)]
    if record["left_out"]:
        parts += ["<h3>Not measured</h3>", *(f"<p>{escape(each)}</p>" for each in record["left_out"])]
    return parts


def _dense_and_small(pairs: dict[str, tuple[float, float]], axis: str) -> str:
    """Two bars for each name, what the dense model takes and what the small one does."""
    bars = {
        name: [
            figures.Bar("dense", dense, palette.DENSE, f"dense {dense:.3g}"),
            figures.Bar(
                "small", small, palette.SMALL, f"small {small:.3g}" + (f", {dense / small:.1f}x less" if small else "")
            ),
        ]
        for name, (dense, small) in pairs.items()
    }
    return figure(figures.bars(bars, axis))


def _latencies(record: Record) -> dict[str, tuple[float, float]]:
    """Milliseconds of dense and small by runtime and threads."""
    return {
        f"{row['runtime']}, {small['threads']} thread{'s' if small['threads'] > 1 else ''}": (
            1e3 * dense["median"],
            1e3 * small["median"],
        )
        for row in record["rows"]
        for dense, small in zip(row["dense"]["speeds"], row["small"]["speeds"], strict=True)
    }


def _files(record: Record) -> dict[str, tuple[float, float]]:
    return {row["small"]["file"]: (row["dense"]["bytes"] / 1e6, row["small"]["bytes"] / 1e6) for row in record["rows"]}


def _layers(record: Record) -> dict[str, tuple[float, float]]:
    """MB by layer, where both files tell them."""
    dense, small = (record[side]["layers"] for side in ("dense", "small"))
    return {layer: (dense.get(layer, 0) / 1e6, small.get(layer, 0) / 1e6) for layer in dense if small}
