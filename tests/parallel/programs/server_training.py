"""Trainings of experiments/server_job.py by a server and four workers; facts for the tests."""

from __future__ import annotations

from common import report
from network_ranks import images

import ef_horovod as ef
from ef_horovod.transports.mpi import MPITransport
from experiments.networks import Convolutional, Plan, Rate, Trained, Trainer
from experiments.server_job import require_ranks, train_by_server
from experiments.workers import Workers

STEPS = 4


def facts(trained: Trained) -> dict[str, object]:
    """What a server must not change, and bytes."""
    return {
        "same": [trained.parameters, trained.steps, trained.loss, str(trained.accuracy)],
        "bytes": [trained.up, trained.down],
    }


if __name__ == "__main__":
    ranks = Workers(MPITransport())
    require_ranks(ranks)
    trainer = Trainer(Convolutional(4), images(), batch=4, looks=2, workers=Workers())
    sign = ef.OneBit("l2")
    plans = {
        "both ways": Plan("", ef.DoubleSqueeze(sign, server_compressor=sign), Rate(0.1, ()), STEPS),
        "diverges": Plan("", ef.NoFeedback(ef.Identity()), Rate(1e30, ()), STEPS),
    }
    result = {
        "served": {key: facts(train_by_server(ranks, trainer, p)) for key, p in plans.items()}
    }
    if ranks.leads:
        result["one process"] = {key: facts(trainer.train(p)) for key, p in plans.items()}
    report(ranks.transport.rank, result)
