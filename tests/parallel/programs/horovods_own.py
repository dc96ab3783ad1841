"""What Horovod's own tests do with an optimizer, by three of them; facts for the tests to judge."""

from __future__ import annotations

import inspect
import os

os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import digest, flat

import ef_horovod.torch as ef

METHODS = {
    "identity": ef.NoFeedback(ef.Identity()),
    "topk": ef.ErrorFeedback(ef.TopK(ratio=0.05)),
}
mse = torch.nn.functional.mse_loss


def wrap(how, optimizer, named=None, **options):
    if how == "horovod":
        return hvd.DistributedOptimizer(optimizer, named, **options)
    return ef.DistributedOptimizer(optimizer, named, compression=METHODS[how], **options)


def optimizer_classes():
    """All of PyTorch's that need one dense gradient a step."""
    classes = {c.__name__: c for c in vars(torch.optim).values() if inspect.isclass(c)}
    left_out = ("Optimizer", "LBFGS", "SparseAdam")
    return [classes[name] for name in sorted(classes) if name not in left_out]


def build(cls, how, options, seed):
    torch.manual_seed(seed)
    bias = cls.__name__ != "Muon"  # which is for matrices only
    model = torch.nn.Sequential(
        torch.nn.Linear(100, 20, bias=bias), torch.nn.ReLU(), torch.nn.Linear(20, 10, bias=bias)
    )
    known = inspect.signature(cls.__init__).parameters
    optimizer = cls(model.parameters(), **{k: v for k, v in options.items() if k in known})
    return model, wrap(how, optimizer, model.named_parameters())


def one_step(model, optimizer, seed=0):
    torch.manual_seed(100 * hvd.rank() + seed)
    x, y = torch.randn(16, 100), torch.randn(16, 10)
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


def broadcast(model, optimizer):
    """State first: with weight decay Horovod's broadcast of it moves parameters."""
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)


def end_of(model):
    return {"end": digest(model), "some": flat(model)[::50].tolist()}


def state_of(optimizer):
    state = optimizer.state_dict()["state"]
    return [
        value.tolist() if isinstance(value, torch.Tensor) else value
        for i in sorted(state)
        for _, value in sorted(state[i].items())
    ]


