"""Trains, saves and goes on (`save`); goes on from there in another process (`resume`).

A process of three ranks (`more_ranks`) goes on from what two ranks have saved. Arguments: one of
the three, a folder, and the cases, such as "Loop-ef21".
"""

from __future__ import annotations

import warnings
from pathlib import Path

import horovod.tensorflow as hvd
import tensorflow as tf
from common import ARGUMENTS, error_of, report
from tf_checkpoint_ways import EF21, RANDOM, STEPS, TOP, WAYS, Loop, Pickle
from tf_common import digest

import ef_horovod.tensorflow as ef

TASK, SAVED = ARGUMENTS[0], Path(ARGUMENTS[1])
KINDS = {way.__name__: way for way in WAYS}
METHODS = {"ef21": EF21, "random": RANDOM, "top": TOP}
CASES = {
    case: (KINDS[case.partition("-")[0]], METHODS[case.partition("-")[2]]) for case in ARGUMENTS[2:]
}


def folder_of(name: str, rank: int | None = None) -> Path:
    return SAVED / name / str(hvd.rank() if rank is None else rank)


def save():
    """Each way to save: half the training, a file, the other half."""
    ends, momentum = {}, {}
    for name, (way, method) in CASES.items():
        folder = folder_of(name)
        folder.mkdir(parents=True)
        training = way(method, folder)
        training.train(0, STEPS)
        training.save()
        if name.startswith(("WholeModel", "AccumulatingModel")):
            momentum[name] = digest(training.optimizer.momentums)
        training.train(STEPS, 2 * STEPS)
        ends[name] = digest(training.variables)
    return {"ends": ends, "momentum": momentum}


def resume():
    ends = {}
    for name, (way, method) in CASES.items():
        training = way(method, folder_of(name), seed=5)
        training.restore()
        training.train(STEPS, 2 * STEPS)
        ends[name] = digest(training.variables)
    scenarios = (
        without_memories, without_the_step, of_rank_0, of_another_method, after_the_first_step,
        one_rank_loads_anothers, broadcast,
    )  # fmt: skip
    return {"ends": ends} | {scenario.__name__: scenario() for scenario in scenarios}


def without_memories():
    """Parameters and momentum restored, error memories forgotten."""
    training = Pickle(EF21, folder_of("Pickle-ef21"), seed=5)
    training.restore(memories=False)
    training.train(STEPS, 2 * STEPS)
    return digest(training.variables)


def without_the_step():
    """All restored but the step, which random compressors draw from."""
    training = Pickle(RANDOM, folder_of("Pickle-random"), seed=5)
    training.restore(step=0)
    training.train(STEPS, 2 * STEPS)
    return digest(training.variables)


def restored_loop(rank: int, method=EF21):
    """Training that goes on from one rank's checkpoint, and what it warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training = Loop(method, folder_of("Loop-ef21", rank), seed=5)
        training.restore()
        training.train(STEPS, 2 * STEPS)
    ours = [str(w.message) for w in caught if "error-feedback state starts" in str(w.message)]
    return training, {"end": digest(training.variables), "warnings": ours}


def of_rank_0():
    """The usual pattern: rank 0 has saved, and all ranks restore its checkpoint."""
    training, facts = restored_loop(0)
    return facts | {"step": training.optimizer.compression_state_dict()["step"]}


def of_another_method():
    """A checkpoint of a run with another compression."""
    return restored_loop(hvd.rank(), TOP)[1]


def after_the_first_step():
    """A checkpoint that does not fit, when all ranks are under way; then one that does."""
    training, _ = restored_loop(hvd.rank())
    end = digest(training.variables)
    other = Loop(EF21, folder_of("Loop-ef21", 1 - hvd.rank()))
    error = error_of(lambda: training.checkpoint.read(str(other.folder / "checkpoint")))
    training.restore()
    training.train(STEPS, 2 * STEPS)
    return {"error": error, "end": end, "again": digest(training.variables)}


def one_rank_loads_anothers():
    """Rank 1 loads rank 0's state by hand: that is a mistake, and both ranks are told."""
    training = Pickle(EF21, folder_of("Pickle-ef21", 0), seed=5)
    training.restore()
    return error_of(lambda: training.train(STEPS, 2 * STEPS))


def broadcast():
    """Broadcasts of optimizer variables, as in Horovod's examples, leave memories alone."""
    training = Loop(EF21, folder_of("Loop-ef21"), seed=5)
    training.restore()
    training.train(STEPS, 2 * STEPS)
    optimizer = training.optimizer
    before = memories_of(optimizer)
    optimizer.variables[1].assign(optimizer.variables[1] + hvd.rank())
    hvd.broadcast_variables([v.value for v in optimizer.variables], root_rank=0)
    ef.broadcast_variables(optimizer.variables)
    return {
        "before": before,
        "after": memories_of(optimizer),
        "variables": digest(optimizer.variables),
    }


def memories_of(optimizer) -> str:
    """Hash of a rank's own memories, which differ between ranks."""
    parameters = optimizer.compression_state_dict()["parameters"]
    own = [fields["worker.tracked"] for fields in parameters.values() if "worker.tracked" in fields]
    assert own, parameters.keys()
    return digest(own)


def more_ranks():
    """Three ranks go on from checkpoints of two."""
    return restored_loop(hvd.rank() % 2)[1]


def main() -> None:
    hvd.init()
    assert TASK in ("save", "resume", "more_ranks"), TASK
    report(hvd.rank(), {"save": save, "resume": resume, "more_ranks": more_ranks}[TASK]())
    hvd.allreduce(tf.zeros(1), name="end")  # a rank that ends early shuts Horovod down for all


main()
