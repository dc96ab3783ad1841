"""One bucket at a server, without MPI: collects a round's messages, reduces, can undo the round.

A round is one exchange of a bucket. A server answers a bucket at once, before it knows whether the
step is good. If another bucket of the step is not finite, the workers drop the step and use its
number again, which tells the server. So the server can undo its last round. Most methods replace
their state in `reduce`, so that undoing costs nothing. Vectors that a method changes in place are
copied before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ef_horovod.arrays.keys import Key, tensor_id
from ef_horovod.compressors.base import Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import (
    EFHorovodError,
    NonFiniteError,
    PayloadError,
    ProtocolError,
    ServerError,
)
from ef_horovod.methods.undo import Undo, Undoer, vectors_of
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import HEADER_NBYTES, Kind, Message, pack
from ef_horovod.wire import HEADER_NBYTES as PAYLOAD_HEADER_NBYTES

_NOTHING = np.zeros(0, np.uint8)


def longest_message(spec: BucketSpec) -> int:
    """Bytes of the longest message about a bucket, up or down."""
    method, d = spec.make_method(), spec.length
    # A method may send its vector uncompressed at times. A threshold may let all entries pass;
    # their indices are then sent too, in less than a byte each.
    return (
        HEADER_NBYTES + PAYLOAD_HEADER_NBYTES + max(method.compressor.body_nbytes(d), 5 * d + 256)
    )


class ServedBucket:
    """Rounds of one bucket.

    Args:
        index: of the bucket, among those of all servers.
        spec: of the bucket.
        workers: number of workers in the job.
        fingerprint: of the config.
        step: of the first round.
    """

    def __init__(
        self, index: int, spec: BucketSpec, workers: int, fingerprint: int, step: int = 0
    ) -> None:
        self.senders = spec.senders(workers)  # in the order in which their messages are reduced
        self.index, self.spec, self.workers = index, spec, len(self.senders)
        self.round = 0  # the round being collected
        self.step = step  # step of this round, unless the last step was dropped
        self.dropped = 0  # rounds that were dropped or undone
        self.method = spec.make_method()
        self.state = self.method.init(np.zeros(spec.length, np.float32), self.workers)[1]
        self._fingerprint = fingerprint
        self._messages: dict[int, Payload] = {}
        self._arrivals: dict[int, float] = {}  # time of each worker's last message
        self._this_step = step  # of the messages in this round
        self._undo: Undo | None = None
        self._undoer = Undoer()
        self._outgoing = np.empty(longest_message(spec), np.uint8)

    @property
    def missing(self) -> list[int]:
        """Workers whose messages of this round have not arrived."""
        return [worker for worker in self.senders if worker not in self._messages]

    @property
    def begun(self) -> bool:
        """Whether a message of this round has arrived."""
        return bool(self._messages)

    @property
    def begun_at(self) -> float:
        """Arrival time of this round's first message, by `time.monotonic`."""
        return min(self._arrivals[worker] for worker in self._messages)

    def has(self, worker: int) -> bool:
        """Whether this worker's message of this round has arrived; its buffer is then in use."""
        return worker in self._messages

    def accept(self, worker: int, message: Message, body: np.ndarray) -> bool:
        """Take a worker's message into the round.

        Args:
            worker: the sender according to MPI.
            message: the header.
            body: uint8[m], not copied.

        Returns:
            Whether the round is complete.

        Raises:
            ProtocolError: it is not the expected message; no state was changed.
        """
        payload = self._checked(worker, message, body)
        if not self._messages:
            self._this_step = message.step
        self._keep(worker, payload)
        return len(self._messages) == self.workers

    def answers(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Messages due now, and their receivers; see `answer`."""
        if len(self._messages) == self.workers:
            yield self.answer(), self.senders

    def answer(self) -> np.ndarray:
        """Reduce the complete round; returns the message to all workers, valid for one round.

        Raises:
            ProtocolError: a message has a malformed body; the error names its sender. The state is
                unchanged, and the round waits for another message from that worker.
            ServerError: the method failed for another reason.
        """
        payloads = [self._messages[worker] for worker in self.senders]
        if self._this_step < self.step:
            self._take_back()
        kind, body = self._reduce(payloads)
        self._undo = None if kind is Kind.DROP else self._undo
        self.dropped += kind is Kind.DROP
        self.step = self._this_step + (kind is not Kind.DROP)
        message = Message(
            kind, 0, self.index, self._this_step, self.round, fingerprint=self._fingerprint
        )
        self._messages.clear()
        self.round += 1
        return pack(message, body, self._outgoing)

    def to_save(self, step: int) -> dict[str, np.ndarray]:
        """The state after `step` steps by "BUCKET/FIELD", for the current or previous step.

        Raises:
            ValueError: it is another step.
        """
        if step == self.step:
            held = dict(self._fields(self.state))
        elif step == self.step - 1 and self._undo is not None:
            before = {id(vector): copy for vector, copy in self._undo.copies}
            fields = self._fields(self._undo.state)
            held = {name: before.get(id(vector), vector) for name, vector in fields}
        else:
            raise ValueError(
                f"got step {step} for '{self.spec.name}', expected {self.step} or the one before"
            )
        # A bucket without state has an entry too, so that loading detects missing buckets.
        return {
            f"{self.spec.name}/": np.zeros(0, np.float32),
            **{f"{self.spec.name}/{name}": vector for name, vector in held.items()},
        }

    def load(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Load the result of `to_save` after `step` steps, before the first round."""
        for name, vector in self._fields(self.state):
            np.copyto(vector, state[f"{self.spec.name}/{name}"])
        self.step = self._this_step = step

    def _fields(self, state: Any) -> Iterator[tuple[str, np.ndarray]]:
        """The vectors that a state holds between steps."""
        return vectors_of(state, self.method.scratch)

    def _keep(self, worker: int, payload: Payload) -> None:
        self._messages[worker] = payload
        self._arrivals[worker] = time.monotonic()

    def _checked(self, worker: int, message: Message, body: np.ndarray) -> Payload:
        problem = self._problem(worker, message)
        if problem:
            raise ProtocolError(f"{problem}; the server's state is as it was")
        try:
            payload = Payload(body)
        except PayloadError as error:
            raise ProtocolError(f"worker {worker} sent for '{self.spec.name}': {error}") from None
        compressor = self.method.compressor
        d = self.method.message_length(self.spec.length, message.step)
        if payload.num_elements != d or payload.kind not in (type(compressor), Identity):
            raise ProtocolError(
                f"worker {worker} sent {payload} for '{self.spec.name}', expected {d} elements by "
                f"{compressor}; the server's state is as it was"
            )
        return payload

    def _problem(self, worker: int, message: Message) -> str:
        """The problem with a header, or ""."""
        what = f"worker {worker} sent '{self.spec.name}'"
        if message.fingerprint != self._fingerprint:
            return f"{what} with another config's fingerprint, expected that of the handshake"
        if worker not in self.senders:
            return f"{what}, which is another worker's slice, expected one of {self.senders}"
        if message.worker != worker:
            return f"{what} in the name of worker {message.worker}, expected its own"
        if message.round < self.round:
            return f"{what} for round {message.round}, late or twice, expected round {self.round}"
        if message.round > self.round:
            return f"{what} for round {message.round}, early, expected round {self.round}"
        if worker in self._messages:
            return f"{what} twice in round {self.round}, expected it once"
        due = {self._this_step} if self._messages else {self.step}
        if not self._messages and self._undo is not None:
            due.add(self.step - 1)
        if message.step not in due:
            return f"{what} for step {message.step}, expected step {max(due)}"
        return ""

    def _reduce(self, payloads: list[Payload]) -> tuple[Kind, np.ndarray]:
        if any(payload.is_skip for payload in payloads):
            return Kind.DROP, _NOTHING
        key = Key(
            self.spec.seed, self._this_step, tensor_id(self.spec.name), 0, self.workers
        ).of_server()
        method = self.method
        self._undo = self._undoer.before(self.state, method.scratch, method.reduced_in_place)
        try:
            aggregate, self.state = method.reduce(self.state, payloads, key)
        except NonFiniteError:  # the sum of finite messages can overflow
            self._restore()
            return Kind.DROP, _NOTHING
        except Exception as error:
            self._restore()
            raise self._blame(error) from None
        if isinstance(aggregate, Payload):
            return Kind.PAYLOAD, aggregate.data
        return Kind.NUMBERS, aggregate.view(np.uint8)

    def _restore(self) -> None:
        assert self._undo is not None
        self.state, self._undo = self._undo.restore(), None

    def _take_back(self) -> None:
        """Undo the last step, which the workers dropped."""
        self._restore()
        self.step -= 1
        self.dropped += 1

    def _blame(self, error: Exception) -> EFHorovodError:
        """Find the worker whose message cannot be decoded; drop it to wait for another."""
        length = self.method.message_length(self.spec.length, self._this_step)
        room = np.zeros(length, np.float32)
        for worker, payload in list(self._messages.items()):
            try:
                payload.add_to(room)
            except (PayloadError, ValueError) as reason:
                del self._messages[worker]
                return ProtocolError(
                    f"worker {worker} sent '{self.spec.name}' with a malformed body: {reason}; the "
                    "server's state is as it was",
                    worker,
                )
        return ServerError(f"'{self.spec.name}' could not be reduced: {error!r}")
