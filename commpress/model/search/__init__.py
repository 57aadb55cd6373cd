"""Architecture search: choices in a model or a recipe, strategies that try them, and the best ones for their size."""

from commpress.model.search.architecture import choose, chosen, fixed, left_out, space
from commpress.model.search.choices import Depth, Heads, OneOf, Width
from commpress.model.search.compression import Compression
from commpress.model.search.objective import Weights, front
from commpress.model.search.paths import Paths
from commpress.model.search.sizes import parameters, stored_bytes
from commpress.model.search.spaces import Space
from commpress.model.search.strategies import STRATEGIES
from commpress.model.search.study import Problem, Result, SearchError, search
from commpress.model.search.trial import Pruned, Trial, Tried

__all__ = [
    "STRATEGIES",
    "Compression",
    "Depth",
    "Heads",
    "OneOf",
    "Paths",
    "Problem",
    "Pruned",
    "Result",
    "SearchError",
    "Space",
    "Trial",
    "Tried",
    "Weights",
    "Width",
    "choose",
    "chosen",
    "fixed",
    "front",
    "left_out",
    "parameters",
    "search",
    "space",
    "stored_bytes",
]
