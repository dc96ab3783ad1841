"""Without Horovod: handwritten digits in a job of torchrun, at 1/37 of the bytes.

    torchrun --nproc-per-node 2 examples/torch_distributed.py

With --ddp the loop belongs to DistributedDataParallel, and the compression is its hook.
"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

import ef_horovod.torch as ef

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # equal first values on all ranks
torch.set_num_threads(1)

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train = torch.arange(rank, 1200 // size * size, size)  # this rank's images
test = torch.arange(1200, len(y))

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
method = ef.EF21(ef.TopK(ratio=0.01))
if "--ddp" in sys.argv:
    model = nn.parallel.DistributedDataParallel(model)
    state, hook = ef.ddp_hook(method, model)
    model.register_comm_hook(state, hook)
else:
    optimizer = ef.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=method, transport="torch"
    )
    state = optimizer

for _ in range(15):
    for batch in train[torch.randperm(len(train))].split(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

if rank == 0:
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    total = state.stats()[-1]
    print(f"accuracy {accuracy:.3f}, sent {total.bytes_out} bytes, dense {total.dense_bytes_out}")
dist.destroy_process_group()
