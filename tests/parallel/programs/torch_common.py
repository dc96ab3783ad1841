"""What the PyTorch programs of the parallel tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

torch.set_num_threads(1)


def build_model(seed: int = 0) -> torch.nn.Module:
    """A small network with compressed matrices and dense vectors; equal on all ranks."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(40, 60),
        torch.nn.Tanh(),
        torch.nn.Linear(60, 50),
        torch.nn.Linear(50, 10),
        Scale(),
    )


class Scale(torch.nn.Module):
    """A learned factor: a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def batches(rank: int, size: int = 16) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Each rank's own stream of (inputs, labels) for one linear problem."""
    generator = torch.Generator().manual_seed(1000 + rank)
    truth = torch.randn(40, 10, generator=torch.Generator().manual_seed(7))

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(size, 40, generator=generator)
        return inputs, (inputs @ truth).argmax(1)

    return next_batch


def digest(model: torch.nn.Module) -> str:
    """Hash of all parameters' bits."""
    sha = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().cpu().reshape(-1)  # NumPy knows no bfloat16
        sha.update(values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    next_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    steps: int,
) -> float:
    """Plain training loop; the last loss."""
    device = next(model.parameters()).device
    loss = torch.zeros(())
    for _ in range(steps):
        inputs, labels = (part.to(device) for part in next_batch())
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())
