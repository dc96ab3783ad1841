"""Trains over Horovod with compression, in steps as slow as those of a larger model.

train_horovod.py STEPS SECONDS_PER_STEP
"""

import sys
import time

import horovod.torch as hvd
import torch
from digest import require_equal
from torch import nn

import ef_horovod.torch as ef

STEPS, SECONDS = int(sys.argv[1]), float(sys.argv[2])

hvd.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = ef.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.05),
    named_parameters=model.named_parameters(),
    compression=ef.EF21(ef.TopK(ratio=0.01)),
)
own = torch.Generator().manual_seed(1 + hvd.rank())  # each rank has its own data
for step in range(1, STEPS + 1):
    x = torch.randn(20, 64, generator=own)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
    optimizer.step()
    if hvd.rank() == 0:
        print(f"step {step}.", flush=True)
    time.sleep(SECONDS)
values = [parameter.detach().numpy() for parameter in model.parameters()]
require_equal(values, hvd.allgather_object, hvd.rank())
