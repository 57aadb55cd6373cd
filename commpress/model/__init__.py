"""What leaves the run: pruning, quantisation-aware training and distillation of a model while it trains."""

from commpress.model.recipe import Recipe, RecipeError
from commpress.model.schedule import Scheduler, prepare

__all__ = ["Recipe", "RecipeError", "Scheduler", "prepare"]
