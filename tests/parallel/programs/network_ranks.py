"""One training of experiments/networks.py by four of five ranks; facts for the tests to judge."""

from __future__ import annotations

import numpy as np
from common import report

import ef_horovod as ef
from ef_horovod.transports.mpi import MPITransport
from experiments.images import Images
from experiments.networks import Convolutional, Plan, Rate, Trainer
from experiments.workers import Workers


def images() -> Images:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
    labels = rng.integers(0, 10, 60)
    return Images(pixels[:40], labels[:40], pixels[40:], labels[40:])


def facts(workers: Workers) -> dict[str, object]:
    trainer = Trainer(Convolutional(4), images(), batch=4, looks=2, workers=workers)
    sign = ef.OneBit()
    plans = {
        "both ways": Plan("", ef.DoubleSqueeze(sign, server_compressor=sign), Rate(0.1, ()), 4),
        "threshold": Plan("", ef.ErrorFeedback(ef.HardThreshold(0.05)), Rate(0.1, ()), 4),
    }
    trained = {name: trainer.train(plan) for name, plan in plans.items()}
    return {name: [t.loss, t.up, t.down, t.sent, t.entries, t.error] for name, t in trained.items()}


if __name__ == "__main__":
    everyone = MPITransport()
    part = Workers(everyone).part(4)
    result = {"takes part": part is not None}
    if part is not None:
        result |= {"leads": part.leads, "ranks": facts(part)}
        if part.leads:
            result["one process"] = facts(Workers())
    report(everyone.rank, result)
