"""How the ranks' payloads become one mean, the same bits on every rank. One file an algorithm.

An exchange runs as a generator over one bucket: it encodes, starts and yields each `Transfer` in turn, is resumed when that
has arrived, and leaves the mean in the bucket. So the sequencer decides when, the exchange only what.
"""

from commpress.comm.exchange.all_reduce import AllReduce
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label, Labels
from commpress.comm.exchange.local import NoExchange, all_reduce_found_inf, single_rank
from commpress.comm.exchange.one_shot import OneShot
from commpress.comm.exchange.two_shot import TwoShot
from commpress.comm.exchange.wire import Transfer, Wire

EXCHANGES: dict[str, Exchange] = {exchange.name: exchange for exchange in (AllReduce(), TwoShot(), OneShot())}
"""Exchanges that make one mean of the ranks' buckets, by the name that a user gives."""
NO_EXCHANGE = NoExchange()

__all__ = [
    "EXCHANGES",
    "NO_EXCHANGE",
    "Exchange",
    "Label",
    "Labels",
    "Message",
    "Transfer",
    "Wire",
    "all_reduce_found_inf",
    "single_rank",
]
