"""Making a model small while it trains: pruning, quantisation-aware training, distillation and search."""

from commpress import extras

try:
    from commpress.model.recipe import Recipe, RecipeError
except ModuleNotFoundError as error:
    raise extras.missing("commpress.model", error, "model") from error
from commpress.model import narrowing, restored, search
from commpress.model.average import Average
from commpress.model.export import Exported, export
from commpress.model.judgement import Judgement, judge
from commpress.model.schedule import Scheduler, prepare

__all__ = [
    "Average",
    "Exported",
    "Judgement",
    "Recipe",
    "RecipeError",
    "Scheduler",
    "export",
    "judge",
    "narrowing",
    "prepare",
    "restored",
    "search",
]
