"""Exchanges: the ranks' payloads become one mean, the same bits on every rank. One file per algorithm.

An exchange runs as a generator over one bucket. It encodes, starts a `Transfer` and yields it; it is resumed when the transfer
has arrived, and writes the mean into the bucket. So the sequencer decides when to send, and the exchange only what.
"""

from commpress.comm.exchange.all_reduce import AllReduce
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.hierarchical import Hierarchical
from commpress.comm.exchange.label import Label, Labels
from commpress.comm.exchange.local import NoExchange, all_reduce_found_inf, single_rank
from commpress.comm.exchange.low_rank import LowRank
from commpress.comm.exchange.one_shot import OneShot
from commpress.comm.exchange.two_shot import TwoShot
from commpress.comm.exchange.wire import Transfer, Wire

EXCHANGES: dict[str, Exchange] = {
    exchange.name: exchange for exchange in (AllReduce(), TwoShot(), OneShot(), LowRank())
}
"""The exchanges that average buckets, by the name that a user gives."""
NO_EXCHANGE = NoExchange()


def named(text: str) -> Exchange:
    """Return the exchange of this name: one of EXCHANGES, `hierarchical`, or `hierarchical(L)` for nodes of L ranks.

    Raises ValueError for any other.
    """
    found = EXCHANGES.get(text) or Hierarchical.read(str(text))
    if found is None:
        raise ValueError(f"unknown exchange {text!r}, known: {', '.join((*EXCHANGES, Hierarchical.name))}")
    return found


__all__ = [
    "EXCHANGES",
    "NO_EXCHANGE",
    "Exchange",
    "Hierarchical",
    "Label",
    "Labels",
    "Message",
    "Transfer",
    "Wire",
    "all_reduce_found_inf",
    "named",
    "single_rank",
]
