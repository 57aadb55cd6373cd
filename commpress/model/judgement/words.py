"""Words: what a judgement's figures say, as sentences and as rows of tables, all of the record alone."""

from typing import Any

from commpress.model.export import WITHOUT_PRUNED
from commpress.model.judgement.runtimes import RUNTIMES, Runtime

Record = dict[str, Any]
ALIKE = 0.05
"""A figure within this share of the other is no gain."""
BUSY = 0.1
"""Times are uncertain where calls waited longer than this share for a core."""
SURE = 0.9
"""The share of turns in which one must be ahead: 9 of 10 heads are one throw of a hundred."""


def sentences(record: Record) -> list[str]:
    """Return sentences on what the small model brings and what it does not, the shortest answer first."""
    return [_answer(record), *_busy(record), *_size(record), *_speed(record), *_memory(record), *_quality(record)]


def _answer(record: Record) -> str:
    """Return a sentence: what it is, how much smaller, and where it is faster on one thread."""
    files = [side["stored_bytes"] for side in (record["dense"], record["small"])]
    pairs = [files] if all(files) else [[row[side]["bytes"] for side in ("dense", "small")] for row in record["rows"]]
    ratio = max(dense / small for dense, small in pairs)
    by_word: dict[str, list[str]] = {}
    for row in _timed(record):
        by_word.setdefault(speed_word(row["dense"]["speeds"][0], row["small"]["speeds"][0]), []).append(row["runtime"])
    times = ", ".join(f"{word} in {' and '.join(runtimes)}" for word, runtimes in by_word.items())
    size = f"{ratio:.1f}x smaller" if ratio > 1 + ALIKE else "no smaller"
    return f"{described(record)}: {size}{times and f'; on one thread {times}'}."


def _timed(record: Record) -> list[Record]:
    """The rows whose calls were timed."""
    return [row for row in record["rows"] if row["small"]["speeds"]]


def _busy(record: Record) -> list[str]:
    speeds = [speed for row in record["rows"] for side in ("dense", "small") for speed in row[side]["speeds"]]
    waited = max((speed["waited"] for speed in speeds if speed["waited"] is not None), default=0.0)
    if waited <= BUSY:
        return []
    return [
        f"The machine had other work: calls waited for a core up to {waited:.0%} of the time, so times are uncertain."
    ]


def described(record: Record) -> str:
    """Return what the small model is: "80 % pruned, int8 static"; "float32" if nothing of that."""
    small = record["small"]
    counts = small["counts"]
    words = [f"{counts['pruned'] / counts['values']:.0%} of the values pruned"] if counts and counts["pruned"] else []
    if (dense := record["dense"]["counts"]) and counts and counts["values"] < dense["values"]:
        words.append(f"{1 - counts['values'] / dense['values']:.0%} of the values removed")
    words += [kind for kind in small["kinds"] if kind.startswith("int")]
    return ", ".join(words) or "float32"


def _size(record: Record) -> list[str]:
    found = []
    for row in _one_a_file(record):
        dense, small = row["dense"]["bytes"], row["small"]["bytes"]
        of = "" if row["dense"]["file"] == row["small"]["file"] else f" of {row['dense']['file']}"
        if small < dense * (1 - ALIKE):
            found.append(
                f"{row['small']['file']} is {dense / small:.1f}x smaller: {_mb(small)} MB instead of {_mb(dense)} MB{of}."
            )
        else:
            zeros = "zeros" in record["small"]["kinds"] and RUNTIMES[row["runtime"]].format not in WITHOUT_PRUNED
            why = ", it has pruned weights as zeros" if zeros else ""
            found.append(f"{row['small']['file']} is no smaller: {_mb(small)} MB against {_mb(dense)} MB{of}{why}.")
    return found


def _one_a_file(record: Record) -> list[Record]:
    return list({row["small"]["file"]: row for row in record["rows"]}.values())


def _speed(record: Record) -> list[str]:
    found = []
    for row in record["rows"]:
        if not row["small"]["speeds"]:
            found.append(f"Calls of {row['runtime']} were not timed: here NumPy makes them, and no device.")
            continue
        told, gains = [], False
        for dense, small in zip(row["dense"]["speeds"], row["small"]["speeds"], strict=True):
            word, threads = speed_word(dense, small), small["threads"]
            gains |= word.endswith("x faster")
            on = f"{threads} thread{'s' if threads > 1 else ''}"
            told.append(f"{word} on {on} ({_ms(small['median'])} ms against {_ms(dense['median'])} ms)")
        why = "" if gains else _why(RUNTIMES[row["runtime"]], record["small"]["kinds"])
        found.append(f"In {row['runtime']} it is {'; '.join(told)}{why and f': it {why}'}.")
    return found


def _why(runtime: Runtime, kinds: Record) -> str:
    """Why a runtime is no faster with these kinds of weights, as far as that is known."""
    reasons = [runtime.zeros if "zeros" in kinds else "", runtime.integers if any("int" in k for k in kinds) else ""]
    return ", and ".join(each for each in reasons if each)


def speed_word(dense: Record, small: Record) -> str:
    """Return "2.10x faster", "1.30x slower", or "no faster": by less than ALIKE, or not in SURE of the turns."""
    pairs = list(zip(dense["turns"], small["turns"], strict=True))
    ratio = dense["median"] / small["median"]
    if ratio > 1 + ALIKE and sum(b < a for a, b in pairs) >= SURE * len(pairs):
        return f"{ratio:.2f}x faster"
    if 1 / ratio > 1 + ALIKE and sum(b > a for a, b in pairs) >= SURE * len(pairs):
        return f"{1 / ratio:.2f}x slower"
    return "no faster"


