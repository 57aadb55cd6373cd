"""A bucket whose parts are sent separately.

    [a b c d] -> [a d] -> exchange -> [A D] \\
              -> [c]   -> exchange -> [C]   / -> [A b C D]

Parts that lie together, `[a b]` and `[c d]`, are pieces: they need no copies.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from commpress.comm.segments import Segment, Segments, sizes

Finished = Callable[[BaseException | None], None]


def taken_apart(
    bucket: Tensor, segments: Segments, parts: list[Segments], finished: Finished
) -> Iterator[tuple[Tensor, Segments, Finished]]:
    """Yield copies of parts of a bucket ([n], of these segments), each with a function to call at the end of its exchange.

    The function gets None, and copies the part back into the bucket, or gets the error. `finished` is called once: after the
    last part, or with the first error.
    """
    places = dict(zip((segment.name for segment in segments), bucket.split(sizes(segments)), strict=True))
    ended = when_all_end(len(parts), finished)

    def arrived(part: Segments, flat: Tensor, error: BaseException | None) -> None:
        if error is None:
            for segment, values in zip(part, flat.split(sizes(part)), strict=True):
                places[segment.name].copy_(values)
        ended(error)

    for part in parts:
        flat = torch.cat([places[segment.name] for segment in part])
        yield flat, part, partial(arrived, part, flat)


def pieces(segments: Segments, values: int) -> list[Segments]:
    """Cut a bucket into pieces of `values` values each, or a little more. It is cut only between its segments; what is left at
    the end belongs to the last piece if it is less than half of one."""
    found: list[list[Segment]] = [[]]
    held = 0
    for segment in segments:
        if held >= values:
            found.append([])
            held = 0
        found[-1].append(segment)
        held += segment.n
    if len(found) > 1 and 2 * held < values:
        last = found.pop()
        found[-1] += last
    return [tuple(piece) for piece in found]


def when_all_end(count: int, finished: Finished) -> Finished:
    """Return a function to call at the end of each of `count` exchanges. It calls `finished` once: at the last end, or with the
    first error."""
    waiting = count

    def ended(error: BaseException | None) -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0 or (error is not None and waiting > 0):
            waiting = min(waiting, 0)  # `finished` is not called a second time
            finished(error)

    return ended
