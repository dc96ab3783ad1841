"""Four workers in torch, one of them slow: what each applied and remembers, each round's model.

Argument: steps, or "refused" for what cannot work. Gradients are integers and do not depend on the
model. One gradient of worker 1 is not finite.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from common import ARGUMENTS, error_of, report
from same_gradients import digest

import ef_horovod.torch as ef

torch.set_num_threads(1)
SHAPES = {"w": (40, 50), "b": (50,)}
NAP, BAD = 0.4, 2


class Training:
    def __init__(self, **options):
        self.parameters = {
            name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()
        }
        plain = torch.optim.SGD(self.parameters.values(), lr=1.0, momentum=0.5)
        method = ef.ErrorFeedback(ef.TopK(ratio=0.05))
        self.optimizer = ef.DistributedOptimizer(
            plain, self.parameters.items(), method, exchange="server", **options
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 1 / (1 + step))
        self.optimizer.register_step_post_hook(self.after_round)
        self.rank = self.optimizer.transport.rank
        self.given, self.applied = (
            {name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2)
        )
        self.rounds, self.pushes = [], 0

    def after_round(self, *_):
        """What torch calls after each step of the plain optimizer."""
        self.scheduler.step()
        seen = []
        for name, parameter in self.parameters.items():
            self.applied[name] += parameter.grad.numpy()
            buffer = self.optimizer.state[parameter]["momentum_buffer"]
            seen += [parameter.grad, parameter.detach(), buffer]
        self.rounds.append(digest(torch.cat([x.reshape(-1) for x in seen]).numpy()))

    def backward(self):
        """In two passes."""
        rng = np.random.default_rng((self.rank, self.pushes))
        self.pushes += 1
        self.optimizer.zero_grad()
        bad = self.rank == 1 and self.pushes == BAD
        for _ in range(2):
            loss = torch.zeros(())
            for name, shape in SHAPES.items():
                gradient = rng.integers(-9, 9, shape)
                left_out = bad and name == "w"
                self.given[name] += 0 if left_out else gradient
                gradient = torch.tensor(gradient, dtype=torch.float32)
                factor = float("inf") if left_out else 1.0
                loss = loss + (self.parameters[name] * gradient * factor).sum()
            loss.backward()
        return loss

    def step(self):
        if self.pushes % 2:
            self.optimizer.step(self.backward)
        else:
            self.backward()
            self.optimizer.step()
        assert not self.optimizer.step_skipped


def main() -> None:
    training = Training(backward_passes_per_step=2)
    training.backward()
    refused = error_of(training.optimizer.synchronize)
    training.optimizer.step()
    begin = time.monotonic()
    while training.optimizer.rounds < int(ARGUMENTS[0]):
        time.sleep(NAP if training.rank == 3 else NAP / 8)
        training.step()
    seconds = time.monotonic() - begin
    state = training.optimizer.compression_state_dict()
    assert training.optimizer.rounds == len(training.rounds) == state["step"]
    errors = state["parameters"]["w"]["worker.error"].reshape(SHAPES["w"])
    report(
        training.rank,
        {
            "rounds": training.rounds,
            "pushes": training.pushes,
            "seconds": seconds,
            "given": {name: value.tolist() for name, value in training.given.items()},
            "applied": {name: value.tolist() for name, value in training.applied.items()},
            "error": errors.tolist(),
            "refused": refused,
        },
    )


def refused() -> None:
    training = Training(grad_scaler=torch.amp.GradScaler("cpu"))
    errors = [error_of(training.optimizer.step)]
    training.optimizer._engine.scaler = None
    training.optimizer.step()
    training.scheduler.step()
    errors.append(error_of(training.optimizer.step))
    report(training.rank, {"errors": errors})


refused() if ARGUMENTS[0] == "refused" else main()
