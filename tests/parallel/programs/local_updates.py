"""CompressedUpdates with local steps, on real ranks of PyTorch."""

from __future__ import annotations

import copy

import horovod.torch as hvd
import torch
from common import OUT, error_of, report
from torch_common import batches, build_model, digest, flat

import ef_horovod.torch as ef

cross_entropy = torch.nn.functional.cross_entropy
FEW = ef.ErrorFeedback(ef.TopK(0.05), decay=0.95)
NONE = ef.NoFeedback(ef.Identity())
EVERY = 5
EXCHANGES = {
    "gather": FEW,
    "reduce": ef.ErrorFeedback(ef.RandomK(0.05)),
    "double_pass": ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
}


def updates(model, method=FEW, *, inner=None, **options):
    inner = inner or torch.optim.AdamW(model.parameters(), lr=0.003)
    options = {"local_steps": EVERY, **options}
    return ef.CompressedUpdates(inner, model.named_parameters(), method, **options)


def step(model, optimizer, batch, *, spoiled=False):
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    if spoiled:
        next(model.parameters()).grad[0, 0] = torch.nan
    optimizer.step()
    return getattr(optimizer, "step_skipped", False)


def means():
    """Without compression, parameters after an exchange are the mean of the workers' own ones."""
    model, alone, next_batch = build_model(), build_model(), batches(hvd.rank())
    optimizer = updates(model, NONE, inner=torch.optim.SGD(model.parameters(), 0.05, 0.9))
    plain = torch.optim.SGD(alone.parameters(), 0.05, 0.9)
    digests = []
    for _ in range(EVERY):
        batch = next_batch()
        step(model, optimizer, batch)
        step(alone, plain, batch)
        digests.append(digest(model))
    expected = hvd.allreduce(flat(alone), op=hvd.Average)
    return {"off": float((flat(model) - expected).abs().max()), "digests": digests}


def one_step():
    """H = 1 with plain SGD is error feedback with the step size inside."""
    ends = []
    for inside in (False, True):
        model, next_batch = build_model(), batches(hvd.rank())
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        if inside:
            method = ef.ErrorFeedback(ef.TopK(0.05), step_inside=0.1)
            optimizer = ef.DistributedOptimizer(sgd, model.named_parameters(), method)
        else:
            method = ef.ErrorFeedback(ef.TopK(0.05))
            optimizer = updates(model, method, inner=sgd, local_steps=1)
        for _ in range(20):
            step(model, optimizer, next_batch())
        ends.append(flat(model))
    return {"off": float((ends[0] - ends[1]).abs().max()), "moved": float(ends[0].abs().max())}


def compressed():
    """Over exchanges, with a last one before it is due; bytes, counts and a log."""
    facts = {}
    for exchange, method in EXCHANGES.items():
        model, next_batch = build_model(), batches(hvd.rank())
        optimizer = updates(model, method, exchange=exchange)
        log = ef.TrainingLog(OUT / f"{exchange}-{hvd.rank()}.jsonl", optimizer, every=1)
        for _ in range(2 * EVERY + 2):
            step(model, optimizer, next_batch())
            log.step(1.0)
        before = digest(model)
        with torch.inference_mode():  # as in a validation
            optimizer.exchange()
        total = optimizer.stats()[-1]
        log.close()
        end = digest(model)
        optimizer.exchange()  # does nothing
        steps = optimizer.drivers[0].steps_taken()
        facts[exchange] = {
            "before": before, "end": end, "steps": [total.steps, steps], "ratio": total.ratio,
            "again": digest(model), "wire": total.bytes_out, "dense": total.dense_bytes_out,
        }  # fmt: skip
    return facts


