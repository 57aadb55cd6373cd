"""The end of a training whose loop belongs to another library: a failure there must not cost the user the model."""

from typing import TYPE_CHECKING

from commpress.notice import warn

if TYPE_CHECKING:
    from commpress.model import Scheduler


def finish(scheduler: "Scheduler", folder: str) -> None:
    """Write the recipe's exports into `folder`. Collective.

    Rank 0 warns where `Scheduler.finish` raises ValueError, so that a `save_model` that follows still runs.
    """
    try:
        scheduler.finish(folder)
    except ValueError as error:
        warn(f"commpress: {error}")
