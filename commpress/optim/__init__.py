"""Optimizers whose exchange sits behind their preconditioner: what is compressed is what they are about to apply.

    opt = commpress.optim.OneBitAdamW(model.parameters(), lr=1e-3, warmup_steps=1000)
    session = commpress.attach(ddp_model, "sign", optimizer=opt)

Adam divides by the root of a variance that it computes from what arrives, so what error feedback held back of a gradient is
divided away when it comes. Behind the division all is linear, and feedback repays in full.
"""

from commpress.optim.base import CompressedOptimizer
from commpress.optim.dgc import DGC
from commpress.optim.intervals import Growing
from commpress.optim.muon import EF21Muon
from commpress.optim.one_bit import OneBitAdamW
from commpress.optim.zero_one import ZeroOneAdamW

__all__ = ["DGC", "CompressedOptimizer", "EF21Muon", "Growing", "OneBitAdamW", "ZeroOneAdamW"]
