"""Optimizers that compress behind their preconditioner: what they send is the update that they are about to apply.

    opt = commpress.optim.OneBitAdamW(model.parameters(), lr=1e-3, warmup_steps=1000)
    session = commpress.attach(ddp_model, "sign", optimizer=opt)

Adam divides by the root of a variance that it computes from the gradients it gets. If those are compressed, the residual that
arrives a step later is divided by another number, and is not repaid in full. After the division everything is linear, and error
feedback repays all of it.
"""

from commpress.optim.base import CompressedOptimizer
from commpress.optim.dgc import DGC
from commpress.optim.intervals import Growing
from commpress.optim.muon import EF21Muon
from commpress.optim.one_bit import OneBitAdamW
from commpress.optim.zero_one import ZeroOneAdamW

__all__ = ["DGC", "CompressedOptimizer", "EF21Muon", "Growing", "OneBitAdamW", "ZeroOneAdamW"]
