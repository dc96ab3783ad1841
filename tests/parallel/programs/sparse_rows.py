"""Sparse gradients in PyTorch: they travel as rows; facts for the tests to judge."""

from __future__ import annotations

import copy
import io

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import digest, flat

import ef_horovod.torch as ef

TABLE, WIDTH, STEPS = 300, 8, 4
METHOD = ef.EF21(ef.TopK(ratio=0.05))


class Model(torch.nn.Module):
    """An embedding, a compressed matrix and a dense bias."""

    def __init__(self, sparse=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(TABLE, WIDTH, sparse=sparse, dtype=dtype)
        self.head = torch.nn.Linear(WIDTH * 6, 30, dtype=dtype)

    def forward(self, words):
        rows = self.table(words) if words is not None else torch.ones(4, 6, WIDTH)
        return torch.tanh(self.head(rows.flatten(1))).square().mean()


def words_of(rank, step):
    """Some words twice in a batch, some in other ranks' batches too."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randint(0, 60, (4, 6), generator=generator)


def wrapped(model, method=METHOD, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return ef.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=method, **options
    )


def train(model, optimizer, steps=STEPS, first=0, absent=()):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(None if (hvd.rank(), step) in absent else words_of(hvd.rank(), step)).backward()
        optimizer.step()


def averages(op=hvd.Average, absent=(), dtype=torch.float32, passes=1):
    """What is delivered against what this rank finds from all ranks' batches."""
    model = Model(dtype=dtype)
    optimizer = wrapped(model, op=op, backward_passes_per_step=passes)
    wrong, once, touched = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        expected, rows = torch.zeros(TABLE, WIDTH), set()
        touched.append([])
        for rank in range(hvd.size()):
            plain, seen = Model(dtype=dtype), set()
            plain.load_state_dict(model.state_dict())
            for part in range(passes) if (rank, step) not in absent else ():
                words = words_of(rank, step + 50 * part)
                plain(words).backward()
                seen |= set(words.view(-1).tolist())
            if seen:
                expected += plain.table.weight.grad.float().to_dense()
            rows |= seen
            touched[-1].append(len(seen))
        for part in range(passes):
            missing = (hvd.rank(), step) in absent
            model(None if missing else words_of(hvd.rank(), step + 50 * part)).backward()
        optimizer.synchronize()
        gradient = model.table.weight.grad
        assert gradient.dtype == dtype
        mean = expected / (hvd.size() if op == hvd.Average else 1)
        wrong.append(float((gradient.float().to_dense() - mean).abs().max() / mean.abs().max()))
        once.append(gradient.is_sparse and gradient._indices()[0].tolist() == sorted(rows))
        with optimizer.skip_synchronize():
            optimizer.step()
    (row,) = [row for row in optimizer.stats() if row.name.startswith("rows.")]
    return {
        "wrong": max(wrong),
        "once": once,
        "touched": touched,
        "end": digest_of(model),
        "stats": [row.name, row.steps, row.num_elements, row.bytes_out, row.bytes_in],
        "dense_bytes": row.dense_bytes_out,
        "memories": sorted(optimizer.compression_state_dict()["parameters"]),
    }


def digest_of(model):
    return digest(model.float())


def means():
    return averages()


def sums():
    return averages(op=hvd.Sum)


def accumulated():
    return averages(passes=2)


def halves():
    return averages(dtype=torch.bfloat16)


def none_on_one_rank():
    """Rank 1 has no gradient in the first two steps, rank 0 none in the third."""
    return averages(absent={(1, 0), (1, 1), (0, 2)})


def not_finite():
    """A NaN in a row on rank 1: the step is dropped on all ranks, as if it had not been."""
    ends, nan, kept = [], [], []
    for bad in (False, True):
        model = Model()
        optimizer = wrapped(model)
        train(model, optimizer, 2)
        if bad:
            before = digest(model), repr(optimizer.compression_state_dict())
            optimizer.zero_grad()
            loss = model(words_of(hvd.rank(), 7))
            (loss * (float("nan") if hvd.rank() == 1 else 1.0)).backward()
            optimizer.step()
            kept.append((digest(model), repr(optimizer.compression_state_dict())) == before)
            nan.append(bool(model.table.weight.grad.to_dense().isnan().any()))
            nan.append(model.table.weight.grad.is_sparse)
        train(model, optimizer, 2, first=2)
        ends.append(digest(model))
    return {"ends": ends, "kept": kept, "nan": nan, "skipped": optimizer.stats()[-1].skipped}


def loss_scale():
    """Scaled by a power of two and unscaled again: the same bits."""
    ends = []
    for enabled in (False, True):
        model = Model()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        optimizer = wrapped(model, grad_scaler=scaler)
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(model(words_of(hvd.rank(), step))).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        ends.append(digest(model))
    return ends


def usual_recipe(unscale=False, **options):
    """A scaler that is found in the first step, in which kinds of gradients are found, too."""
    ends = []
    for enabled in (False, True):
        model = Model()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        if options:
            options = {"grad_scaler": scaler}
        optimizer = wrapped(model, **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(model(words_of(hvd.rank(), step))).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(digest(model))
    return ends


def usual_recipes():
    unscaled = usual_recipe(unscale=True), usual_recipe(unscale=True, grad_scaler=None)
    return [usual_recipe(), *unscaled]


def sparse_adam():
    """SparseAdam for the table and Adam for the rest, as with the batches of all ranks."""
    models, ends = (Model(), Model()), []
    for model in models:
        sparse = torch.optim.SparseAdam(model.table.parameters(), lr=0.05)
        rest = torch.optim.Adam(model.head.parameters(), lr=0.05)
        if model is models[0]:
            named = list(model.named_parameters())
            both = [ef.DistributedOptimizer(o, named) for o in (sparse, rest)]
            for step in range(STEPS):
                for optimizer in both:
                    optimizer.zero_grad()
                model(words_of(hvd.rank(), step)).backward()
                for optimizer in both:
                    optimizer.step()
        else:
            for step in range(STEPS):
                for optimizer in (sparse, rest):
                    optimizer.zero_grad()
                for rank in range(hvd.size()):
                    (model(words_of(rank, step)) / hvd.size()).backward()
                for optimizer in (sparse, rest):
                    optimizer.step()
        ends.append(flat(model))
    start = flat(Model())
    return {
        "wrong": float((ends[0] - ends[1]).abs().max()),
        "moved": float((ends[1] - start).abs().max()),
        "end": digest(models[0]),
    }


def resumed():
    """State saved and loaded before the first step of a new run, which knows no kinds yet."""
    model = Model()
    optimizer = wrapped(model)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.compression_state_dict()], file)
    train(model, optimizer, 2, first=2)
    file.seek(0)
    again = Model()
    optimizer = wrapped(again)
    weights, memories = torch.load(file)
    again.load_state_dict(weights)
    optimizer.load_compression_state_dict(memories)
    train(again, optimizer, 2, first=2)
    return [digest(model), digest(again)]


