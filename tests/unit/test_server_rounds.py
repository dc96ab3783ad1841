"""A server's rounds without MPI: what is accepted, what is refused, and going back."""

from __future__ import annotations

import numpy as np
import pytest
from workers import memory

import ef_horovod as ef
from ef_horovod.errors import ProtocolError, ServerError
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import Kind, Message, pack, unpack
from ef_horovod.server.rounds import ServedBucket
from ef_horovod.testing.pairs import every_method

D, WORKERS, MARK = 300, 3, 77
EF21 = ef.EF21(ef.TopK(k=9))


def make(method=EF21, workers=WORKERS):
    return ServedBucket(4, BucketSpec("b", D, repr(method), 1), workers, MARK)


class Crew:
    """Workers of a bucket, as channels are."""

    def __init__(self, method, workers=WORKERS):
        self.method, self.count = method, workers
        self.states = [method.init(np.zeros(D, np.float32), workers)[0] for _ in range(workers)]
        self.round = 0

    def messages(self, step, bad=None, attempt=0):
        """(header, body) of each worker; they only commit in `pull`."""
        self.pushed = []
        for i, state in enumerate(self.states):
            gradient = np.random.default_rng((i, step, attempt)).standard_normal(D, np.float32)
            key = ef.Key(1, step, ef.arrays.keys.tensor_id("b"), i, self.count)
            payload, after = self.method.push(state, gradient, key)
            payload = self.method.skip(gradient, key) if i == bad else payload
            self.pushed.append(after)
            yield Message(Kind.PUSH, i, 4, step, self.round, MARK), payload.data
        self.round += 1

    def pull(self, answer):
        message, body = unpack(answer)
        if message.kind is Kind.NUMBERS:
            aggregates = [body.view(np.float32)] * self.count
        else:
            aggregates = [ef.Payload(body) for _ in self.states]
        pulled = [self.method.pull(s, a) for s, a in zip(self.pushed, aggregates, strict=True)]
        self.states = [state for _, state in pulled]
        return pulled[0][0].copy()


def serve(bucket, messages):
    done = [bucket.accept(i, header, body) for i, (header, body) in enumerate(messages)]
    assert done == [False] * (bucket.workers - 1) + [True]
    return bucket.answer()


def state_of(bucket):
    return memory(bucket.method, bucket.state)


FLUSHES = [  # dense messages in steps 1 and 3, whose first attempts are dropped
    ef.PerturbedCompressedSGD(compressor, reset_every=2)
    for compressor in (ef.TopK(k=5), ef.HardThreshold(1.0), ef.OneBit())
]


@pytest.mark.parametrize("method", [*every_method(), *FLUSHES], ids=repr)
def test_dropped_steps_leave_no_trace(method):
    """A NaN here, or one in another bucket of which this one hears a round later."""
    crew, plain_crew = Crew(method), Crew(method)
    bucket, plain = make(method), make(method)
    for step in range(5):
        if step in (1, 3):  # a NaN in this bucket
            answer = serve(bucket, crew.messages(step, bad=1))
            assert unpack(answer)[0].kind is Kind.DROP
        if step in (2, 3):  # good here, but the workers drop the step
            serve(bucket, crew.messages(step, attempt=1))
        direction = crew.pull(serve(bucket, crew.messages(step)))
        expected = plain_crew.pull(serve(plain, plain_crew.messages(step)))
        np.testing.assert_array_equal(direction, expected)
        assert state_of(bucket) == state_of(plain)
    assert (bucket.step, bucket.round, bucket.dropped) == (5, 9, 4)
    assert (plain.step, plain.round, plain.dropped) == (5, 5, 0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"fingerprint": 78}, "with another config's fingerprint"),
        ({"worker": 2}, "worker 1 sent 'b' in the name of worker 2"),
        ({"round": 0}, "for round 0, late or twice, expected round 1"),
        ({"round": 2}, "for round 2, early, expected round 1"),
        ({"step": 5}, "for step 5, expected step 1"),
    ],
)
@pytest.mark.parametrize("already", [0, 1], ids=["first", "second"])
def test_headers_that_are_not_due_are_refused(change, problem, already):
    crew, bucket = Crew(EF21), make()
    crew.pull(serve(bucket, crew.messages(0)))
    before = state_of(bucket)
    messages = list(crew.messages(1))
    for i in range(already):
        bucket.accept(0, *messages[i])
    header, body = messages[1]
    with pytest.raises(ProtocolError, match=problem):
        bucket.accept(1, header._replace(**change), body)
    assert state_of(bucket) == before
    assert bucket.missing == [0, 1, 2][already:]
    for worker in bucket.missing:  # and the round goes on
        bucket.accept(worker, *messages[worker])
    assert unpack(bucket.answer())[0].round == 1


