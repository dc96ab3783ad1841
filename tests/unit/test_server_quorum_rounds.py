"""Rounds that some of the workers make: nothing is lost, and all apply the same rounds."""

from __future__ import annotations

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.errors import ProtocolError
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import MISSED, Kind, Message, unpack
from ef_horovod.server.quorum import FARTHEST_BEHIND, Participation, QuorumBucket
from ef_horovod.testing.pairs import selection
from ef_horovod.training.choice import open_channel
from ef_horovod.transports.base import Answer, Transport

D, WORKERS, MARK = 64, 4, 7
NAMES = ("a", "b")


class Link(Transport):
    """A worker's transport; messages and answers lie in lists."""

    has_server = True

    def __init__(self, rank):
        super().__init__(rank, WORKERS)
        self.round = dict.fromkeys(NAMES, 0)
        self.out, self.answers = [], {name: [] for name in NAMES}

    def open_bucket(self, name, length, method, seed):
        pass

    def ask(self, name, payload, step):
        header = Message(Kind.PUSH, self.rank, NAMES.index(name), step, self.round[name], MARK)
        self.out.append((name, header, payload))

        def finish():
            here = self.answers[name]
            counted = next(i for i, answer in enumerate(here) if answer.counted)
            found, self.answers[name] = here[: counted + 1], here[counted + 1 :]
            self.round[name] += len(found)
            return found

        return finish

    def catch_up(self):
        rounds = min(len(found) for found in self.answers.values())
        later = [self.answers[name][:rounds] for name in NAMES]
        for name in NAMES:
            self.round[name] += rounds
            del self.answers[name][:rounds]
        return later

    allgather = allreduce = None

    @property
    def answered(self):
        return all(any(one.counted for one in found) for found in self.answers.values())


class Job:
    """Workers and a server with two buckets, in an order of events that is drawn."""

    def __init__(self, method, quorum, seed=0, *, catches_up=True):
        self.catches_up = catches_up
        self.rng = np.random.default_rng(seed)
        self.participation = Participation(quorum, WORKERS)
        self.buckets = {
            name: QuorumBucket(
                i, BucketSpec(name, D, repr(method), 0), WORKERS, MARK, self.participation
            )
            for i, name in enumerate(NAMES)
        }
        self.links = [Link(rank) for rank in range(WORKERS)]
        zeros = np.zeros(D, np.float32)
        self.channels = [
            [open_channel(name, zeros, method, link, exchange="server") for name in NAMES]
            for link in self.links
        ]
        self.waiting = [False] * WORKERS
        self.given = np.zeros((WORKERS, len(NAMES), D))
        self.directions = [[] for _ in range(WORKERS)]  # of each worker, a list of rounds
        self.members = {name: [] for name in NAMES}  # of each round

    def push(self, rank, bad=False):
        for i, channel in enumerate(self.channels[rank]):
            gradient = self.rng.integers(-9, 9, D).astype(np.float32)
            if bad and i == 0:
                gradient[3] = np.nan
            else:
                self.given[rank, i] += gradient
            channel.gradient[:] = gradient
            channel.start(len(self.directions[rank]))
        self.waiting[rank] = True

    def deliver(self, rank):
        """One of a worker's messages reaches the server."""
        name, header, body = self.links[rank].out.pop(0)
        self.buckets[name].accept(rank, header, body)
        self.answer()

    def answer(self):
        for name, bucket in self.buckets.items():
            for data, workers in bucket.answers():
                header, body = unpack(data)
                if not header.flags & MISSED:
                    self.members[name].append(sorted(workers))
                for worker in workers:
                    self.links[worker].answers[name].append(read(header, body))

    def pull(self, rank):
        assert all(channel.arrived() in (True, False) for channel in self.channels[rank])
        later = self.links[rank].catch_up() if self.catches_up else [(), ()]
        parts = [
            channel.commit_rounds(answers)
            for channel, answers in zip(self.channels[rank], later, strict=True)
        ]
        self.directions[rank] += [np.concatenate(pair) for pair in zip(*parts, strict=True)]
        self.waiting[rank] = False

    def run(self, events):
        """Random events; worker 0 is slow."""
        for _ in range(events):
            rank = int(self.rng.choice(WORKERS, p=[0.04, 0.32, 0.32, 0.32]))
            if not self.waiting[rank]:
                self.push(rank)
            elif self.links[rank].out:
                self.deliver(rank)
            elif self.links[rank].answered:
                self.pull(rank)

    def end(self):
        """Workers end one after the other, when they have their answers."""
        for _ in range(1000):
            for rank in sorted(self.participation.present):
                while self.links[rank].out:
                    self.deliver(rank)
                if not self.waiting[rank] or self.links[rank].answered:
                    if self.waiting[rank]:
                        self.pull(rank)
                    self.participation.present.discard(rank)
                    self.answer()
            if not self.participation.present:
                return
        raise AssertionError("some workers wait for ever")


