"""Rounds that do not wait for all workers: m of n messages complete a round.

A late worker gets the round's answer like all others and keeps waiting. Its message counts in the
next round. So no message is lost, and all workers apply the same answers in the same order, at
different times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ef_horovod import wire
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.parsing import read_method
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import MISSED, Kind, Message, pack
from ef_horovod.server.rounds import ServedBucket

FARTHEST_BEHIND = 64  # rounds a worker may be late; its unread answers take memory


class Participation:
    """The workers that take part in each round; the same in all buckets.

    Args:
        quorum: number of workers per round.
        workers: number of all workers.
    """

    def __init__(self, quorum: int, workers: int) -> None:
        self.quorum = quorum
        self.present = set(range(workers))  # workers that have not ended
        self._chosen: dict[int, frozenset[int]] = {}

    def of(self, turn: int) -> frozenset[int] | None:
        """The workers of a round; None if not yet chosen."""
        return self._chosen.get(turn)

    def choose(self, turn: int, here: set[int], due: dict[int, int]) -> frozenset[int] | None:
        """The workers of a round; chooses those in `here` if they suffice, else None.

        Args:
            turn: the round.
            here: workers whose messages about one bucket are waiting.
            due: the round of each worker's next message; shows how late it is.
        """
        if turn not in self._chosen:
            needed = {w for w in self.present if due[w] <= turn - FARTHEST_BEHIND}
            if len(here) < min(self.quorum, len(self.present)) or not here or needed - here:
                return None
            self._chosen[turn] = frozenset(here)
            self._chosen.pop(turn - 2 * FARTHEST_BEHIND, None)
        return self._chosen[turn]


def require_quorum(
    quorum: int, workers: int, servers: int, methods: Iterable[str], *, by_nodes: bool = False
) -> None:
    """Raise unless this quorum is possible.

    Raises:
        UnsupportedError: there are too few workers, several servers, workers that wait for those of
            their node, or a method whose workers must not miss a round.
    """
    if by_nodes:
        raise UnsupportedError(
            f"got a quorum of {quorum} with exchange='hierarchical:server', expected none, because "
            "the workers of a node wait for each other; leave --quorum out, or take "
            "exchange='server'"
        )
    if not 1 <= quorum < workers or servers > 1:
        raise UnsupportedError(
            f"got a quorum of {quorum} with {workers} workers and {servers} servers, expected one "
            "of 1 to all workers, and one server, which alone decides whose messages make a "
            "round; leave --quorum out otherwise"
        )
    for method in methods:
        if not read_method(method).can_listen:
            raise UnsupportedError(
                f"got a quorum with {method}, expected a method whose workers can miss rounds; "
                "leave --quorum out, or take DoubleSqueeze, ErrorFeedback or EF21"
            )


class QuorumBucket(ServedBucket):
    """Rounds of one bucket in which only some workers take part.

    A message that asks to drop the step counts as an empty one.
    """

    def __init__(
        self,
        index: int,
        spec: BucketSpec,
        workers: int,
        fingerprint: int,
        participation: Participation,
    ) -> None:
        super().__init__(index, spec, workers, fingerprint)
        self._participation = participation
        self._due = dict.fromkeys(range(workers), 0)  # the round of each worker's next message

    @property
    def missing(self) -> list[int]:
        """Workers that the round waits for or may wait for."""
        chosen = self._participation.of(self.round) or self._participation.present
        return sorted(set(chosen) - set(self._messages))

    def accept(self, worker: int, message: Message, body: np.ndarray) -> bool:
        self._keep(worker, self._checked(worker, message, body))
        return True  # this may complete other buckets

    def answers(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        while True:
            chosen = self._participation.choose(self.round, set(self._messages), self._due)
            if chosen is None or not chosen <= set(self._messages):
                return
            yield from self._answer_of(chosen)

    def _answer_of(self, chosen: frozenset[int]) -> Iterator[tuple[np.ndarray, list[int]]]:
        d = self.method.message_length(self.spec.length, self.step)
        nothing = Payload(wire.Header(self.method.compressor.wire_id, wire.ABSENT, 0, d).pack())
        counted = {worker: self._messages[worker] for worker in chosen}
        payloads = [counted.get(worker, nothing) for worker in range(self.workers)]
        self._this_step = self.step
        kind, body = self._reduce([nothing if p.is_skip else p for p in payloads])
        self._undo = None
        message = Message(kind, 0, self.index, self.step, self.round, fingerprint=self._fingerprint)
        late = sorted(self._participation.present - chosen)
        # New buffers, because a late worker may read the answer many rounds later.
        both = [(pack(message, body), sorted(self._participation.present & chosen))]
        if late:
            both.append((pack(message._replace(flags=MISSED), body), late))
        self.dropped += kind is Kind.DROP
        self.step += 1
        self.round += 1
        for worker in chosen:
            del self._messages[worker]
            self._due[worker] = self.round
        return iter(both)

    def _problem(self, worker: int, message: Message) -> str:
        due = self._due[worker]
        if worker not in self._messages:
            if not due <= message.round <= self.round:
                return (
                    f"worker {worker} sent '{self.spec.name}' for round {message.round}, expected "
                    f"one from {due} to {self.round}"
                )
            message = message._replace(round=self.round, step=self.step)  # late is allowed
        self._this_step = self.step
        return super()._problem(worker, message)
