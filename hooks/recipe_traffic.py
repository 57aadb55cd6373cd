"""The spec of gradients in another library's trainer: the caller's, else that of the recipe's [traffic], else `auto`."""

from typing import TYPE_CHECKING

from commpress.comm.codecs import AUTO
from commpress.comm.rules import Spec

if TYPE_CHECKING:
    from commpress.model import Recipe


def spec_of(given: Spec | None, recipe: "Recipe | None", where: str) -> Spec:
    """Return the spec.

    Raises ValueError that begins with `where` if caller and recipe have different ones, and for `traffic.parameters`, since
    DistributedDataParallel sends no parameters.
    """
    wanted = None if recipe is None else recipe.traffic.spec
    if recipe is not None and recipe.traffic.parameters is not None:
        raise ValueError(
            f"{where}: the recipe has traffic.parameters {recipe.traffic.parameters!r}, but DistributedDataParallel sends no "
            "parameters; expected none"
        )
    if given is None:
        return AUTO if wanted is None else wanted
    if wanted is not None and given != wanted and str(given) != wanted:
        raise ValueError(f"{where}: got {str(given)!r}, the recipe has traffic.spec {wanted!r}; leave one of them out")
    return given
