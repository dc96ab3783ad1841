"""Trainings in PyTorch that `benchmarks/bandwidth.py` times: models, and ways to exchange.

A training has `step()`, `sent()` (bytes that this package counted so far, None for others),
`phases()` (seconds spent compressing, waiting and decompressing so far) and `close()`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bandwidth_plan import MODELS, WAYS, Case, Way
from torch import nn

from ef_horovod.methods.parsing import read_method
from virtual_cluster.network import Host

_SAMPLES = 512  # of a rank
_VOCABULARY, _WORDS, _WIDTH, _CLASSES = 50_000, 20, 64, 10
_PORT = 29400  # of PyTorch's store, on the first host
_ONE_BUCKET_MB = 1000  # PowerSGD's hook aborts with several


class Trainings:
    """What a job's group needs once: Horovod, PyTorch's process group, or neither.

    Args:
        group: of ways.
        peers: mpi4py's communicator of the ranks that train.
        data: folder of CIFAR-10, or None for random images.
    """

    def __init__(self, group: str, peers: Any, data: str | None = None) -> None:
        torch.set_num_threads(1)
        self._peers, self._group, self._data = peers, group, data
        self._images: tuple[torch.Tensor, torch.Tensor] | None = None
        if group in ("default", "ring"):
            import horovod.torch as hvd

            hvd.init(process_sets="dynamic")  # for ways that make groups of ranks
        elif group == "ddp":
            from torch import distributed

            store = distributed.TCPStore(Host(1, None).address, _PORT, peers.size, peers.rank == 0)
            distributed.init_process_group(
                "gloo", store=store, rank=peers.rank, world_size=peers.size
            )

    def make(self, case: Case, **options: Any) -> Training:
        """A training of a case; all ranks call it. Options are `ef.DistributedOptimizer`'s."""
        gc.collect()  # models before are in cycles with their hooks
        torch.manual_seed(0)  # the same start on all ranks
        way, model = WAYS[case.way], _build(case.model)
        inputs, labels = self._samples(case.model)
        exchange, batch = way.exchange_on(case.rate), MODELS[case.model].batch
        training = Training(model, inputs, labels, batch, exchange)
        training.data = self._source(case.model)
        _MAKERS[self._group](training, way, **options)
        return training

    def _samples(self, model: str) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(self._peers.rank)
        labels = torch.randint(_CLASSES, (_SAMPLES,), generator=random)
        if model == "embedding":
            words = torch.randint(_VOCABULARY, (_SAMPLES, _WORDS), generator=random)
            return words, labels
        if model == "mlp":
            return torch.randn(_SAMPLES, 784, generator=random), labels
        if self._data is None:
            return torch.randn(_SAMPLES, 3, 16, 16, generator=random), labels
        if self._images is None:
            from experiments.images import load_cifar10

            images = load_cifar10(Path(self._data), train=_SAMPLES * self._peers.size, test=1)
            own = slice(self._peers.rank, None, self._peers.size)
            pixels = torch.from_numpy(images.normalised()[0][own])
            self._images = pixels, torch.from_numpy(images.train_labels[own])
        return self._images

    def _source(self, model: str) -> str:
        return "CIFAR-10" if model == "cnn" and self._data is not None else "random"


