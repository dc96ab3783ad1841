"""A worker's side: a transport whose ranks are the workers, with the servers behind it."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ef_horovod.errors import (
    CollectiveTimeoutError,
    ConfigMismatchError,
    EFHorovodError,
    ProtocolError,
    ServerError,
    UnsupportedError,
)
from ef_horovod.server.link import WORKER, connect
from ef_horovod.server.plan import BucketSpec, Config, assign
from ef_horovod.server.protocol import (
    CONTROL_TAG,
    HEADER_NBYTES,
    MISSED,
    Kind,
    Message,
    body_text,
    pack,
    text_body,
    unpack,
)
from ef_horovod.server.rounds import longest_message
from ef_horovod.transports.base import Answer
from ef_horovod.transports.mpi import MPI, MPITransport
from ef_horovod.transports.waiting import limit_of, wait_until

# A worker's limit is so much later than a server's: the server knows whom everybody waits for.
_GRACE = 1.1
_GRACE_SECONDS = 2.0
_FAREWELL_SECONDS = 5.0
# What a server may end the job with; anything else becomes a ServerError.
_ENDS = {kind.__name__: kind for kind in (ConfigMismatchError, CollectiveTimeoutError)}


class ServerTransport(MPITransport):
    """The workers of a job with parameter servers; rank and size count workers only.

    All workers open the same buckets in the same order. The servers hear of them at the first
    `ask`, or at `handshake`, and compare what all workers say.

    Args:
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
        comm: of servers and workers; default COMM_WORLD.

    Raises:
        CollectiveTimeoutError: some ranks of the job did not start as server or worker.
        UnsupportedError: there is no server in this job, or this process has one of these already.
    """

    def __init__(self, timeout: float | None = None, comm: Any = None) -> None:
        require_first(comm)
        limit = limit_of(timeout)
        self._group = connect(WORKER, limit, comm)
        super().__init__(self._group.peers, limit)
        self._all = self._group.comm
        self._buckets: list[_Bucket] = []
        self._index: dict[str, int] = {}
        self._config: Config | None = None
        self._sends: list[Any] = []
        self._welcomes: set[int] = set()
        self._saved: set[int] = set()
        self._broken: EFHorovodError | None = None
        self._closed = False
        self._dismissed = False  # the server knows that this worker has ended
        self._hopeless = False  # whether servers do not even end the job
        _opened.append((comm or MPI.COMM_WORLD, self))
        atexit.register(self._at_exit)  # runs before mpi4py ends MPI, for it was registered later

    @property
    def has_server(self) -> bool:
        return True

    @property
    def servers(self) -> int:
        """How many servers the job has."""
        return len(self._group.servers)

    def dense_nbytes(self, nbytes: int) -> int:
        return nbytes

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        if self._config is not None or name in self._index:
            raise ValueError(
                f"got the bucket '{name}' twice or after the first step, expected each once and "
                "before it; make one optimizer for all parameters"
            )
        self._index[name] = len(self._buckets)
        spec = BucketSpec(name, length, method, seed)
        self._buckets.append(_Bucket(len(self._buckets), spec))

    def handshake(
        self, facts: Sequence[str] = (), step: int = 0, *, several_rounds: bool = False
    ) -> None:
        """Compare the config with the servers' and the other workers'; once, before the first step.

        Args:
            facts: one line each, such as names and shapes of parameters.
            step: the number of the first step.
            several_rounds: whether the caller can use the answers of several rounds in a step.

        Raises:
            ConfigMismatchError: on all ranks, naming what differs.
            UnsupportedError: rounds do not wait for all workers, and the caller cannot use that.
        """
        specs = tuple(bucket.spec for bucket in self._buckets)
        self._config = Config(specs, tuple(facts), step)
        for index, owner in enumerate(assign(specs, self.servers)):
            self._buckets[index].open(self._group.servers[owner])
        hello = pack(Message(Kind.HELLO, self.rank), text_body(self._config.to_json()))
        self._send(hello, self._group.servers, CONTROL_TAG)
        self._wait(
            lambda: self._welcomes == set(self._group.servers),
            lambda: sorted(set(self._group.servers) - self._welcomes),
            "the handshake",
        )
        if self.quorum is not None and not several_rounds:
            raise UnsupportedError(
                f"got a server with a quorum of {self.quorum}, expected one that waits for all "
                "workers, for TensorFlow's optimizers take one direction a step; start it without "
                "--quorum, or train with PyTorch or ef_horovod.server.Worker"
            )

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        if self._config is None:
            self.handshake(step=step)
        assert self._config is not None
        self._raise_broken()
        index = self._index[name]
        bucket = self._buckets[index]
        message = Message(Kind.PUSH, self.rank, index, step, bucket.round, self._config.fingerprint)
        bucket.step = step
        outgoing = pack(message, payload, bucket.outgoing)
        if bucket.backlog:
            bucket.incoming = np.empty_like(bucket.incoming)
        reply = self._all.Irecv([bucket.incoming, MPI.BYTE], bucket.server, index + 1)
        self._send(outgoing, [bucket.server], index + 1)
        self.bytes_sent += outgoing.size

        def finish() -> list[Answer]:
            known, bucket.backlog = bucket.backlog, []
            bucket.round += len(known)
            answers = [*known, self._answer(reply, bucket)]
            while not answers[-1].counted:
                answers.append(self._answer(self._receive(bucket), bucket))
            return answers

        return finish

    def catch_up(self, names: Sequence[str]) -> list[list[Answer]]:
        """Answers of rounds that went by without this rank and are here already.

        Args:
            names: of buckets; between two steps.

        Returns:
            For each bucket, the answers of the same rounds.
        """
        buckets = [self._buckets[self._index[name]] for name in names]
        for bucket in buckets:
            while self._all.Iprobe(bucket.server, bucket.index + 1):
                bucket.round += len(bucket.backlog)
                answer = self._answer(self._receive(bucket), bucket)
                bucket.round -= len(bucket.backlog) + 1
                bucket.backlog.append(answer)
        rounds = min(len(bucket.backlog) for bucket in buckets)
        found = [bucket.backlog[:rounds] for bucket in buckets]
        for bucket in buckets:
            bucket.round += rounds
            del bucket.backlog[:rounds]
        return found

    def _receive(self, bucket: _Bucket) -> Any:
        """Begin to receive one more answer; those that are here keep their memory."""
        bucket.incoming = np.empty_like(bucket.incoming)
        return self._all.Irecv([bucket.incoming, MPI.BYTE], bucket.server, bucket.index + 1)

    def _answer(self, reply: Any, bucket: _Bucket) -> Answer:
        """Wait for the next answer about a bucket."""
        status = MPI.Status()
        self._wait(lambda: reply.Test(status), lambda: [bucket.server], f"'{bucket.spec.name}'")
        data = bucket.incoming[: status.Get_count(MPI.BYTE)]
        self.bytes_received += data.size
        answer = self._read(data, bucket)
        bucket.round += 1
        return answer

    def save(self, step: int) -> None:
        """Have all servers write their memories after so many steps; collective over workers.

        Raises:
            ProtocolError: a server has no folder for checkpoints, or it is not between two steps.
            UnsupportedError: the servers know of no bucket yet.
        """
        if self._config is None:
            raise UnsupportedError(
                "got checkpoint() before the first step, expected it after one, for servers have "
                "no memories before; take the first checkpoint later"
            )
        self._saved.clear()
        message = pack(Message(Kind.SAVE, self.rank, step=step), text_body(""))
        self._send(message, self._group.servers, CONTROL_TAG)
        self._wait(
            lambda: self._saved == set(self._group.servers),
            lambda: sorted(set(self._group.servers) - self._saved),
            f"the checkpoint of step {step}",
        )

    def require_not_begun(self) -> None:
        if self._config is not None:
            raise UnsupportedError(
                "got memories to restore after the first step or checkpoint, expected them before, "
                "for servers read those of the same step when they meet the workers; load them "
                "before training begins"
            )

    def close(self, error: str = "") -> None:
        """Tell the servers that this worker ends; the job ends when all workers have.

        Called at the end of the process if it was not before.

        Args:
            error: why it ends early; the servers then end the job.
        """
        if self._closed:
            return
        self._closed = True
        raised = self._broken or getattr(sys, "last_value", None)  # what ends this process, if any
        if not error and raised is not None:
            error = f"{type(raised).__name__}: {raised}"
        bye = pack(Message(Kind.BYE, self.rank), text_body(error))
        self._send(bye, self._group.servers, CONTROL_TAG)
        waits = self.quorum is not None and not error  # for answers that nobody asks for any more
        deadline = time.monotonic() + (self.timeout if waits else _FAREWELL_SECONDS)
        while self._sends or (waits and not self._dismissed and self._broken is None):
            if time.monotonic() > deadline:
                return
            self._move_on()
            self._drain()
            time.sleep(1e-3)
        self._drain()

    def _drain(self) -> None:
        for bucket in self._buckets if self.quorum is not None else ():
            while (handle := self._all.Improbe(bucket.server, bucket.index + 1)) is not None:
                handle.Recv([np.empty_like(bucket.incoming), MPI.BYTE])

    def _at_exit(self) -> None:
        self.close()
        if self._hopeless:  # MPI_Finalize would wait for servers that do not answer
            self._all.Abort(1)

    def _read(self, data: np.ndarray, bucket: _Bucket) -> Answer:
        assert self._config is not None
        message, body = unpack(data)
        counted = not message.flags & MISSED
        # With a quorum the server counts the steps, and this rank may have been late.
        step = bucket.step if self.quorum is None else message.step
        expected = Message(
            message.kind,
            0,
            bucket.index,
            step,
            bucket.round,
            self._config.fingerprint,
            message.flags,
        )
        if message == expected:
            if message.kind is Kind.PAYLOAD:
                return Answer(payload=body, counted=counted)
            if message.kind is Kind.NUMBERS and body.size == 4 * bucket.length_at(step):
                return Answer(numbers=body.view(np.float32), counted=counted)
            if message.kind is Kind.DROP:
                return Answer(counted=counted)
        raise ProtocolError(
            f"a server sent {message} with {body.size} bytes about '{bucket.spec.name}', expected "
            f"{expected} as an answer; install the same ef_horovod on all ranks"
        )

    def _wait(self, done: Callable[[], bool], missing: Callable[[], list[int]], what: str) -> None:
        limit = _GRACE * self.timeout + _GRACE_SECONDS

        def look() -> bool:
            self._raise_broken()
            if done():
                return True
            self._move_on()
            return False

        def waited() -> str:
            return (
                f"worker {self.rank} waited {limit:g} s in {what} for servers with ranks "
                f"{missing()}; see why they do not answer, or raise timeout= or EF_HOROVOD_TIMEOUT"
            )

        try:
            wait_until(look, limit, waited)
        except CollectiveTimeoutError as error:
            self._broken, self._hopeless = error, True
            raise

    def _move_on(self) -> None:
        """Let MPI send, and hear what servers say apart from answers."""
        if self._sends and MPI.Request.Testall([request for request, _ in self._sends]):
            self._sends.clear()
        status = MPI.Status()
        handle = self._all.Improbe(MPI.ANY_SOURCE, CONTROL_TAG, status)
        if handle is None:
            return
        data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        handle.Recv([data, MPI.BYTE])
        if status.Get_source() in self._group.servers and self._broken is None:
            self._hear(status.Get_source(), *unpack(data))

    def _hear(self, server: int, message: Message, body: np.ndarray) -> None:
        text = body_text(body)
        if message.kind is Kind.WELCOME:
            self._welcomes.add(server)
            self.quorum = int(text) if text else None
        elif message.kind is Kind.SAVED:
            self._saved.add(server)
        elif message.kind is Kind.BYE:
            self._dismissed = True
        elif message.kind is Kind.REFUSED:
            self._broken = ProtocolError(f"the server refused a message: {text}")
        elif message.kind is Kind.ABORT:
            name, _, reason = text.partition(": ")
            self._broken = _ENDS.get(name, ServerError)(reason)

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))

    def _send(self, data: np.ndarray, ranks: Sequence[int], tag: int) -> None:
        for rank in ranks:
            self._sends.append((self._all.Isend([data, MPI.BYTE], rank, tag), data))


def require_first(comm: Any = None) -> None:
    """Raise if this process is a worker of the job already, by another optimizer or the like.

    Args:
        comm: of servers and workers; default COMM_WORLD.

    Raises:
        UnsupportedError: always there.
    """
    if any(c == (comm or MPI.COMM_WORLD) and not one._closed for c, one in _opened):
        raise UnsupportedError(
            "got a second optimizer, reducer, tape or Worker in a job with parameter servers, "
            "expected one in a process, for servers hear of all buckets at once; give all "
            "parameters to one, in parameter groups if their settings differ"
        )


_opened: list[tuple[Any, ServerTransport]] = []  # with their communicators


class _Bucket:
    """A bucket's buffers and its count of rounds."""

    def __init__(self, index: int, spec: BucketSpec) -> None:
        self.index, self.spec, self.server = index, spec, -1
        self._method = spec.make_method()
        self.round = 0  # answers that were handed on
        self.backlog: list[Answer] = []  # of later rounds that some other bucket has no answer of
        self.step = 0  # of the message that is under way
        self.outgoing = self.incoming = np.empty(0, np.uint8)

    def length_at(self, step: int) -> int:
        """Numbers in the answers of a step."""
        return self._method.message_length(self.spec.length, step)

    def open(self, server: int) -> None:
        """Make room for messages to and from a server."""
        nbytes = longest_message(self.spec)
        self.server = server
        self.outgoing, self.incoming = (np.empty(nbytes, np.uint8) for _ in range(2))


assert HEADER_NBYTES % 8 == 0  # bodies can be read as numbers where they lie