def read(header, body):
    counted = not header.flags & MISSED
    if header.kind is Kind.PAYLOAD:
        return Answer(payload=body, counted=counted)
    if header.kind is Kind.NUMBERS:
        return Answer(numbers=body.view(np.float32), counted=counted)
    return Answer(counted=counted)


METHODS = [method for method in selection() if method.can_listen]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_workers_apply_the_same_rounds(method):
    job = Job(method, quorum=2)
    job.run(600)
    job.end()
    longest = max(job.directions, key=len)
    assert len(longest) > 20
    for mine in job.directions:
        assert len(mine) > 3
        np.testing.assert_array_equal(mine, longest[: len(mine)])
    assert job.members["a"] == job.members["b"]
    sizes = [len(members) for members in job.members["a"]]
    assert 2 in sizes
    assert any(0 not in members for members in job.members["a"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("quorum", [1, 2, 3])
def test_what_was_sent_and_the_errors_are_the_gradients(quorum, seed):
    """With integers and four workers no sum is rounded."""
    job = Job(ef.ErrorFeedback(ef.TopK(k=7)), quorum, seed, catches_up=seed > 1)
    job.run(700)
    job.end()
    applied = max(job.directions, key=len)
    errors = np.array([[channel.worker.error for channel in one] for one in job.channels])
    said = WORKERS * np.sum(applied, axis=0, dtype=np.float64).reshape(len(NAMES), D)
    np.testing.assert_array_equal(said + errors.sum(0), job.given.sum(0))
    assert np.any(errors)


def test_a_gradient_that_is_not_finite_is_left_out():
    job = Job(ef.ErrorFeedback(ef.TopK(k=7)), quorum=2)
    for turn in range(6):
        for rank in (1, 2):
            job.push(rank, bad=turn == 3 and rank == 1)
            while job.links[rank].out:
                job.deliver(rank)
        for rank in (1, 2):
            job.pull(rank)
    job.push(0)  # late by six rounds
    job.end()
    applied = max(job.directions, key=len)
    assert np.all(np.isfinite(applied))
    errors = np.array([[channel.worker.error for channel in one] for one in job.channels])
    said = WORKERS * np.sum(applied, axis=0, dtype=np.float64).reshape(len(NAMES), D)
    np.testing.assert_array_equal(said + errors.sum(0), job.given.sum(0))
    assert len(job.directions[0]) == 7


def test_nobody_falls_behind_without_limit():
    job = Job(ef.ErrorFeedback(ef.TopK(k=7)), quorum=1)
    for _ in range(FARTHEST_BEHIND):
        job.push(1)
        job.deliver(1)
        job.deliver(1)
        job.pull(1)
    job.push(1)
    job.deliver(1)
    job.deliver(1)
    assert not job.links[1].answered  # the round waits for the others now
    assert job.buckets["a"].missing == [0, 2, 3]
    for rank in (0, 2, 3):
        job.push(rank)
        job.deliver(rank)
        job.deliver(rank)
    assert job.links[1].answered
    job.pull(0)
    assert len(job.directions[0]) == FARTHEST_BEHIND + 1


@pytest.mark.parametrize("turn", [1, 9])
def test_messages_of_rounds_that_are_not_due_are_refused(turn):
    job = Job(ef.ErrorFeedback(ef.TopK(k=7)), quorum=2)
    job.push(1)
    name, header, body = job.links[1].out[0]
    with pytest.raises(ProtocolError, match=f"for round {turn}, expected one from 0 to 0"):
        job.buckets[name].accept(1, header._replace(round=turn), body)
    job.deliver(1)
    with pytest.raises(ProtocolError, match="worker 1 sent 'a' twice in round 0"):
        job.buckets[name].accept(1, header, body)