def both_kinds():
    """Sparse on rank 0 and dense on the others: told on all ranks."""
    model = Model(sparse=hvd.rank() == 0)
    optimizer = wrapped(model)
    model(words_of(hvd.rank(), 0)).backward()
    return error_of(optimizer.step)


def another_kind_later():
    found = []
    for sparse in (True, False):
        model = Model(sparse=sparse)
        optimizer = wrapped(model)
        train(model, optimizer, 1)
        model.table.sparse = not sparse
        optimizer.zero_grad()
        found.append(error_of(lambda model=model: model(words_of(hvd.rank(), 1)).backward()))
    return found


def entries():
    """`torch.gather(sparse_grad=True)`: gradients that are sparse in two dimensions."""
    matrix = torch.nn.Parameter(torch.ones(50, 40))
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD([matrix], lr=1.0), [("matrix", matrix)], compression=METHOD
    )
    mine = torch.tensor([[hvd.rank(), 7, 7]])
    torch.gather(matrix, 1, mine, sparse_grad=True).sum().backward()
    optimizer.step()
    moved = (1 - matrix.detach()).nonzero().tolist()
    return {"moved": moved, "values": [float(1 - matrix[0, column]) for _, column in moved]}


def stock():
    """`ef.Compression` leaves rows to Horovod; training, resuming, and another parameter later."""

    def stocked(model):
        named = list(model.named_parameters())
        adapter = ef.Compression(METHOD, named)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return adapter, hvd.DistributedOptimizer(optimizer, named, compression=adapter)

    model, again = Model(), Model()
    adapter, optimizer = stocked(model)
    train(model, optimizer, 2)
    again.load_state_dict(model.state_dict())
    other, resumed_optimizer = stocked(again)
    other.load_state_dict(copy.deepcopy(adapter.state_dict()))
    for one, its in ((model, optimizer), (again, resumed_optimizer)):
        train(one, its, 2, first=2)
    model.table.sparse = False
    return {
        "digest": digest(model),
        "resumed": digest(again),
        "sparse": model.table.weight.grad.is_sparse,
        "elements": [each.stats()[-1].num_elements for each in (adapter, other)],
        "dense later": error_of(lambda: (optimizer.zero_grad(), train(model, optimizer, 1))),
    }


def process_set(pair):
    """Ranks 0 and 2 of three; rank 1 trains alone."""
    model = Model()
    train(model, wrapped(model, process_set=pair))
    return digest(model)


def main() -> None:
    pair = hvd.ProcessSet([0, 2])
    hvd.init(process_sets=[pair])
    scenarios = (
        means, sums, accumulated, halves, none_on_one_rank, not_finite, loss_scale, sparse_adam,
        usual_recipes, resumed, both_kinds, another_kind_later, entries, stock,
    )  # fmt: skip
    results = {scenario.__name__: scenario() for scenario in scenarios}
    report(hvd.rank(), {**results, "process_set": process_set(pair)})
    hvd.barrier()  # a rank that ends early shuts Horovod down for all


main()