def spoiled():
    """A NaN leaves out a step on its rank alone; one in a change drops the exchange on all."""
    model, next_batch, last = build_model(), batches(hvd.rank()), hvd.rank() == hvd.size() - 1
    optimizer = updates(model)
    skipped = [
        step(model, optimizer, next_batch(), spoiled=last and i in (1, 4)) for i in range(EVERY)
    ]
    good = digest(model)
    for _ in range(EVERY - 1):
        step(model, optimizer, next_batch())
    if last:
        with torch.no_grad():
            model[0].bias[0] = torch.inf
    optimizer.exchange()
    return {
        "skipped": skipped, "good": good, "back": digest(model), "dropped": optimizer.step_skipped,
        "counted": optimizer.stats()[-1].skipped, "steps": optimizer.drivers[0].steps_taken(),
    }  # fmt: skip


def scaled():
    """A loss scaler on each rank; an overflow lowers its scale on that rank alone."""
    model, next_batch, last = build_model(), batches(hvd.rank()), hvd.rank() == hvd.size() - 1
    optimizer = updates(model)
    scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=1000)
    skipped = []
    for i in range(EVERY):
        inputs, labels = next_batch()
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(inputs), labels)).backward()
        if last and i == 2:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)  # hides the infinity
        scaler.step(optimizer)
        skipped.append(optimizer.step_skipped)
        scaler.update()
    return {"scale": scaler.get_scale(), "end": digest(model), "skipped": skipped}


def resumed():
    """From a checkpoint between two exchanges, to the last bit."""
    whole, again, next_batch = build_model(), build_model(seed=9), batches(hvd.rank())
    optimizer = updates(whole)
    for _ in range(EVERY + 2):
        step(whole, optimizer, next_batch())
    again.load_state_dict(whole.state_dict())
    other = updates(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_compression_state_dict(copy.deepcopy(optimizer.compression_state_dict()))
    for _ in range(2 * EVERY - 2):
        batch = next_batch()
        step(whole, optimizer, batch)
        step(again, other, batch)
    ends = {"whole": digest(whole), "again": digest(again)}
    steps = [one.drivers[0].steps_taken() for one in (optimizer, other)]
    ef.save(OUT / "merged", optimizer)
    third = updates(build_model())
    ef.load(OUT / "merged", third)
    return ends | {"steps": [*steps, third.drivers[0].steps_taken()]}


class FailsOnce(torch.optim.SGD):
    failed = False

    def step(self, closure=None):
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise MemoryError("once")
        return super().step(closure)


def failed():
    """After a step that raised, steps begin from the weights that were loaded since."""
    ends = []
    for raises in (True, False):
        model, next_batch = build_model(), batches(hvd.rank())
        kind = FailsOnce if raises else torch.optim.SGD
        optimizer = updates(model, inner=kind(model.parameters(), 0.05), check_sync=False)
        if raises:
            raised = error_of(lambda o=optimizer, m=model: step(m, o, batches(hvd.rank())()))
        model.load_state_dict(build_model(seed=9).state_dict())
        for _ in range(EVERY):
            step(model, optimizer, next_batch())
        ends.append(digest(model))
    return {"raised": raised, "ends": ends}


def refusals():
    def make(**options):
        return error_of(lambda: updates(build_model(), **options))

    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = updates(model)
    step(model, optimizer, next_batch())
    unlike = updates(build_model(), local_steps=2 + hvd.rank())
    between = optimizer.compression_state_dict()
    single, other = updates(build_model(), local_steps=1), updates(torch.nn.Linear(40, 60))
    uneven_model = build_model()
    uneven = updates(uneven_model)
    for _ in range(1 + hvd.rank()):
        step(uneven_model, uneven, next_batch())
    return {
        "single": error_of(lambda: single.load_compression_state_dict(between)),
        "other": error_of(lambda: other.load_compression_state_dict(between)),
        "uneven": error_of(uneven.exchange),
        "unwrap": error_of(optimizer.unwrap),
        "save": error_of(lambda: ef.save(OUT / "between", optimizer)),
        "steps": make(local_steps=0),
        "decay": error_of(lambda: ef.ErrorFeedback(ef.OneBit(), decay=0)),
        "unlike": error_of(unlike.step),
    }


def main() -> None:
    hvd.init()
    scenarios = (means, one_step, compressed, spoiled, scaled, resumed, failed, refusals)
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