def _memory(record: Record) -> list[str]:
    found = []
    for row in _timed(record):
        dense, small = (row[side]["speeds"][0]["calling_bytes"] for side in ("dense", "small"))
        if dense and small is not None:
            less = f"{1 - small / dense:.0%} less" if small < dense * (1 - ALIKE) else "no less"
            found.append(f"In {row['runtime']} it takes {less} memory: {_mb(small)} MB against {_mb(dense)} MB.")
    return found


def _quality(record: Record) -> list[str]:
    found = []
    for row in record["rows"]:
        q = row["quality"]
        error = "" if q["difference_error"] is None else f" (± {q['difference_error']:.4f} over the batches)"
        change = q["small_loss"] - q["dense_loss"]
        share = f", {change / q['dense_loss']:+.1%}" if q["dense_loss"] > 0 else ""
        text = f"In {row['runtime']} its loss is {q['small_loss']:.4f} against {q['dense_loss']:.4f}: "
        text += f"{change:+.4f}{error}{share}"
        if q["changed"] is not None:
            text += f"; accuracy {q['small_accuracy']:.1%} against {q['dense_accuracy']:.1%}, "
            text += f"{q['changed']:.1%} of the predictions changed, KL {q['divergence']:.2g}"
        found.append(f"{text}.")
    return found


def quality_rows(record: Record) -> list[list[str]]:
    """The table of loss and agreement, its head first."""
    rows = [["runtime", "loss", "dense", "difference", "accuracy", "dense", "changed", "KL(dense || small)"]]
    for row in record["rows"]:
        q = row["quality"]
        shares = [q["small_accuracy"], q["dense_accuracy"], q["changed"]]
        rows.append(
            [
                row["runtime"],
                *(f"{q[key]:.4f}" for key in ("small_loss", "dense_loss")),
                f"{q['small_loss'] - q['dense_loss']:+.4f}",
                *("" if share is None else f"{share:.1%}" for share in shares),
                "" if q["divergence"] is None else f"{q['divergence']:.2g}",
            ]
        )
    return rows


def speed_rows(record: Record) -> list[list[str]]:
    """The table of latency and memory by runtime and threads, its head first."""
    head = [
        "runtime",
        "threads",
        "ms a call",
        "dense",
        "",
        "p95",
        "dense",
        "MB of memory",
        "dense",
        "MB to load",
        "dense",
    ]
    rows = [head]
    for row in record["rows"]:
        for dense, small in zip(row["dense"]["speeds"], row["small"]["speeds"], strict=True):
            rows.append(
                [
                    row["runtime"],
                    str(small["threads"]),
                    *(_ms(each["median"]) for each in (small, dense)),
                    speed_word(dense, small),
                    *(_ms(each["p95"]) for each in (small, dense)),
                    *(_mb(each["calling_bytes"]) for each in (small, dense)),
                    *(_mb(each["loading_bytes"]) for each in (small, dense)),
                ]
            )
    return rows


def size_rows(record: Record) -> list[list[str]]:
    """The table of files, and of what is left in them, its head first."""
    rows = [["file", "MB", "dense", "smaller"]]
    for row in _one_a_file(record):
        dense, small = row["dense"]["bytes"], row["small"]["bytes"]
        rows.append([row["small"]["file"], _mb(small), _mb(dense), f"{dense / small:.2f}x"])
    return rows


def count_rows(record: Record) -> list[list[str]]:
    """The table of values; the head alone if no file tells them."""
    rows = [["values", "small", "dense"]]
    small, dense = (record[side]["counts"] for side in ("small", "dense"))
    for key, name in (("values", "in all"), ("left", "not 0"), ("pruned", "left out of the file")):
        if small or dense:
            rows.append([name, *("" if each is None else f"{each[key]:,}" for each in (small, dense))])
    return rows


def layer_rows(record: Record) -> list[list[str]]:
    """The table of bytes in model.safetensors by layer, its head first."""
    small, dense = record["small"]["layers"], record["dense"]["layers"]
    rows = [["layer", "MB", "dense", "smaller"]]
    for layer in dict.fromkeys([*dense, *small]):
        a, b = small.get(layer), dense.get(layer)
        sizes = ["" if each is None else f"{each / 1e6:,.4f}" for each in (a, b)]
        rows.append([layer, *sizes, f"{b / a:.2f}x" if a and b else ""])
    return rows


def target_rows(record: Record) -> list[list[str]]:
    """The table of what targets have kernels for, its head first: a row a target, a column a kind of weights."""
    kinds = list(dict.fromkeys(each["kind"] for each in record["targets"]))
    named = list(dict.fromkeys(each["target"] for each in record["targets"]))
    of = {(each["target"], each["kind"]): each["kernels"] for each in record["targets"]}
    return [["target", *kinds], *([target, *(of[target, kind] for kind in kinds)] for target in named)]


def form_rows(record: Record) -> list[list[str]]:
    """The table of the files that targets take, and whether the small model has them, its head first."""
    rows = [[each["target"], each["file"], each["state"]] for each in record.get("forms", ())]
    return [["target", "takes", "the small model's"], *rows]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.2f}"
