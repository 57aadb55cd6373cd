"""The end of a training that another library's loop holds: what fails there must not take the model from the user."""

from typing import TYPE_CHECKING

from commpress.notice import warn

if TYPE_CHECKING:
    from commpress.model import Scheduler


def finish(scheduler: "Scheduler", folder: str) -> None:
    """Write what the recipe exports. Collective. Rank 0 warns where `Scheduler.finish` raises: `save_model` may come next."""
    try:
        scheduler.finish(folder)
    except ValueError as error:
        warn(f"commpress: {error}")
