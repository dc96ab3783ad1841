"""A torch training with servers that is interrupted and goes on; the optimizer has a momentum.

Arguments: the folder for states; then for each job, one after the other, "PHASE METHOD". Phases are
"whole" (all steps), "first" (to a checkpoint in the middle) and "second" (from there on).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from common import ARGUMENTS, error_of, report
from meeting import meet

import ef_horovod.torch as ef

torch.set_num_threads(1)
FOLDER, JOBS = Path(ARGUMENTS[0]), ARGUMENTS[1:]
STEPS, MIDDLE = 12, 6
METHODS = {
    "doublesqueeze": ef.DoubleSqueeze(ef.TopK(0.05), server_compressor=ef.RandomK(0.2)),
    "ef21": ef.EF21(ef.TopK(0.1), momentum=0.5, server_compressor=ef.TopK(0.1)),
}


class Training:
    """A small network; each worker has data of its own."""

    def __init__(self, method, seed):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Linear(60, 30))
        self.optimizer = ef.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9),
            self.model.named_parameters(),
            method,
            exchange="server",
            bucket_bytes=1,
        )
        self.rank = self.optimizer.transport.rank

    def backward(self, step, factor=1.0):
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(1000 * self.rank + step)
        x, y = torch.randn(8, 40, generator=generator), torch.randn(8, 30, generator=generator)
        (factor * ((self.model(x) - y) ** 2).mean()).backward()

    def train(self, first, last):
        for step in range(first, last):
            self.backward(step)
            self.optimizer.step()
            assert not self.optimizer.step_skipped

    def drop_a_step(self):
        self.backward(MIDDLE, float("nan") if self.rank else 1.0)
        self.optimizer.step()
        assert self.optimizer.step_skipped

    def save(self):
        """TrackedState, and all else that belongs to the step."""
        memories = self.optimizer.checkpoint()
        return memories, self.model.state_dict(), self.optimizer.state_dict()

    def restore(self, state):
        memories, model, optimizer = state
        self.optimizer.load_compression_state_dict(memories)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def digest(self):
        sha = hashlib.sha256()
        for parameter in self.model.parameters():
            sha.update(parameter.detach().numpy().tobytes())
            sha.update(self.optimizer.state[parameter]["momentum_buffer"].numpy().tobytes())
        return sha.hexdigest()


def run(phase, method):
    """One job; this worker's rank, and what it found."""
    training = Training(METHODS[method], seed=phase == "second")  # other weights, to be overwritten
    name = f"whole {method}" if phase == "whole" else method
    kept = FOLDER / f"{name}, worker{training.rank}.pt"
    errors = []
    if phase == "second":
        training.restore(torch.load(kept))
    else:
        training.train(0, MIDDLE)
        training.drop_a_step()  # the last thing before the checkpoint
        torch.save(training.save(), kept)
    if phase == "whole":
        state = torch.load(kept)[0]
        errors.append(error_of(lambda: training.optimizer.load_compression_state_dict(state)))
        training.backward(MIDDLE)
        errors.append(error_of(training.optimizer.checkpoint))
        training.optimizer.synchronize()
        errors.append(error_of(training.optimizer.checkpoint))
        with training.optimizer.skip_synchronize():
            training.optimizer.step()
        training.train(MIDDLE + 1, STEPS)
    if phase == "second":
        training.train(MIDDLE, STEPS)
    training.optimizer.transport.close()
    return training.rank, {"end": training.digest(), "errors": errors}


def main() -> None:
    meet()
    found = {}
    for job in JOBS:
        rank, found[job] = run(*job.split())
    report(rank, found)


main()
