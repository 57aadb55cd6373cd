"""The results of `make gpu-check`, as the lines of one table: for its terminal and for the report.

A record has a row for each check. `part` says where it ran: "codecs", "passes", or a group of ranks such as
"NCCL, 1 rank"; `error` says why one failed, and is empty otherwise. `shares` are rates as shares of a copy's on the
device: by action, for passes by dtype.
"""

from typing import Any

Record = dict[str, Any]
"""The content of a JSON file."""
ACTIONS = ("encode", "feedback", "momentum", "decode", "mean of 4", "recode 4")
COLUMNS = ("", "result", *ACTIONS)
NO_KERNEL = "*"
"""The mark after the rate of an action that has no kernel."""
GOALS = {"topk": 0.4} | dict.fromkeys(("bf16", "fp16", "fp8", "int8", "int4", "int2", "sign"), 0.8)
"""The least share of a copy's rate by the word of a codec; others have no goal."""
LEGEND = (
    "percent: of a copy's rate on the device, for the bytes that an action must move, each once; "
    f"{NO_KERNEL} in plain torch, there is no kernel; < below the goal of 80 % (top-k: 40 %)"
)


def title(record: Record) -> str:
    """Return the line above the table."""
    copy = record["copy_seconds"]
    size = record["values"] * 4
    speed = (
        ""
        if copy is None
        else f"; a copy of {size / 1e6:.0f} MB: {copy * 1e3:.3g} ms, {2 * size / copy / 1e9:.0f} GB/s"
    )
    rehearsal = "REHEARSAL on the CPU, no GPU has been used: " if record["rehearsal"] else ""
    return f"{rehearsal}{record['machine']}, torch {record['torch']}, Triton {record['triton']}{speed}"


def lines(record: Record) -> list[tuple[str, list[list[str]]]]:
    """Return the cells of the rows by part, as many as COLUMNS."""
    found: dict[str, list[list[str]]] = {}
    for row in record["rows"]:
        shares = row.get("shares", {})
        cells = [share_of(row, action, not record["rehearsal"]) if action in shares else "" for action in ACTIONS]
        found.setdefault(row["part"], []).append(
            [row["name"], f"FAILED: {row['error']}" if row["error"] else said(row), *cells]
        )
    return list(found.items())


def said(row: Record) -> str:
    """Return in words the result of a row that did not fail."""
    parts = [row["text"]] if row.get("text") else []
    if row.get("comparisons"):
        parts.append(f"{row['comparisons']} results are right")
    if "off" in row:
        parts.append(f"losses as on the CPU to {row['off']:.1e} (the last is {row['losses'][-1]:.3f})")
    other = {name: share for name, share in row.get("shares", {}).items() if name not in ACTIONS}
    rates = [f"{share:.0%}{'' if row.get('kernel') else NO_KERNEL} in {dtype}" for dtype, share in other.items()]
    parts += [f"{' and '.join(rates)} of a copy's rate"] if rates else []
    return ", ".join(parts) or "done"


def share_of(row: Record, action: str, judged: bool) -> str:
    """Return the cell of an action."""
    cell = f"{row['shares'][action]:.0%}"
    if action not in row.get("kernels", ()):
        return cell + NO_KERNEL
    return f"{cell} <" if judged and below_goal(row, action) else cell


def below_goal(row: Record, action: str) -> bool:
    """Return whether an action that has a kernel is slower than its codec's goal."""
    goal = GOALS.get(str(row["name"]).partition("(")[0])
    return goal is not None and action in row.get("kernels", ()) and row["shares"][action] < goal


def answer(record: Record) -> str:
    """Return the last line: how many rows failed, and how many are slower than their goal."""
    rows = record["rows"]
    failed = sum(bool(row["error"]) for row in rows)
    good = f"all {len(rows)} rows are good" if not failed else f"FAILED: {failed} of {len(rows)} rows"
    if record["rehearsal"]:
        return (
            f"{good}, after {record['seconds']:.0f} s; this was a rehearsal on the CPU, which says nothing about a GPU"
        )
    actions = [(row, action) for row in rows for action in row.get("shares", {}) if action in ACTIONS]
    slow = sum(below_goal(row, action) for row, action in actions)
    plain = sum(action not in row.get("kernels", ()) for row, action in actions)
    speed = f"of {len(actions)} rates {slow} are below their goal, {plain} are of plain torch"
    return f"{good}, after {record['seconds']:.0f} s; {speed}"
