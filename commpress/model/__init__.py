"""What leaves the run: pruning, quantisation-aware training and distillation of a model while it trains."""

try:
    from commpress.model.recipe import Recipe, RecipeError
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"commpress.model: found no {missing.name}, expected it; pip install 'commpress[model]'", name=missing.name
    ) from missing
from commpress.model.schedule import Scheduler, prepare

__all__ = ["Recipe", "RecipeError", "Scheduler", "prepare"]
