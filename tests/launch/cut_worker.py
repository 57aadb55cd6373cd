"""Started in a lab: the host that keeps the store falls silent, its link cut. Prints what each rank's backward says, as JSON.

Rank 0 takes part no more, and ends when the others have had time for their timeout.
"""

import datetime
import json
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress

timeout = float(sys.argv[1])
store, rank, world_size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=60)))
store.set_timeout(datetime.timedelta(seconds=timeout))  # ranks may start late, the rest shall end soon
dist.init_process_group(
    "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout)
)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
commpress.attach(model, "int4")
for _ in range(3):
    model(torch.randn(8, 64)).sum().backward()
dist.barrier()
if dist.get_rank() == 0:
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    time.sleep(2 * timeout + 4)
    os._exit(0)
time.sleep(0.5)
started, said = time.monotonic(), ""
try:
    model(torch.randn(8, 64)).sum().backward()
except RuntimeError as error:
    said = str(error)
line = {"rank": dist.get_rank(), "said": said, "seconds": time.monotonic() - started}
os.write(1, (json.dumps(line) + "\n").encode())
os._exit(0)
