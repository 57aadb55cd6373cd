"""The end of a training whose loop belongs to another library: a failure there must not cost the user the model."""

from typing import TYPE_CHECKING

from commpress.comm.session import Session
from commpress.notice import warn

if TYPE_CHECKING:
    from commpress.hooks.limits import Limits
    from commpress.model import Scheduler


def finish(session: Session, scheduler: "Scheduler", limits: "Limits | None", folder: str) -> None:
    """Write what the recipe exports, and hold the file against its budget. Collective.

    Rank 0 warns where `Scheduler.finish` raises, and of each limit that is missed: `save_model` may come next.
    """
    try:
        scheduler.finish(folder)
    except ValueError as error:
        warn(f"commpress: {error}")
    for each in [] if limits is None else limits.missed(scheduler, folder, session.group):
        warn(f"commpress: {each}")
