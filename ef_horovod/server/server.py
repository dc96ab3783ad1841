"""The server's side of the job: meets the workers, then serves rounds until they have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ef_horovod.errors import (
    PayloadError,
    ProtocolError,
    ServerError,
    UnsupportedError,
)
from ef_horovod.methods.base import Method
from ef_horovod.server.checkpoint import load, save
from ef_horovod.server.inbox import Arrived, Inbox, control_buffer
from ef_horovod.server.link import SERVER, Group, connect
from ef_horovod.server.plan import BucketSpec, Config, assign, require_agreement
from ef_horovod.server.protocol import (
    CONTROL_TAG,
    Kind,
    Message,
    body_text,
    pack,
    text_body,
)
from ef_horovod.server.quorum import Participation, QuorumBucket
from ef_horovod.server.rounds import ServedBucket, longest_message
from ef_horovod.server.watch import Totals, Watch
from ef_horovod.spelling import read_method
from ef_horovod.transports.waiting import limit_of, wait_until

_FAREWELL_SECONDS = 5.0  # for workers to take the reason of the end
_REFUSED_SHOWN = 20


class Server:
    """One server rank.

    Args:
        method: that the workers have to have, or None to take theirs.
        checkpoint: folder for this server's memories, or None. Workers ask for checkpoints; when
            the job ends with an error, the last complete step is written as well.
        quorum: how many workers make a round, or None for all; see `quorum.py`.
        log: file for JSON lines about the work, or None.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
        say: gets a line for people now and then.
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
        comm: Any = None,
    ) -> None:
        self.timeout = limit_of(timeout)
        self._method, self._say, self._folder = method, say, checkpoint
        self._group: Group = connect(SERVER, self.timeout, comm)
        self._worker_of = {rank: i for i, rank in enumerate(self._group.workers)}
        self._inbox = Inbox(self._group.comm, self._buffer_of)
        self._present = set(self._worker_of.values())
        self._configs: dict[int, Config] = {}
        self._quorum, self._log = quorum, log
        self._watch: Watch | None = None
        self._participation: Participation | None = None
        self._stop = ""
        self._last_saved = 0  # step of the last checkpoint
        self._saves: dict[int, int] = {}  # worker to the step that it wants saved
        self._fingerprint = 0
        self.buckets: dict[int, ServedBucket] = {}  # by index, those of this server
        self._buffers: dict[tuple[int, int], np.ndarray] = {}  # by (worker, bucket)
        self._receiving: set[tuple[int, int]] = set()  # buffers that are being written to
        self.refused = 0  # messages

    def run(self) -> None:
        """Serve until all workers have ended.

        Raises:
            ConfigMismatchError: workers disagree, with each other or with this server.
            CollectiveTimeoutError: workers stayed silent; names them.
            ServerError: a worker failed, or ended before the others.
        """
        try:
            self._wait(lambda: len(self._configs) == self.workers, "say what it trains")
            self._open_buckets()
            while self._present:
                self._wait_for_anything()
            self._close_watch()
            wait_until(
                lambda: self._inbox.sent,
                self.timeout,
                lambda: self._waited(list(range(self.workers)), "take the last answers"),
            )
        except Exception as error:  # of whatever kind: the memories are saved
            # At once, for another server may abort the job in the next moment.
            self._say(f"error: {type(error).__name__}: {error}")
            self._tell(Kind.ABORT, f"{type(error).__name__}: {error}")
            self._save_what_is_complete()
            self._close_watch()
            self._farewell()
            raise

    def stop(self, reason: str) -> None:
        """End the job with an error as soon as nothing is half done; for signal handlers."""
        self._stop = reason

    @property
    def workers(self) -> int:
        """How many workers the job has."""
        return len(self._group.workers)

    @property
    def rounds(self) -> int:
        """Rounds that are complete in all buckets."""
        return min((bucket.round for bucket in self.buckets.values()), default=0)

    # --- meeting -------------------------------------------------------------------------------

    def _open_buckets(self) -> None:
        configs = [self._configs[worker] for worker in range(self.workers)]
        require_agreement(configs, self._method)
        self._require_quorum({spec.method for spec in configs[0].buckets})
        self._fingerprint, specs, step = configs[0].fingerprint, configs[0].buckets, configs[0].step
        for index, owner in enumerate(assign(specs, len(self._group.servers))):
            if owner != self._group.number:
                continue
            spec = specs[index]
            self.buckets[index] = self._make_bucket(index, spec)
            for worker in range(self.workers):
                self._buffers[worker, index] = np.empty(longest_message(spec), np.uint8)
        if step > 0:
            names = [bucket.spec.name for bucket in self.buckets.values()]
            memories = load(self._folder, step, self._fingerprint, names)
            for bucket in self.buckets.values():
                bucket.load(memories, step)
            self._last_saved = step
        elements = sum(bucket.spec.length for bucket in self.buckets.values())
        self._say(
            f"serves {self.workers} workers: {len(self.buckets)} of {len(specs)} buckets with "
            f"{elements:,} elements by {', '.join(sorted({spec.method for spec in specs}))}, from "
            f"step {step} on"
        )
        dense_nbytes, number = 4 * elements * self.workers, self._group.number
        self._watch = Watch(self._totals, dense_nbytes, self._say, self._log, number)
        self._tell(Kind.WELCOME, "" if self._participation is None else str(self._quorum))

    def _totals(self) -> Totals:
        dropped = sum(bucket.dropped for bucket in self.buckets.values())
        inbox = self._inbox
        return Totals(self.rounds, inbox.bytes_received, inbox.bytes_sent, dropped, self.refused)

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _require_quorum(self, methods: set[str]) -> None:
        if self._quorum is None or self._quorum == self.workers:
            return
        servers = len(self._group.servers)
        if not 1 <= self._quorum < self.workers or servers > 1:
            raise UnsupportedError(
                f"got a quorum of {self._quorum} with {self.workers} workers and {servers} "
                "servers, expected one of 1 to all workers, and one server, which alone decides "
                "whose messages make a round; leave --quorum out otherwise"
            )
        for method in methods:
            if not read_method(method).can_listen:
                raise UnsupportedError(
                    f"got a quorum with {method}, expected a method whose workers can miss rounds; "
                    "leave --quorum out, or take DoubleSqueeze, ErrorFeedback or EF21"
                )
        self._participation = Participation(self._quorum, self.workers)

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
        if worker is None or bucket is None:
            return None
        place = worker, bucket.index
        if nbytes > self._buffers[place].size:
            return None
        if bucket.has(worker) or place in self._receiving:  # what comes now is early or twice
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
                self._answer([bucket] if self._participation is None else self.buckets.values())
        elif message.kind is Kind.HELLO and not self._fingerprint:
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
        """A worker asks for a checkpoint after so many steps; the last one of them makes it."""
        if self._participation is not None:
            raise ProtocolError(
                f"worker {worker} asked for a checkpoint, expected none with a quorum: workers are "
                "in different rounds; leave --quorum out"
            )
        if self._folder is None:
            raise ProtocolError(
                f"worker {worker} asked for a checkpoint, expected a server with a folder for it; "
                "start the server with --checkpoint FOLDER"
            )
        known = {bucket.step for bucket in self.buckets.values()}
        before = {last - 1 for last in known}
        if any(bucket.begun for bucket in self.buckets.values()) or (
            known and step not in known and step not in before
        ):
            raise ProtocolError(
                f"worker {worker} asked for a checkpoint of step {step}, expected it between two "
                f"steps and of step {sorted(known)}; let all workers ask after the same step"
            )
        self._saves[worker] = step
        if len(self._saves) < self.workers:
            return
        steps = set(self._saves.values())
        if len(steps) > 1:
            raise ServerError(
                f"workers asked for checkpoints of steps {sorted(steps)} at once, expected the "
                "same step; let all workers ask after the same step"
            )
        self._saves.clear()
        self._write(step)
        self._tell(Kind.SAVED)

    def _write(self, step: int) -> None:
        assert self._folder is not None
        memories: dict[str, np.ndarray] = {}
        for bucket in self.buckets.values():
            memories |= bucket.memories(step)
        number = self._group.number
        self._last_saved = step
        self._say(f"saved {save(self._folder, step, number, self._fingerprint, memories)}")

    def _save_what_is_complete(self) -> None:
        """When the job ends early: the last step that all buckets have, taken back where needed."""
        step = min((bucket.step for bucket in self.buckets.values()), default=0)
        if self._folder is None or step in (0, self._last_saved):
            return
        try:
            self._write(step)
        except (OSError, ValueError) as error:
            self._say(f"could not save step {step}: {error}")

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
        """Say no to a message and go on: nothing was changed by it."""
        self.refused += 1
        if self.refused <= _REFUSED_SHOWN:
            self._say(f"refused a message: {problem}")
        if worker is not None:
            notice = pack(Message(Kind.REFUSED), text_body(problem))
            self._inbox.send(notice, [self._group.workers[worker]], CONTROL_TAG)

    def _tell(self, kind: Kind, text: str = "") -> None:
        ranks = [self._group.workers[worker] for worker in sorted(self._present)]
        self._inbox.send(pack(Message(kind), text_body(text)), ranks, CONTROL_TAG)

    # --- waiting -------------------------------------------------------------------------------

    def _progress(self) -> bool:
        """Whether anything has happened."""
        if self._stop:
            raise ServerError(self._stop)
        arrived = self._inbox.poll()
        for one in arrived:
            self._take(one)
        if self._watch is not None:
            self._watch.look()
        return bool(arrived)

    def _wait_for_anything(self) -> None:
        wait_until(self._progress, self.timeout, lambda: self._waited(*self._awaited()))
        some = len(self._present) not in (0, self.workers) and self._participation is None
        if some and any(bucket.begun for bucket in self.buckets.values()):
            self._require_all_present()

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self._progress()
            return done()

        missing = lambda: sorted(self._present - set(self._configs))  # noqa: E731
        wait_until(look, self.timeout, lambda: self._waited(missing(), what))

    def _awaited(self) -> tuple[list[int], str]:
        """Whom the server waits for, and what for."""
        begun = [bucket for bucket in self.buckets.values() if bucket.begun]
        if not begun:
            return sorted(self._present), f"begin round {self.rounds}"
        missing = sorted({worker for bucket in begun for worker in bucket.missing})
        names = ", ".join(f"'{bucket.spec.name}'" for bucket in begun[:3])
        return missing, f"send {names} in round {begun[0].round}"

    def _waited(self, workers: list[int], what: str) -> str:
        return (
            f"server {self._group.number} waited {self.timeout:g} s for workers {workers} to "
            f"{what}; see why they did not, or raise --timeout or EF_HOROVOD_TIMEOUT"
        )

    def _farewell(self) -> None:
        """Give all workers a moment to hear why the job ends."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and not (self._inbox.sent and not self._present):
            for arrived in self._inbox.poll():
                worker = self._worker_of.get(arrived.source)
                if worker is not None and arrived.message and arrived.message.kind is Kind.BYE:
                    self._present.discard(worker)
            time.sleep(1e-3)
