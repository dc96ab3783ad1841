"""The shortest real script: handwritten digits, a hundredth of the bytes.

    horovodrun -np 2 python examples/torch_minimal.py

Against a script for plain Horovod, the two lines marked NEW have changed.
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

import ef_horovod.torch as ef  # NEW

hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train = torch.arange(hvd.rank(), 1200, hvd.size())  # this rank's images
test = torch.arange(1200, len(y))

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = ef.DistributedOptimizer(  # NEW: was hvd.DistributedOptimizer, without compression=
    optimizer,
    named_parameters=model.named_parameters(),
    compression=ef.EF21(ef.TopK(ratio=0.01)),
)

for _ in range(15):
    for batch in train[torch.randperm(len(train))].split(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

if hvd.rank() == 0:
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    total = optimizer.stats()[-1]
    print(f"accuracy {accuracy:.3f}, sent {total.bytes_out} bytes, dense {total.dense_bytes_out}")
