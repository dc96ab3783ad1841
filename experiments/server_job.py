"""Trainings of the networks by a real parameter server: rank 0 serves, all others are workers."""

from __future__ import annotations

import pickle

import numpy as np

from ef_horovod import server  # whose parts load MPI when they are used
from experiments.errors import Refused
from experiments.networks import WORKERS, Plan, Trained, Trainer
from experiments.workers import Workers

RANKS = 1 + WORKERS


def require_ranks(workers: Workers) -> None:
    """Whether this is a job of one server and WORKERS workers.

    Raises:
        Refused: it is not.
    """
    ranks = 1 if workers.transport is None else workers.transport.size
    if ranks != RANKS:
        raise Refused(
            f"got {ranks} rank{'s' * (ranks > 1)}, expected {RANKS}: a server and {WORKERS} "
            f"workers; start it with mpirun -np {RANKS} and --mpi, as launch/reproduce does"
        )


def train_by_server(ranks: Workers, trainer: Trainer, plan: Plan) -> Trained:
    """Run a training; all ranks call it and get what the first worker recorded.

    Args:
        ranks: of this job.
        trainer: whose network and looks are taken, but not its workers.
        plan: of the training. The whole gradient is one vector, as in the paper: no parameters
            stay uncompressed. Bytes are those that the first worker sent and received.
    """
    if ranks.leads:
        server.Server(plan.method).run()
        data = b"-"
    else:
        data = pickle.dumps(_work(trainer, plan))
    parts = ranks.transport.allgather("trained", np.frombuffer(data, np.uint8))()
    trained: Trained = pickle.loads(parts[1].tobytes())
    return trained


def _work(trainer: Trainer, plan: Plan) -> Trained:
    """All steps of one worker; only the first looks at the network, the others wait for it."""
    network, looks = trainer.network, trainer.look_steps(plan.steps)
    x = network.start(plan.seed)
    trained = Trained(plan, x.size)
    with server.Worker([x], plan.method, dense=_nothing, seed=plan.seed) as worker:
        for step in range(plan.steps):
            directions = worker.push_pull([network.gradient(worker.rank, x, step, plan.seed)])
            total, done = worker.stats()[-1], step + 1
            if directions is None:  # some gradient is not finite; all workers hear of it
                trained.give_up(looks, total.bytes_out / done, total.bytes_in / done)
                break
            x = x - plan.rate(step, plan.steps) * directions[0]
            if worker.rank == 0 and done in looks:
                trained.steps.append(done)
                trained.up.append(total.bytes_out)
                trained.down.append(total.bytes_in)
                trained.loss.append(network.training_loss(x))
                trained.accuracy.append(network.accuracy(x))
    return trained


def _nothing(name: str, parameter: np.ndarray) -> bool:
    """What stays uncompressed."""
    return False
