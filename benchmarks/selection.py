"""Top-k over a bucket or tensor by tensor: how a small recurrent network learns, and why.

    python benchmarks/selection.py --rates 0.1 0.2 --seeds 2

Two workers in one process. Each way has the loss of the last tenth of the steps, and for each
tensor the relative error ||g - h|| / ||g|| of the aggregated gradient h in the second half of the
training (median), where g is the workers' mean gradient.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch

import ef_horovod as ef
from ef_horovod.arrays.keys import Key, tensor_id
from ef_horovod.training.policy import DensePolicy, small_or_vector

WORKERS, BATCH, LENGTH, MEMORY, SYMBOLS, WIDTH = 2, 16, 24, 5, 8, 128
Named = list[tuple[str, torch.Tensor]]
Errors = dict[str, float]


class Network(torch.nn.Module):
    """LSTM over symbols; its output layer has just enough entries to be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(SYMBOLS, 32)
        self.lstm = torch.nn.LSTM(32, WIDTH, batch_first=True)
        self.out = torch.nn.Linear(WIDTH, SYMBOLS)

    def loss(self, symbols: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the symbols that follow from earlier ones."""
        logits = self.out(self.lstm(self.embed(symbols[:, :-1]))[0])[:, MEMORY:]
        targets = symbols[:, MEMORY + 1 :]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, SYMBOLS), targets.reshape(-1))


def batch_of(random: np.random.Generator, table: np.ndarray) -> torch.Tensor:
    """int64[BATCH, LENGTH + 1]: a symbol follows from two earlier ones; 5 % are noise."""
    symbols = random.integers(0, SYMBOLS, size=(BATCH, LENGTH + 1))
    for t in range(MEMORY, LENGTH + 1):
        follows = table[symbols[:, t - 1], symbols[:, t - MEMORY]]
        symbols[:, t] = np.where(random.random(BATCH) < 0.05, symbols[:, t], follows)
    return torch.from_numpy(symbols)


class Selection:
    """The workers and the aggregator of some tensors that are compressed as one vector."""

    def __init__(self, name: str, named: Named, method: ef.Method) -> None:
        self.named, self._method, self._id = named, method, tensor_id(name)
        zeros = np.zeros(sum(p.numel() for _, p in named), np.float32)
        states = [method.init(zeros, WORKERS) for _ in range(WORKERS)]
        self._workers, self._server = [worker for worker, _ in states], states[0][1]

    def step(self, step: int, gradients: list[dict[str, np.ndarray]]) -> Errors:
        """Put the aggregated gradient into the tensors; returns its relative errors."""
        keys = [Key(0, step, self._id, rank, WORKERS) for rank in range(WORKERS)]
        vectors = [np.concatenate([own[name] for name, _ in self.named]) for own in gradients]
        mean = sum(vectors) / WORKERS
        pushed = [
            self._method.push(state, vector, key)
            for state, vector, key in zip(self._workers, vectors, keys, strict=True)
        ]
        messages = [message for message, _ in pushed]
        aggregate, self._server = self._method.reduce(self._server, messages, keys[0].of_server())
        pulled = [self._method.pull(state, aggregate) for _, state in pushed]
        self._workers = [state for _, state in pulled]
        whole, start, errors = np.asarray(pulled[0][0]), 0, {}
        for name, parameter in self.named:
            part = slice(start, start := start + parameter.numel())
            parameter.grad = torch.from_numpy(whole[part].copy()).view(parameter.shape)
            norm = np.linalg.norm(mean[part])
            errors[name] = float(np.linalg.norm(mean[part] - whole[part]) / max(norm, 1e-30))
        return errors


class Result(NamedTuple):
    loss: float
    errors: Errors


def train(
    method: ef.Method | None, whole: bool, dense: DensePolicy, rate: float, steps: int, seed: int
) -> Result:
    """SGD with momentum; `method` None is dense, `whole` selects over all compressed tensors."""
    torch.manual_seed(seed)
    network = Network()
    table = np.random.default_rng(7).integers(0, SYMBOLS, size=(SYMBOLS, SYMBOLS))
    randoms = [np.random.default_rng((seed, rank)) for rank in range(WORKERS)]
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    named: Named = list(network.named_parameters())
    large = [] if method is None else [(n, p) for n, p in named if not dense(n, p)]
    groups = [large] if whole else [[one] for one in large]
    selections = [
        Selection(f"bucket.{i}", group, method)
        for i, group in enumerate(groups)
        if method is not None and group
    ]
    losses, errors = [], []
    for step in range(steps):
        gradients = []
        for random in randoms:
            optimizer.zero_grad()
            loss = network.loss(batch_of(random, table))
            loss.backward()
            losses.append(loss.item())
            gradients.append({n: p.grad.numpy().copy().reshape(-1) for n, p in named})
        for name, parameter in named:
            mean = np.mean([own[name] for own in gradients], axis=0)
            parameter.grad = torch.from_numpy(mean).view(parameter.shape)
        found = [selection.step(step, gradients) for selection in selections]
        errors.append({name: error for each in found for name, error in each.items()})
        optimizer.step()
    late = errors[steps // 2 :]
    return Result(
        float(np.mean(losses[-WORKERS * steps // 10 :])),
        {name: float(np.median([row[name] for row in late])) for name in late[0]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--ratio", type=float, default=0.05, help="of top-k")
    parser.add_argument("--all", action="store_true", help="compress small tensors and vectors too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense = (lambda name, parameter: False) if arguments.all else small_or_vector
    top = ef.TopK(ratio=arguments.ratio)
    ways = {
        "dense": (None, True),
        "EF21, bucket": (ef.EF21(top), True),
        "EF21, tensor by tensor": (ef.EF21(top), False),
        "error feedback, bucket": (ef.ErrorFeedback(top), True),
        "error feedback, tensor by tensor": (ef.ErrorFeedback(top), False),
    }
    for rate in arguments.rates:
        for name, (method, whole) in ways.items():
            results = [
                train(method, whole, dense, rate, arguments.steps, seed)
                for seed in range(arguments.seeds)
            ]
            losses = " ".join(f"{result.loss:.3f}" for result in results)
            errors = ", ".join(f"{n} {e:.2f}" for n, e in results[0].errors.items())
            print(f"rate {rate:g}  {name:34} loss {losses}  {errors}", flush=True)


if __name__ == "__main__":
    main()
