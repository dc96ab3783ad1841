"""A worker's side: a transport whose ranks are the workers, with the servers behind it."""

from __future__ import annotations

import atexit
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
from ef_horovod.server.asked import AskedBucket
from ef_horovod.server.link import (
    WORKER,
    connect,
    in_words,
    opened,
    require_first,
    what_ends_this_process,
)
from ef_horovod.server.nodes import levels_by
from ef_horovod.server.plan import BucketSpec, Config, assign
from ef_horovod.server.protocol import (
    CONTROL_TAG,
    LEAVES,
    Kind,
    Message,
    body_text,
    pack,
    text_body,
    unpack,
)
from ef_horovod.server.rounds import longest_message
from ef_horovod.server.world import watch
from ef_horovod.transports.base import Answer
from ef_horovod.transports.mpi import MPI, PIECE_NBYTES, MPITransport, communicator, largest_tag
from ef_horovod.transports.nodes import groups_of
from ef_horovod.transports.timeouts.waiting import limit_of, wait_until

# A worker's limit is longer than a server's, because the server can name the missing workers.
_GRACE = 1.1
_GRACE_SECONDS = 2.0
_FAREWELL_SECONDS = 5.0
# Errors by which a server may end the job; all others become a ServerError.
_ENDS = {kind.__name__: kind for kind in (ConfigMismatchError, CollectiveTimeoutError)}


