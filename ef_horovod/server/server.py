"""The server's side of the job: the handshake, then rounds until the workers have ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.errors import PayloadError, ProtocolError, ServerError
from ef_horovod.methods.base import Method
from ef_horovod.server.inbox import Arrived, Inbox, control_buffer
from ef_horovod.server.link import HINT, SERVER, Group, connect
from ef_horovod.server.monitor import ServerMonitor, Totals
from ef_horovod.server.plan import BucketSpec, Config, assign, require_agreement
from ef_horovod.server.protocol import (
    CONTROL_TAG,
    LEAVES,
    Kind,
    Message,
    body_text,
    pack,
    text_body,
)
from ef_horovod.server.quorum import Participation, QuorumBucket, require_quorum
from ef_horovod.server.rounds import ServedBucket, longest_message
from ef_horovod.server.saves import Saves
from ef_horovod.transports.timeouts.waiting import limit_of, wait_until

_FAREWELL_SECONDS = 5.0  # for workers to receive the reason of the end
_REFUSED_SHOWN = 20
_GRACE, _GRACE_SECONDS = 1.05, 1.0  # less than that of a worker for its servers


class _Begun(NamedTuple):
    """An action that some workers have begun, so that they wait for the others."""

    since: float  # by time.monotonic
    missing: list[int]  # workers
    what: str  # the action that the missing workers have not done


class Server:
    """One server rank.

    Args:
        method: the workers must have this one; None accepts theirs.
        checkpoint: folder for this server's state, or None. Workers ask for checkpoints. If the job
            ends with an error, the last complete step is saved as well.
        quorum: number of workers per round, or None for all; see `quorum.py`.
        log: file for JSON lines of progress, or None.
        timeout: limit of a round, in seconds, from its first message to its last; default
            $EF_HOROVOD_TIMEOUT or 300. Also limits a handshake or checkpoint that some have begun.
        say: gets readable progress lines.
        leaves: whether this process ends with the job. If so, it takes no part in later collectives
            of MPI.COMM_WORLD either.
        comm: of servers and workers; default COMM_WORLD.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        checkpoint: Path | None = None,
        quorum: int | None = None,
        log: Path | None = None,
        timeout: float | None = None,
        say: Callable[[str], None] = lambda line: None,
        leaves: bool = False,
        comm: Any = None,
    ) -> None:
        self.timeout = limit_of(timeout)
        self._method, self._say = method, say
        self._group: Group = connect(SERVER, self.timeout, comm)
        self._worker_of = {rank: i for i, rank in enumerate(self._group.workers)}
        self._inbox = Inbox(self._group.comm, self._buffer_of)
        self._present = set(self._worker_of.values())
        self._saves = Saves(checkpoint, self._group.number, self.workers, say)
        self._configs: dict[int, Config] = {}
        self._met_at = 0.0  # time of the first config
        self._quorum, self._log, self._leaves = quorum, log, leaves
        self._watch: ServerMonitor | None = None
        self._participation: Participation | None = None
        self._stop = ""
        self._fingerprint = 0
        self.buckets: dict[int, ServedBucket] = {}  # this server's buckets by index
        self._buffers: dict[tuple[int, int], np.ndarray] = {}  # by (worker, bucket)
        self._receiving: set[tuple[int, int]] = set()  # buffers of pending receives
        self.refused = 0  # messages

    def run(self) -> None:
        """Serve until all workers have ended.

        Raises:
            ConfigMismatchError: workers disagree, with each other or with this server.
            CollectiveTimeoutError: workers sent nothing in time; the message names them.
            ServerError: a worker failed, or ended before the others.
        """
        try:
            while len(self._configs) < self.workers:
                self._wait_for_anything()
            self._open_buckets()
            while self._present:
                self._wait_for_anything()
            self._close_watch()
            wait_until(
                lambda: self._inbox.sent,
                self.timeout,
                lambda: self._waited(list(range(self.workers)), "take the last answers"),
            )
        except Exception as error:  # save the state after any error
            # Report at once, because another server may abort the job.
            self._say(f"error: {type(error).__name__}: {error}")
            self._tell(Kind.ABORT, f"{type(error).__name__}: {error}")
            self._saves.save_what_is_complete(self.buckets.values(), self._fingerprint)
            self._close_watch()
            self._farewell()
            raise

    def stop(self, reason: str) -> None:
        """End the job with an error at the next safe point; for signal handlers."""
        self._stop = reason

    @property
    def workers(self) -> int:
        """Number of workers in the job."""
        return len(self._group.workers)

    @property
    def rounds(self) -> int:
        """Rounds that are complete in all buckets."""
        return min((bucket.round for bucket in self.buckets.values()), default=0)

    # --- meeting -------------------------------------------------------------------------------

    def _open_buckets(self) -> None:
        configs = [self._configs[worker] for worker in range(self.workers)]
        require_agreement(configs, self._method)
        methods = {spec.method for spec in configs[0].buckets}
        if self._quorum not in (None, self.workers):
            by_nodes = any(spec.workers for spec in configs[0].buckets)
            require_quorum(
                self._quorum, self.workers, len(self._group.servers), methods, by_nodes=by_nodes
            )
            self._participation = Participation(self._quorum, self.workers)
        self._fingerprint, specs, step = configs[0].fingerprint, configs[0].buckets, configs[0].step
        for index, owner in enumerate(assign(specs, len(self._group.servers))):
            if owner != self._group.number:
                continue
            bucket = self.buckets[index] = self._make_bucket(index, specs[index])
            for worker in bucket.senders:
                self._buffers[worker, index] = np.empty(longest_message(bucket.spec), np.uint8)
        if step > 0:
            self._saves.load(self.buckets.values(), step, self._fingerprint)
        elements = sum(bucket.spec.length for bucket in self.buckets.values())
        self._say(
            f"serves {self.workers} workers: {len(self.buckets)} of {len(specs)} buckets with "
            f"{elements:,} elements by {', '.join(sorted({spec.method for spec in specs}))}, from "
            f"step {step} on"
        )
        dense = sum(4 * bucket.spec.length * bucket.workers for bucket in self.buckets.values())
        number = self._group.number
        self._watch = ServerMonitor(self._totals, dense, self._say, self._log, number)
        quorum = "" if self._participation is None else str(self._quorum)
        self._tell(Kind.WELCOME, quorum, LEAVES if self._leaves else 0)

    def _totals(self) -> Totals:
        dropped = sum(bucket.dropped for bucket in self.buckets.values())
        inbox = self._inbox
        return Totals(self.rounds, inbox.bytes_received, inbox.bytes_sent, dropped, self.refused)

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _make_bucket(self, index: int, spec: BucketSpec) -> ServedBucket:
        if self._participation is None:
            return ServedBucket(index, spec, self.workers, self._fingerprint)
        return QuorumBucket(index, spec, self.workers, self._fingerprint, self._participation)

    # --- messages ------------------------------------------------------------------------------

    def _buffer_of(self, source: int, tag: int, nbytes: int) -> np.ndarray | None:
        worker = self._worker_of.get(source)
        if tag == CONTROL_TAG:
            return control_buffer(nbytes)
        bucket = self.buckets.get(tag - 1)
        if worker is None or bucket is None or worker not in bucket.senders:
            return None
        place = worker, bucket.index
        if nbytes > self._buffers[place].size:
            return None
        if bucket.has(worker) or place in self._receiving:  # the message is early or a duplicate
            return np.empty(nbytes, np.uint8)
        self._receiving.add(place)
        return self._buffers[place]

    def _take(self, arrived: Arrived) -> None:
        worker = self._worker_of.get(arrived.source)
        place = (-1 if worker is None else worker), arrived.tag - 1
        if place in self._receiving and arrived.body.base is self._buffers[place]:
            self._receiving.discard(place)
        try:
            if worker is None or arrived.message is None:
                who = f"server rank {arrived.source}" if worker is None else f"worker {worker}"
                raise ProtocolError(f"{who} sent what is no message: {arrived.problem}")
            self._dispatch(worker, arrived.tag, arrived.message, arrived.body)
        except ProtocolError as error:
            self._refuse(worker if error.worker is None else error.worker, str(error))

    def _dispatch(self, worker: int, tag: int, message: Message, body: np.ndarray) -> None:
        if message.kind is Kind.PUSH:
            bucket = self.buckets.get(message.bucket)
            if bucket is None or tag != message.bucket + 1:
                raise ProtocolError(
                    f"worker {worker} sent bucket {message.bucket} with tag {tag}, expected one of "
                    f"the buckets {sorted(self.buckets)} of this server with its tag"
                )
            complete = bucket.accept(worker, message, body)
            if self._watch is not None and self._participation is None:
                self._watch.arrived(worker, bucket.index, complete)
            if complete:
                self._answer_complete(bucket)
        elif message.kind is Kind.HELLO and not self._fingerprint:
            if not self._configs:
                self._met_at = time.monotonic()
            try:
                self._configs[worker] = Config.from_json(body_text(body))
            except PayloadError as error:
                raise ProtocolError(f"worker {worker}: {error}") from None
        elif message.kind is Kind.SAVE and self._fingerprint:
            self._save(worker, message.step)
        elif message.kind is Kind.BYE:
            self._goodbye(worker, body_text(body))
        else:
            raise ProtocolError(
                f"worker {worker} sent {message.kind.name}, expected another kind of message now"
            )

    # --- checkpoints ---------------------------------------------------------------------------

    def _save(self, worker: int, step: int) -> None:
        if self._participation is not None:
            raise ProtocolError(
                f"worker {worker} asked for a checkpoint, expected none with a quorum: workers are "
                "in different rounds; leave --quorum out"
            )
        if self._saves.ask(worker, step, self.buckets.values(), self._fingerprint):
            self._tell(Kind.SAVED)

    def _answer_complete(self, bucket: ServedBucket) -> None:
        if self._participation is not None:
            self._answer(self.buckets.values())
            return
        # All workers have the last answer, but MPI may still use its memory, which is reused now.
        wait_until(
            lambda: self._inbox.has_left(bucket.index + 1),
            self.timeout,
            lambda: self._waited(list(range(self.workers)), f"take '{bucket.spec.name}'"),
        )
        self._answer([bucket])

    def _answer(self, buckets: Iterable[ServedBucket]) -> None:
        for bucket in buckets:
            for data, workers in bucket.answers():
                ranks = [self._group.workers[worker] for worker in workers]
                self._inbox.send(data, ranks, bucket.index + 1)

    def _goodbye(self, worker: int, reason: str) -> None:
        self._present.discard(worker)
        if reason:
            raise ServerError(f"worker {worker} failed: {reason}")
        if not self._fingerprint:
            raise ServerError(
                f"worker {worker} has ended before its first step, expected it to train as long as "
                "the others; see why its program ended"
            )
        if self._participation is not None:
            self._participation.present.discard(worker)
            self._inbox.send(  # no answer comes after this
                pack(Message(Kind.BYE), text_body("")), [self._group.workers[worker]], CONTROL_TAG
            )
            self._answer(self.buckets.values())  # fewer may be enough now
            return
        waiting = [bucket for bucket in self.buckets.values() if bucket.begun]
        if self._present and waiting:
            self._require_all_present()

    def _require_all_present(self) -> None:
        gone = sorted(set(range(self.workers)) - self._present)
        raise ServerError(
            f"workers {gone} have ended after {self.rounds} rounds while {sorted(self._present)} "
            "go on, expected all to end together; give all workers the same number of steps"
        )

    def _refuse(self, worker: int | None, problem: str) -> None:
        """Refuse a message, which has changed no state, and continue."""
        self.refused += 1
        if self.refused <= _REFUSED_SHOWN:
            self._say(f"refused a message: {problem}")
        if worker is not None:
            notice = pack(Message(Kind.REFUSED), text_body(problem))
            self._inbox.send(notice, [self._group.workers[worker]], CONTROL_TAG)

    def _tell(self, kind: Kind, text: str = "", flags: int = 0) -> None:
        ranks = [self._group.workers[worker] for worker in sorted(self._present)]
        self._inbox.send(pack(Message(kind, flags=flags), text_body(text)), ranks, CONTROL_TAG)

    # --- waiting -------------------------------------------------------------------------------

    def _progress(self) -> bool:
        """Handle messages; whether any arrived."""
        if self._stop:
            raise ServerError(self._stop)
        arrived = self._inbox.poll()
        for one in arrived:
            self._take(one)
        if self._watch is not None:
            self._watch.look()
        return bool(arrived)

    def _wait_for_anything(self) -> None:
        """Wait for a message, with a limit if workers wait for others."""
        begun = self._begun()
        if begun is None:
            self._wait_without_limit()
        else:
            limit = begun.since + self._limit - time.monotonic()
            wait_until(self._progress, limit, lambda: self._waited(begun.missing, begun.what))
        some = len(self._present) not in (0, self.workers) and self._participation is None
        if some and any(bucket.begun for bucket in self.buckets.values()):
            self._require_all_present()

    def _wait_without_limit(self) -> None:
        """Wait while all workers do something else, which may take long; reported once."""
        deadline = time.monotonic() + self.timeout

        def look() -> bool:
            nonlocal deadline
            if self._progress():
                return True
            if time.monotonic() > deadline:
                deadline = math.inf
                step = f"round {self.rounds}" if self._fingerprint else "its first step"
                self._say(
                    f"no worker has begun {step} for {self.timeout:g} s; this server goes on "
                    f"waiting without a limit ({HINT})"
                )
            return False

        wait_until(look, math.inf, lambda: "")

    @property
    def _limit(self) -> float:
        """Seconds that workers may be behind others."""
        if not any(bucket.spec.workers for bucket in self.buckets.values()):
            return self.timeout
        # Later than the workers of a node, which know which one of them is missing.
        return _GRACE * self.timeout + _GRACE_SECONDS

    def _begun(self) -> _Begun | None:
        """The action that some workers have begun and others have not, or None."""
        if not self._fingerprint:
            if not self._configs:
                return None
            missing = sorted(self._present - set(self._configs))
            return _Begun(self._met_at, missing, "begin their first step")
        buckets = [bucket for bucket in self.buckets.values() if bucket.begun]
        if buckets:
            missing = sorted({worker for bucket in buckets for worker in bucket.missing})
            names = ", ".join(f"'{bucket.spec.name}'" for bucket in buckets[:3])
            since = min(bucket.begun_at for bucket in buckets)
            return _Begun(since, missing, f"send {names} in round {buckets[0].round}")
        if self._saves.asked:
            missing = sorted(self._present - set(self._saves.asked))
            step = next(iter(self._saves.asked.values()))
            return _Begun(self._saves.asked_at, missing, f"ask for a checkpoint of step {step}")
        return None

    def _waited(self, workers: list[int], what: str) -> str:
        return (
            f"server {self._group.number} waited {self._limit:g} s for workers {workers} to "
            f"{what}; see why they did not ({HINT}), or raise --timeout or EF_HOROVOD_TIMEOUT"
        )

    def _farewell(self) -> None:
        """Give all workers time to receive the reason of the end."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and not (self._inbox.sent and not self._present):
            for arrived in self._inbox.poll():
                worker = self._worker_of.get(arrived.source)
                if worker is not None and arrived.message and arrived.message.kind is Kind.BYE:
                    self._present.discard(worker)
            time.sleep(1e-3)
