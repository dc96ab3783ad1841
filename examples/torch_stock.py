"""The stock hvd.DistributedOptimizer with `ef.Compression` in its place for compression.

    horovodrun -np 2 python examples/torch_stock.py

For training code that makes Horovod's optimizer in a place that you cannot change, but passes a
compression through. Its price is a collective for each parameter instead of one for each bucket.
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

import ef_horovod.torch as ef

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
compression = ef.Compression(ef.ErrorFeedback(ef.OneBit()), model.named_parameters())
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), compression=compression
)

for _ in range(15):
    for batch in train[torch.randperm(len(train))].split(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

if hvd.rank() == 0:
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    total = compression.stats()[-1]
    print(f"accuracy {accuracy:.3f}, sent {total.bytes_out} bytes, dense {total.dense_bytes_out}")
