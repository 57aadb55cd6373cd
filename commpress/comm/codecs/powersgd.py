"""PowerSGD (Vogels et al., arXiv:1905.13727): a gradient matrix as a product of two thin ones, M ~ P Q, of rank r.

P = mean(M Q_before^T), made orthonormal; Q = mean(P^T M): one step of a power iteration, from the Q of the step before. It
cannot code flat values: the exchange `low_rank`, its only one, knows the shapes and sends both factors.
"""

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from torch import Tensor

from commpress.comm.codecs.base import ArgumentError, Codec


@dataclass(frozen=True)
class PowerSGD(Codec):
    """`powersgd(r)`: r (rows + columns) values of float32 for a matrix; a tensor that this does not make smaller is sent whole.

    Needs error feedback.

    >>> parse("powersgd(4)").rank_of(512, 128)
    4
    """

    rank: int

    word: ClassVar[str] = "powersgd"
    exchange: ClassVar[str] = "low_rank"
    flat: ClassVar[bool] = False

    @classmethod
    def from_spec(cls, argument: str | None, values: Codec | None = None) -> "PowerSGD":
        if argument is None or not argument.isdecimal():
            raise ArgumentError(f"powersgd takes a rank, as in powersgd(4), got ({argument or ''})")
        return cls(int(argument))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"powersgd({self.rank}): the rank must be at least 1, got {self.rank}")

    @property
    def spec(self) -> str:
        return f"powersgd({self.rank})"

    def rank_of(self, rows: int, columns: int) -> int:
        """Return the rank of the factors of a matrix; 0 if it is sent whole."""
        rank = min(self.rank, rows, columns)
        return rank if rank * (rows + columns) < rows * columns else 0

    def nbytes(self, n: int) -> NoReturn:
        self._refuse()

    def define_encode(self, x: Tensor) -> NoReturn:
        self._refuse()

    def define_decode(self, payload: Tensor, n: int) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"{self} cannot code flat values: it needs the shapes of a model's parameters, the factors of the last step, and "
            "the other ranks; expected commpress.attach(ddp, spec), or another codec"
        )