class ServerTransport(MPITransport):
    """The workers of a job with parameter servers; rank and size count workers only.

    All workers open the same buckets in the same order. The first `ask`, or `handshake`, sends them
    to the servers, which compare them between workers.

    Args:
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
        comm: of servers and workers; default COMM_WORLD.

    Raises:
        CollectiveTimeoutError: some ranks of the job did not start as server or worker.
        UnsupportedError: this job has no server, or this process has such a transport already.
    """

    def __init__(self, timeout: float | None = None, comm: Any = None) -> None:
        require_first(comm)
        limit = limit_of(timeout)
        self._group = connect(WORKER, limit, comm)
        super().__init__(self._group.peers, limit)
        self._nodes = groups_of(self._first_ranks(), one_node=True)
        self._levels = None if self._nodes is None else levels_by(self._nodes, self, self._comm)
        self._all = self._group.comm
        self._buckets: list[AskedBucket] = []
        self._index: dict[str, int] = {}
        self._config: Config | None = None
        self._fingerprint = 0  # of the config
        self._sends: list[tuple[Any, np.ndarray]] = []  # requests and their data
        self._welcomes: set[int] = set()
        self._saved: set[int] = set()
        self._broken: EFHorovodError | None = None
        self._closed = False
        self._dismissed = False  # whether the server has confirmed this worker's end
        self._hopeless = False  # whether servers, or a worker they named, do not respond
        self._servers_leave = False  # whether the servers' processes end with the job
        self._watching = watch(communicator(comm), self.rank, limit)
        opened.append((communicator(comm), self))
        atexit.register(self._at_exit)  # registered after mpi4py's, so it runs before MPI ends

    levels_known = True

    @property
    def has_server(self) -> bool:
        return True

    @property
    def servers(self) -> int:
        """Number of servers in the job."""
        return len(self._group.servers)

    def dense_nbytes(self, nbytes: int) -> int:
        return nbytes

    def open_slices(
        self, name: Callable[[int], str], lengths: Sequence[int], method: str, seed: int
    ) -> None:
        assert self._nodes is not None
        for j, (length, workers) in enumerate(zip(lengths, self._nodes.cross, strict=True)):
            self._open(BucketSpec(name(j), length, method, seed, tuple(workers)))

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        self._open(BucketSpec(name, length, method, seed))

    def _open(self, spec: BucketSpec) -> None:
        self.require_open()
        name, length = spec.name, spec.length
        if self._config is not None or name in self._index:
            raise ValueError(
                f"got the bucket '{name}' twice or after the first step, expected each once and "
                "before it; make one optimizer for all parameters"
            )
        if longest_message(spec) > PIECE_NBYTES:
            raise UnsupportedError(
                f"got a bucket '{name}' of {length} elements, whose messages may have "
                f"{longest_message(spec)} bytes, expected at most {PIECE_NBYTES} for MPI; cut the "
                "largest parameter into several"
            )
        self._index[name] = len(self._buckets)
        self._buckets.append(AskedBucket(len(self._buckets), spec))

    def handshake(
        self, facts: Sequence[str] = (), step: int = 0, *, several_rounds: bool = False
    ) -> None:
        """Compare the config with the servers and other workers; once, before the first step.

        Args:
            facts: one line each, such as names and shapes of parameters.
            step: the number of the first step.
            several_rounds: whether the caller can use the answers of several rounds in one step.

        Raises:
            ConfigMismatchError: on all ranks; the message names the difference.
            UnsupportedError: rounds do not wait for all workers, and the caller cannot handle that.
        """
        self.require_open()
        if len(self._buckets) >= largest_tag():
            raise UnsupportedError(
                f"got {len(self._buckets)} buckets, expected fewer than {largest_tag()}, MPI's "
                "largest tag here, because each bucket has a tag; raise bucket_bytes"
            )
        specs = tuple(bucket.spec for bucket in self._buckets)
        self._config = Config(specs, tuple(facts), step)
        self._fingerprint = self._config.fingerprint
        for index, owner in enumerate(assign(specs, self.servers)):
            if self.rank in specs[index].senders(self.size):
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
                "workers, because TensorFlow's optimizers and updates take one aggregated gradient "
                "per step; start it without --quorum, or take PyTorch's ef.DistributedOptimizer "
                "or ef_horovod.server.Worker"
            )

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        self.require_open()
        if self._config is None:
            self.handshake(step=step)
        index = self._index[name]
        bucket = self._buckets[index]
        message = Message(Kind.PUSH, self.rank, index, step, bucket.round, self._fingerprint)
        bucket.step = step
        # MPI may still read a message that the server has already answered.
        self._wait(lambda: self._has_left(bucket.outgoing), lambda: [bucket.server], f"'{name}'")
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
        """Answers of rounds that finished without this rank and have arrived; for between steps.

        Args:
            names: of buckets.

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

    def _receive(self, bucket: AskedBucket) -> Any:
        """Begin to receive another answer into new memory; earlier answers keep theirs."""
        bucket.incoming = np.empty_like(bucket.incoming)
        return self._all.Irecv([bucket.incoming, MPI.BYTE], bucket.server, bucket.index + 1)

    def _answer(self, reply: Any, bucket: AskedBucket) -> Answer:
        """Wait for the next answer about a bucket."""
        status = MPI.Status()
        self._wait(lambda: reply.Test(status), lambda: [bucket.server], f"'{bucket.spec.name}'")
        data = bucket.incoming[: status.Get_count(MPI.BYTE)]
        self.bytes_received += data.size
        answer = bucket.read(data, self._fingerprint, with_quorum=self.quorum is not None)
        bucket.round += 1
        return answer

    def save(self, step: int) -> None:
        """Make all servers save their state after `step` steps; collective over workers.

        Raises:
            ProtocolError: a server has no folder for checkpoints, or is not between two steps.
            UnsupportedError: the servers have no buckets yet.
        """
        self.require_open()
        if self._config is None:
            raise UnsupportedError(
                "got checkpoint() before the first step, expected it after one, because servers "
                "have no state before; take the first checkpoint later"
            )
        self._saved.clear()
        message = pack(Message(Kind.SAVE, self.rank, step=step), text_body(""))
        self._send(message, self._group.servers, CONTROL_TAG)
        self._wait(
            lambda: self._saved == set(self._group.servers),
            lambda: sorted(set(self._group.servers) - self._saved),
            f"the checkpoint of step {step}",
        )

    def require_open(self) -> None:
        """Raise if this worker no longer takes part in the job.

        Raises:
            ServerError, CollectiveTimeoutError, ConfigMismatchError, ProtocolError: the job has
                ended with this error.
            UnsupportedError: this worker was closed.
        """
        self._raise_broken()
        if self._closed:
            raise UnsupportedError(
                f"got a step or checkpoint of worker {self.rank}, which is closed, expected none "
                "after close() or the end of its `with` block, because the servers have been "
                "told that it has ended; close it after the last step"
            )

    def require_not_begun(self) -> None:
        if self._config is not None:
            raise UnsupportedError(
                "got error-feedback state to restore after the first step or checkpoint, expected "
                "it before, because servers read theirs when they meet the workers; load it before "
                "training begins"
            )

    def close(self, error: str = "") -> None:
        """Tell the servers that this worker ends; the job ends when all workers have ended.

        Otherwise this is called at the end of the process.

        Args:
            error: reason of an early end; the servers then end the job.
        """
        if self._closed:
            return
        self._closed = True
        if not self._servers_leave:  # servers may now take part in MPI.COMM_WORLD's collectives
            self._watching.set()
            opened[:] = [(comm, one) for comm, one in opened if one is not self]
        error = error or in_words(self._broken)
        bye = pack(Message(Kind.BYE, self.rank), text_body(error))
        self._send(bye, self._group.servers, CONTROL_TAG)
        waits = self.quorum is not None and not error  # for answers no longer needed
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
                room = np.empty_like(bucket.incoming)
                self._sends.append((handle.Irecv([room, MPI.BYTE]), room))

    def _at_exit(self) -> None:
        self.close(in_words(what_ends_this_process()))
        if self._hopeless:  # MPI_Finalize would wait for those that do not respond
            self._all.Abort(1)

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
                f"{missing()}; see why they do not answer (with a longer limit they may wait for "
                "other workers), or raise timeout= or EF_HOROVOD_TIMEOUT"
            )

        try:
            wait_until(look, limit, waited)
        except CollectiveTimeoutError as error:
            self._broken, self._hopeless = self._broken or error, True
            raise

    def listen(self) -> None:
        """Raise if the servers have ended the job; for waits for other workers."""
        self._move_on()
        self._raise_broken()

    def _move_on(self) -> None:
        """Let MPI make progress, and handle the servers' control messages."""
        self._drop_sent()
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
            self._servers_leave |= bool(message.flags & LEAVES)
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

    def _drop_sent(self) -> None:
        self._sends = [(request, data) for request, data in self._sends if not request.Test()]

    def _has_left(self, data: np.ndarray) -> bool:
        """Whether no send from this memory is pending."""
        self._drop_sent()
        return not any(sent.base is data for _, sent in self._sends)

    def _send(self, data: np.ndarray, ranks: Sequence[int], tag: int) -> None:
        for rank in ranks:
            self._sends.append((self._all.Isend([data, MPI.BYTE], rank, tag), data))