def test_the_same_message_twice_is_refused():
    crew, bucket = Crew(EF21), make()
    messages = list(crew.messages(0))
    bucket.accept(0, *messages[0])
    with pytest.raises(ProtocolError, match="worker 0 sent 'b' twice in round 0"):
        bucket.accept(0, *messages[0])
    bucket.accept(1, *messages[1])
    assert bucket.accept(2, *messages[2])


@pytest.mark.parametrize(
    "payload",
    [
        np.zeros(0, np.uint8),
        np.zeros(200, np.uint8),
        ef.OneBit().compress(np.ones(D, np.float32)).data,
        ef.TopK(k=9).compress(np.ones(D + 1, np.float32)).data,
    ],
    ids=["empty", "zeros", "another compressor", "another length"],
)
def test_payloads_that_are_not_due_are_refused(payload):
    bucket = make()
    with pytest.raises(ProtocolError, match="worker 2 sent"):
        bucket.accept(2, Message(Kind.PUSH, 2, 4, 0, 0, MARK), payload)
    assert not bucket.begun


@pytest.mark.parametrize("method", [EF21, ef.DoubleSqueeze(ef.TopK(k=9), ef.OneBit())], ids=repr)
def test_a_malformed_body_is_blamed_on_its_sender_and_changes_nothing(method):
    crew, bucket = Crew(method), make(method)
    crew.pull(serve(bucket, crew.messages(0)))
    before = state_of(bucket)
    messages = list(crew.messages(1))
    header, body = messages[1]
    damaged = body.copy()
    damaged[16:20] = np.frombuffer(np.uint32(8).tobytes(), np.uint8)  # k, and the length is wrong
    for worker, one in enumerate([messages[0], (header, damaged), messages[2]]):
        bucket.accept(worker, *one)
    with pytest.raises(ProtocolError, match="worker 1 sent 'b' with a malformed body") as caught:
        bucket.answer()
    assert caught.value.worker == 1
    assert state_of(bucket) == before
    assert bucket.missing == [1]
    assert bucket.accept(1, header, body)  # the right one is still welcome
    twin, other = Crew(method), make(method)
    twin.pull(serve(other, twin.messages(0)))
    np.testing.assert_array_equal(bucket.answer(), serve(other, twin.messages(1)))


def test_what_else_goes_wrong_is_an_error_of_the_server(monkeypatch):
    crew, bucket = Crew(EF21), make()
    for worker, one in enumerate(crew.messages(0)):
        bucket.accept(worker, *one)
    monkeypatch.setattr(ef.EF21, "reduce", lambda *_: 1 / 0)
    with pytest.raises(ServerError, match="'b' could not be reduced: ZeroDivisionError"):
        bucket.answer()


def test_sums_that_overflow_drop_the_step():
    method = ef.DoubleSqueeze(ef.Identity(), ef.OneBit())
    bucket = make(method, 2)
    huge = ef.Identity().compress(np.full(D, 3e38, np.float32)).data
    before = state_of(bucket)
    with np.errstate(over="ignore"):
        for worker in range(2):
            bucket.accept(worker, Message(Kind.PUSH, worker, 4, 0, 0, MARK), huge)
        answer = bucket.answer()
    assert unpack(answer)[0].kind is Kind.DROP
    assert state_of(bucket) == before


def test_a_step_number_comes_again_only_right_after():
    crew, bucket = Crew(EF21), make()
    for step in range(2):
        crew.pull(serve(bucket, crew.messages(step)))
    serve(bucket, crew.messages(1))  # step 1 is dropped and tried again
    header, body = next(crew.messages(0))
    with pytest.raises(ProtocolError, match="for step 0, expected step 2"):
        bucket.accept(0, header, body)


def test_answers_are_packed_like_messages():
    crew, bucket = Crew(EF21), make()
    header, body = unpack(serve(bucket, crew.messages(0)))
    assert header == Message(Kind.NUMBERS, 0, 4, 0, 0, MARK)
    assert body.size == 4 * D
    assert pack(header, body).tobytes() == bucket._outgoing[: 40 + body.size].tobytes()
