"""CompressedUpdates with local steps by a parameter server: the training of local_updates.py."""

from __future__ import annotations

import torch
from common import report
from torch_common import batches, build_model, digest

import ef_horovod.torch as ef

model = build_model()
optimizer = ef.CompressedUpdates(
    torch.optim.AdamW(model.parameters(), lr=0.003),
    model.named_parameters(),
    ef.ErrorFeedback(ef.TopK(0.05), decay=0.95),
    exchange="server",
    local_steps=5,
)
next_batch = batches(optimizer.transport.rank)
for _ in range(12):
    inputs, labels = next_batch()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
optimizer.exchange()
steps = [optimizer.stats()[-1].steps, optimizer.drivers[0].steps_taken()]
report(optimizer.transport.rank, {"end": digest(model), "steps": steps})
