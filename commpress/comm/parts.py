"""A bucket whose parts are sent separately.

    [a b c d] -> [a d] -> exchange -> [A D] \\
              -> [c]   -> exchange -> [C]   / -> [A b C D]
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from commpress.comm.segments import Segments, sizes

Finished = Callable[[BaseException | None], None]


def taken_apart(
    bucket: Tensor, segments: Segments, parts: list[Segments], finished: Finished
) -> Iterator[tuple[Tensor, Segments, Finished]]:
    """Yield copies of parts of a bucket ([n], of these segments), each with a function to call at the end of its exchange.

    The function gets None, and copies the part back into the bucket, or gets the error. `finished` is called once: after the
    last part, or with the first error.
    """
    places = dict(zip((segment.name for segment in segments), bucket.split(sizes(segments)), strict=True))
    waiting = len(parts)

    def arrived(part: Segments, flat: Tensor, error: BaseException | None) -> None:
        nonlocal waiting
        if error is None:
            for segment, values in zip(part, flat.split(sizes(part)), strict=True):
                places[segment.name].copy_(values)
        waiting -= 1
        if waiting == 0 or (error is not None and waiting > 0):
            waiting = min(waiting, 0)  # `finished` is not called a second time
            finished(error)

    for part in parts:
        flat = torch.cat([places[segment.name] for segment in part])
        yield flat, part, partial(arrived, part, flat)
