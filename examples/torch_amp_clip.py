"""Gradient accumulation, mixed precision and clipping together, in the order that works.

    horovodrun -np 2 python examples/torch_amp_clip.py

backward (as often as accumulated), synchronize, unscale, clip, step. Clipping before the exchange
would clip each rank's gradient for itself, and unscaling before it would change nothing of what is
sent. The scaler is passed to the optimizer, so that error-feedback state does not depend on it.
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

import ef_horovod.torch as ef

ACCUMULATED = 2
MAX_NORM = 1.0

hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)
gpus = torch.cuda.device_count()
device = torch.device("cuda", hvd.local_rank() % gpus) if gpus else "cpu"
dtype = torch.float16 if gpus else torch.bfloat16

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
y = torch.tensor(digits.target, device=device)
train = torch.arange(hvd.rank(), 1200, hvd.size())  # this rank's images
test = torch.arange(1200, len(y))

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=1024.0)
optimizer = ef.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    named_parameters=model.named_parameters(),
    compression=ef.ErrorFeedback(ef.TopK(ratio=0.01)),
    backward_passes_per_step=ACCUMULATED,
    grad_scaler=scaler,
)


def loss_of(part: torch.Tensor) -> torch.Tensor:
    with torch.autocast(torch.device(device).type, dtype):
        return nn.functional.cross_entropy(model(x[part]), y[part]) / ACCUMULATED


largest_norm = 0.0
for _ in range(15):
    for batch in train[torch.randperm(len(train))].split(20):
        optimizer.zero_grad()
        for part in batch.chunk(ACCUMULATED):
            scaler.scale(loss_of(part)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        largest_norm = max(largest_norm, float(norm))
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()

if hvd.rank() == 0:
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    total = optimizer.stats()[-1]
    print(
        f"accuracy {accuracy:.3f}, sent {total.bytes_out} bytes, dense {total.dense_bytes_out}, "
        f"largest norm {largest_norm:.3f}, scale {scaler.get_scale():g}"
    )