class Training:
    """A model with SGD and momentum; a maker below says how gradients are exchanged."""

    def __init__(
        self, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, batch: int, how: str
    ) -> None:
        self.model, self.exchange, self.data = model, how, ""
        self.parameters = sum(p.numel() for p in model.parameters())
        self.optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = model
        self.before_step: Callable[[], Any] = lambda: None
        self.update: Callable[[], Any] = lambda: self.optimizer.step()
        self.span: Callable[[str], Any] = lambda name: nullcontext()  # for those who take times
        self.stats: Callable[[], list[Any]] | None = None
        self.closing: Callable[[], Any] = lambda: None
        self._inputs, self._labels, self._batch, self._at = inputs, labels, batch, 0

    @property
    def named(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.model.named_parameters())

    def step(self) -> None:
        """One batch."""
        part = slice(self._at, self._at + self._batch)
        self._at = (self._at + self._batch) % len(self._labels)
        self.optimizer.zero_grad()
        with self.span("forward"):
            output = self.forward(self._inputs[part])
            loss = nn.functional.cross_entropy(output, self._labels[part])
        with self.span("backward"):
            loss.backward()
        with self.span("exchange"):
            self.before_step()
        with self.span("update"):
            self.update()

    def sent(self) -> int | None:
        """Bytes that this rank sent so far, by `stats()`."""
        return self.stats()[-1].bytes_out if self.stats else None

    def phases(self) -> list[float]:
        """Seconds of compressing, waiting and decompressing so far."""
        if not self.stats:
            return [0.0] * 3
        total = self.stats()[-1]
        return [total.seconds_compress, total.seconds_wait, total.seconds_decompress]

    def close(self) -> None:
        """Leave the exchange, and give up what is large: Horovod's hooks keep all of it alive."""
        self.closing()
        self.optimizer.__dict__.clear()
        self.stats = None
        for parameter in self.model.parameters():
            parameter.grad, parameter.data = None, torch.empty(0)


def _build(name: str) -> nn.Module:
    if name == "mlp":
        sizes = [nn.Linear(784, 1536), nn.ReLU(), nn.Linear(1536, 1536), nn.ReLU()]
        return nn.Sequential(*sizes, nn.Linear(1536, _CLASSES))
    if name == "cnn":
        from experiments.networks import Convolutional

        return Convolutional(512).build()
    return nn.Sequential(nn.EmbeddingBag(_VOCABULARY, _WIDTH), nn.Linear(_WIDTH, _CLASSES))


def _with_horovod(training: Training, way: Way, **options: Any) -> None:
    import horovod.torch as hvd

    import ef_horovod.torch as ef

    plain, named = training.optimizer, training.named
    if not way.ours:
        compression = hvd.Compression.fp16 if "fp16" in way.name else hvd.Compression.none
        training.optimizer = hvd.DistributedOptimizer(plain, named, compression=compression)
    elif way.exchange == "stock":
        stock = ef.Compression(read_method(way.method), named, check_sync=False)
        training.optimizer = hvd.DistributedOptimizer(plain, named, compression=stock)
        training.stats = stock.stats
    else:
        training.optimizer = ef.DistributedOptimizer(
            plain,
            named,
            read_method(way.method),
            exchange=training.exchange,
            check_sync=False,
            **options,
        )
        training.stats = training.optimizer.stats
        training.closing = training.optimizer.unwrap


def _with_ddp(training: Training, way: Way) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if way.name == "no exchange":  # here, where no thread of Horovod's is awake
        return
    power = "PowerSGD" in way.name
    size = {"bucket_cap_mb": _ONE_BUCKET_MB} if power else {}
    wrapped = nn.parallel.DistributedDataParallel(training.model, **size)
    if power:
        # Two dense steps come first: DDP makes its buckets anew in the second.
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=2
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif "fp16" in way.name:
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    training.forward = wrapped


def _with_server(training: Training, way: Way) -> None:
    """Gradients go to the server's worker as backward makes them; directions come back."""
    from ef_horovod.server import Worker

    shapes = {name: p.detach().numpy() for name, p in training.named}
    worker = Worker(shapes, read_method(way.method))

    def push(name: str) -> Callable[[torch.Tensor], None]:
        return lambda p: worker.push(name, p.grad.numpy())

    for name, parameter in training.named:
        parameter.register_post_accumulate_grad_hook(push(name))

    def deliver() -> None:
        directions = worker.pull()
        for name, parameter in training.named:
            parameter.grad.numpy()[...] = directions[name]

    training.before_step = deliver
    training.stats, training.closing = worker.stats, worker.close


_MAKERS: dict[str, Callable[..., None]] = {
    "default": _with_horovod,
    "ring": _with_horovod,
    "ddp": _with_ddp,
    "server": _with_server,
}