def broadcast_state(how):
    """Rank 0 restores model and optimizer; all others get both from it."""
    results = {}
    for cls in optimizer_classes():
        for options in ({"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "centered": True}, {}):
            model, optimizer = build(cls, how, options, seed=hvd.rank())
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            one_step(model, optimizer)
            saved = model.state_dict(), optimizer.state_dict()
            values = digest(model), state_of(optimizer)  # the same on all ranks
            model, optimizer = build(cls, how, options, seed=50 + hvd.rank())
            if hvd.rank() == 0:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            broadcast(model, optimizer)
            restored = (digest(model), state_of(optimizer)) == values
            for step in range(2):
                one_step(model, optimizer, seed=1 + step)
            name = f"{cls.__name__} with {sorted(options)}"
            results[name] = {"restored": restored, **end_of(model)}
    return results


def broadcast_options(how):
    """Ranks begin with other learning rates and the like, and go on with those of rank 0."""
    first = {
        "lr": 0.01, "momentum": 0.8, "weight_decay": 0.2, "nesterov": True, "betas": (0.9, 0.999),
        "etas": (0.8, 2.4), "step_sizes": (1e-5, 100),
    }  # fmt: skip
    other = {
        "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False, "betas": (0.8, 0.9),
        "etas": (0.25, 1.75), "step_sizes": (1e-7, 5),
    }  # fmt: skip
    results = {}
    for cls in optimizer_classes():
        mine = first if hvd.rank() == 0 else other
        model, optimizer = build(cls, how, mine, seed=0)
        broadcast(model, optimizer)
        group = optimizer.param_groups[0]
        known = [k for k in first if k in inspect.signature(cls.__init__).parameters]
        wrong = [k for k in known if (group[k], type(group[k])) != (first[k], type(first[k]))]
        for step in range(2):
            one_step(model, optimizer, seed=step)
        results[cls.__name__] = {"wrong": wrong, **end_of(model)}
    return results


def without_gradient(how):
    """A frozen parameter of integers beside one that is trained."""
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.tensor([1, 3], dtype=torch.int32), requires_grad=False)
    model.b = torch.nn.Parameter(torch.rand(4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    optimizer = wrap(how, sgd, model.named_parameters())
    broadcast(model, optimizer)
    optimizer.zero_grad()
    (model.b[model.a.long()] * (1.0 + hvd.rank())).sum().backward()
    optimizer.step()
    return {"frozen": model.a.grad is None, "end": digest(model), "some": model.b.grad.tolist()}


def clipping(how):
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0)
    optimizer = wrap(how, torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    optimizer.zero_grad()
    mse(model(torch.ones(1, 1)), torch.ones(1, 1) + hvd.rank()).backward()
    optimizer.synchronize()
    before = model.weight.grad.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    after = model.weight.grad.item()
    with optimizer.skip_synchronize():
        optimizer.step()
    return {"end": digest(model), "some": [before, after, *flat(model).tolist()]}


def names(how):
    """None given, too few, and the same ones twice."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def sgd():
        return torch.optim.SGD(
            [{"params": layer.parameters(), "lr": 0.01 * (i + 1)} for i, layer in enumerate(model)]
        )

    few = list(model.named_parameters())[:1]
    twice = [pair for layer in model for pair in layer.named_parameters()]
    errors = [error_of(lambda n=n: wrap(how, sgd(), n)) for n in (few, twice)]
    optimizer = wrap(how, sgd())
    torch.manual_seed(hvd.rank())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
    return {"errors": errors, **end_of(model)}


def dynamic_requires_grad(how):
    """Two networks in turn, with the other one's gradients turned off."""
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(1, 60, 5), torch.nn.Conv2d(60, 1, 5)
    networks, optimizers, wrong = (first, second), [], []
    for name, network in zip("fs", networks, strict=True):
        named = [(f"{name}.{n}", p) for n, p in network.named_parameters()]
        sgd = torch.optim.SGD(network.parameters(), lr=0.01)
        optimizers.append(wrap(how, sgd, named))
    torch.manual_seed(hvd.rank())
    for turn in range(8):
        for i, network in enumerate(networks):
            network.requires_grad_(i == turn % 2)
            optimizers[i].zero_grad()
        second(first(torch.rand(1, 1, 12, 12))).mean().backward()
        for i, network in enumerate(networks):
            trained = [p.grad is not None and bool(p.grad.any()) for p in network.parameters()]
            if trained != [i == turn % 2] * 2:
                wrong.append(turn)
        optimizers[turn % 2].step()
    return {"wrong": wrong, **end_of(torch.nn.Sequential(*networks))}


def sparse_embeddings(how):
    """SparseAdam, with another number of rows on each rank."""
    results = {}
    for as_dense in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Embedding(400, 3, sparse=True)
        adam = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
        optimizer = wrap(how, adam, sparse_as_dense=as_dense)
        words = [[1, 2, 4, 5], [4, 3, 2, 9]] if hvd.rank() == 0 else [[1, 3, 4], [4, 7, 9]]
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor(words)).square().sum().backward()
            optimizer.step()
        some = model.weight.detach()[:12].view(-1).tolist()
        results[f"{as_dense=}"] = {"end": digest(model), "some": some}
    return results


def process_sets(how):
    """Even ranks train together, the others each by themselves."""
    even = hvd.add_process_set([rank for rank in range(hvd.size()) if rank % 2 == 0])
    odd = hvd.add_process_set([rank for rank in range(hvd.size()) if rank % 2 == 1])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 20), torch.nn.Linear(20, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = wrap(how, sgd, model.named_parameters(), process_set=even)
    for step in range(3):
        one_step(model, optimizer, seed=step)
    hvd.barrier()
    hvd.remove_process_set(odd)
    hvd.remove_process_set(even)
    return end_of(model)


def main() -> None:
    hvd.init()
    scenarios = (
        broadcast_state, broadcast_options, without_gradient, clipping, names,
        dynamic_requires_grad, sparse_embeddings, process_sets,
    )  # fmt: skip
    results = {
        how: {scenario.__name__: scenario(how) for scenario in scenarios}
        for how in ("horovod", "identity", "topk")
    }
    report(hvd.rank(), results)
    hvd.barrier()  # a rank that ends early shuts Horovod down for all


main()
