"""Workers that do what they must not; worker 1 is the odd one out.

Arguments: the scenario, or several that are jobs of their own, one after the other.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
import psutil
from common import ARGUMENTS, error_of, report
from meeting import meet
from mpi4py import MPI
from server_faults_model import SHAPES, gradients

import ef_horovod as ef
from ef_horovod.errors import ProtocolError
from ef_horovod.exchange.channel import finish_step
from ef_horovod.server import ServerTransport, Worker
from ef_horovod.server.protocol import Kind, Message, body_text, pack, unpack
from ef_horovod.training.choice import open_channel

EF21 = ef.EF21(ef.TopK(ratio=0.05))
MPI_RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])
ODD = int(os.environ["OMPI_COMM_WORLD_SIZE"]) - 1  # the last worker


def steps(worker, first, last):
    for step in range(first, last):
        worker.push_pull(gradients(worker.rank, step))


def odd():
    return MPI_RANK == ODD


def arrays(shapes=SHAPES):
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def another_method():
    return error_of(lambda: Worker(arrays(), ef.EF21(ef.TopK(ratio=0.06 if odd() else 0.05))))


def another_shape():
    return disagreement({**SHAPES, "b": (41 if odd() else 40,)})


def another_name():
    return disagreement({"w": (50, 40), "c" if odd() else "b": (40,)})


def disagreement(shapes):
    transport = ServerTransport()
    error = error_of(lambda: Worker(arrays(shapes), EF21, transport=transport))
    transport.close()
    return error


def all_alike():
    return error_of(lambda: Worker(arrays(), EF21))


def train():
    return error_of(lambda: steps(Worker(arrays(), EF21), 0, 4))


def silent():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 3)
    begin = time.monotonic()
    if odd():
        time.sleep(60)
    error = error_of(lambda: steps(worker, 3, 5))
    return f"{time.monotonic() - begin:.1f} s: {error}"


def late():
    """Workers come to a round one after the other, the last one not within the limit."""
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 1)
    time.sleep((0, 4, 40)[worker.rank])
    begin = time.monotonic()
    error = error_of(lambda: steps(worker, 1, 2))
    return f"{time.monotonic() - begin:.1f} s: {error}"


def pauses():
    """Longer than the limit, of all workers at once: before the first step and between two."""
    transport = ServerTransport()
    time.sleep(5)
    with Worker(arrays(), EF21, transport=transport) as worker:
        time.sleep(5)
        steps(worker, 0, 3)
        worker.checkpoint()
        time.sleep(5)
        steps(worker, 3, 5)
    return worker.step


def one_checkpoint():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 1)
    if odd():
        time.sleep(40)
    return error_of(worker.checkpoint)


def closed():
    """What a closed worker says, in which time; the workers can still wait for each other."""
    with Worker(arrays(), EF21) as worker:
        steps(worker, 0, 2)
    sys.last_value = ValueError("an old one, which IPython has shown")
    actions = {
        "push_pull": lambda: worker.push_pull(gradients(0, 0)),
        "rounds": lambda: worker.rounds(gradients(0, 0)),
        "push": lambda: worker.push("w", gradients(0, 0)["w"]),
        "pull": worker.pull,
        "checkpoint": worker.checkpoint,
        "another Worker": lambda: Worker(arrays(), EF21, transport=worker.transport),
    }
    begin = time.monotonic()
    errors = {name: error_of(action) for name, action in actions.items()}
    errors["seconds"] = time.monotonic() - begin
    worker.transport.barrier("closed")
    worker.close()
    return errors


def old_error():
    """Somebody caught an error long ago, as IPython does, and then ends in order."""
    sys.last_value = ValueError("an old one")
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 2)
    transport, said = worker.transport, []
    send = transport._send
    transport._send = lambda data, *to: (said.append(body_text(unpack(data)[1])), send(data, *to))
    worker.close()
    return said


def collective_of_all_ranks():
    with Worker(arrays(), EF21) as worker:
        steps(worker, 0, 2)
        MPI.COMM_WORLD.Barrier()


def collective_of_all_ranks_after_the_end():
    world = MPI.COMM_WORLD
    with Worker(arrays(), EF21) as worker:
        steps(worker, 0, 2)
    return world.allgather(worker.step)


def another_after_the_end():
    with Worker(arrays(), EF21) as worker:
        steps(worker, 0, 2)
    begin = time.monotonic()
    error = error_of(lambda: Worker(arrays(), EF21))
    return error, time.monotonic() - begin


def missing():
    if odd():
        time.sleep(60)
    return error_of(lambda: Worker(arrays(), EF21))


def killed():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 3)
    if odd():
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: steps(worker, 3, 5))


def server_killed():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 3)
    if odd():
        server_process().kill()
    return error_of(lambda: steps(worker, 3, 5))


def server_stopped():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 3)
    begin = time.monotonic()
    if odd():
        server_process().suspend()
    report(worker.rank, error_of(lambda: steps(worker, 3, 100_000)))
    print(f"after {time.monotonic() - begin:.0f} s", flush=True)
    steps(worker, 3, 4)  # raises again, at once, and ends the job


def server_process():
    """The one child of mpirun that is a server."""
    children = psutil.Process(os.getppid()).children()
    (server,) = (child for child in children if "ef_horovod.server" in child.cmdline())
    return server


def failing():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 3)
    if odd():
        raise ValueError("no data left")
    return error_of(lambda: steps(worker, 3, 5))


def early_end():
    worker = Worker(arrays(), EF21)
    steps(worker, 0, 3)
    if odd():
        worker.close()
        return ""
    return error_of(lambda: steps(worker, 3, 5))


def never_a_worker():
    return "" if odd() else error_of(lambda: Worker(arrays(), EF21))


def fails_before_it_is_a_worker():
    if odd():
        raise ValueError("no data at all")
    return error_of(lambda: Worker(arrays(), EF21))


def leaves_before_its_first_step():
    transport = ServerTransport()
    return "" if odd() else error_of(lambda: Worker(arrays(), EF21, transport=transport))


def all_leave_before_their_first_step():
    ServerTransport()
    return ""


def wrong_shape():
    with Worker(arrays(), EF21) as worker:
        wrong = {**gradients(0, 0), "b": np.zeros(41)}
        errors = [
            error_of(lambda: worker.push_pull(wrong)),
            error_of(lambda: worker.push("x", np.zeros(3))),
            error_of(worker.pull),
            error_of(lambda: worker.push("w", gradients(0, 0)["w"])),
        ]
        worker.push_pull({"b": np.zeros(40)})
        return errors


def traffic():
    """Bytes of 1-bit and top-k messages, counted where they are handed to MPI."""
    transport, rows = ServerTransport(), {}
    zeros = np.zeros(100_000, np.float32)
    methods = {
        "onebit": ef.DoubleSqueeze(ef.OneBit(), ef.OneBit()),
        "topk": ef.DoubleSqueeze(ef.TopK(0.01), ef.TopK(0.01)),
        "dense": ef.NoFeedback(ef.Identity()),
    }
    channels = {
        name: open_channel(name, zeros, method, transport, exchange="server")
        for name, method in methods.items()
    }
    for step in range(4):
        for channel in channels.values():
            rng = np.random.default_rng((transport.rank, step))
            channel.gradient[:] = rng.standard_normal(zeros.size, np.float32)
            channel.start(step)
        finish_step(list(channels.values()))
    for name, channel in channels.items():
        stats = channel.stats()
        rows[name] = [stats.dense_bytes_out, stats.bytes_out, stats.bytes_in]
    transport.close()
    return rows


class Rogue:
    """Sends raw bytes past the library, and hears what the server says to them."""

    def __init__(self, transport):
        self.transport = transport

    def send(self, data, tag):
        server = self.transport._group.servers[0]
        self.transport._send(np.ascontiguousarray(data, np.uint8), [server], tag)
        deadline = time.monotonic() + 20
        while self.transport._broken is None and time.monotonic() < deadline:
            self.transport._move_on()
            time.sleep(1e-3)
        error, self.transport._broken = self.transport._broken, None
        assert isinstance(error, ProtocolError), "the server did not refuse it"
        return str(error)

    def send_again(self, step):
        """Another message of a round that has one of this worker already."""
        bucket = self.transport._buckets[1]
        mark = self.transport._config.fingerprint
        header = Message(Kind.PUSH, self.transport.rank, 1, step, bucket.round, mark)
        body = EF21.compressor.compress(np.ones(2000, np.float32)).data
        return self.send(pack(header, body), 2)

    def attack(self, step):
        """What the server says to each of these messages."""
        rng, transport = np.random.default_rng(0), self.transport
        index = 1  # of the bucket with w
        bucket, tag = transport._buckets[index], index + 1
        mark = transport._config.fingerprint
        due = Message(Kind.PUSH, transport.rank, index, step, bucket.round, mark)
        body = EF21.compressor.compress(rng.standard_normal(2000, np.float32)).data
        damaged, malformed = pack(due, body), body.copy()
        damaged[-1] ^= 1
        malformed[16] += 1  # one entry more than there are; its checksum is right
        return {
            "nothing": self.send([], tag),
            "few bytes": self.send(rng.integers(0, 256, 7), tag),
            "random bytes": self.send(rng.integers(0, 256, 200), tag),
            "too many bytes": self.send(rng.integers(0, 256, 10_000_000), tag),
            "another tag": self.send(rng.integers(0, 256, 200), 99),
            "control tag": self.send(rng.integers(0, 256, 200), 0),
            "another bucket": self.send(pack(due._replace(bucket=0), body), tag),
            "another worker": self.send(pack(due._replace(worker=0), body), tag),
            "another config": self.send(pack(due._replace(fingerprint=3), body), tag),
            "another kind": self.send(pack(due._replace(kind=Kind.NUMBERS), body), tag),
            "hello again": self.send(pack(Message(Kind.HELLO, 1), body), 0),
            "twice": self.send(pack(due._replace(round=due.round - 1, step=step - 1), body), tag),
            "early": self.send(pack(due._replace(round=due.round + 1, step=step + 1), body), tag),
            "another step": self.send(pack(due._replace(step=step + 1), body), tag),
            "damaged": self.send(damaged, tag),
            "malformed": self.send(pack(due, malformed), tag),
        }


def rogue():
    """Attacks between good steps; where these lead is compared by the test."""
    transport = ServerTransport()
    worker = Worker(arrays(), EF21, transport=transport)
    answers = {}
    x = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for step in range(8):
        if step == 4 and odd():
            answers = Rogue(transport).attack(step)
        if step == 5:
            time.sleep(0 if odd() else 2)  # worker 1's message lies there and waits
        for name, gradient in gradients(worker.rank, step).items():
            worker.push(name, gradient)
        if step == 5 and odd():
            answers["other numbers"] = Rogue(transport).send_again(step)
        directions = worker.pull()
        x = {name: x[name] - directions[name] for name in x}
    transport.close()
    return {"answers": answers, "x": {name: value.tolist() for name, value in x.items()}}


def main() -> None:
    if len(ARGUMENTS) > 1:  # then so does server_again.py
        meet()
    results = [globals()[scenario]() for scenario in ARGUMENTS]
    servers = ODD + 1 - (3 if "late" in ARGUMENTS else 2)
    report(MPI_RANK - servers, results[0] if len(results) == 1 else results)


if __name__ == "__main__":
    main()
