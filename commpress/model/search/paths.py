"""A supernet's training: each step takes a path, the same on all ranks (Guo et al., arXiv:1904.00420: uniformly drawn).

    paths = Paths(model, seed=0)
    for step, (x, y) in enumerate(batches):
        paths.take(step)
        paths.loss(cross_entropy(ddp(x), y)).backward()

A path is drawn from seed and step only, so ranks need no communication, and a resumed run takes the same paths.
"""

import random

from torch import Tensor, nn

from commpress.model.search.architecture import choose, left_out, space
from commpress.model.search.spaces import Choice


class Paths:
    """The paths of a training. `model` is the module itself, not its DDP. Raises ValueError for a model without choices."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self._model, self._seed = model, seed
        self.space = space(model)

    def at(self, step: int) -> Choice:
        """Return the path of a step, independent of earlier ones."""
        return self.space.draw(random.Random(f"path {self._seed} {step}"))

    def take(self, step: int) -> Choice:
        """Choose the path of a step, before its forward; return it."""
        choice = self.at(step)
        choose(self._model, choice)
        return choice

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss, with a gradient of zeros for weights outside the path.

        So DDP has a gradient of every parameter, and the residual of each is sent whether the path uses it or
        not; `find_unused_parameters=True` throws it away. An optimizer with momentum moves unused weights, too.
        """
        for p in left_out(self._model):
            loss = loss + p.flatten()[:0].sum()  # of no values: Inf and NaN in p stay there
        return loss
