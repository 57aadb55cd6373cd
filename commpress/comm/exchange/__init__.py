"""How the ranks' payloads become one mean, the same bits on every rank. One file an algorithm.

An exchange is a generator over one bucket: it encodes, starts and yields each `Transfer` in turn, is resumed when that has
arrived, and leaves the mean in the bucket. So the sequencer decides when, the exchange only what.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.exchange.all_gather import all_gather
from commpress.comm.exchange.all_reduce import all_reduce
from commpress.comm.exchange.label import Label, Labels
from commpress.comm.exchange.local import alone, skip_together, stay
from commpress.comm.exchange.two_shot import two_shot
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory

Exchange = Callable[[Tensor, Codec, Memory, Wire, Label], Iterator[Transfer]]

EXCHANGES: dict[str, Exchange] = {"all_reduce": all_reduce, "two_shot": two_shot, "all_gather": all_gather}

__all__ = ["EXCHANGES", "Exchange", "Label", "Labels", "Transfer", "Wire", "alone", "skip_together", "stay"]
