"""One bucket at a worker, without MPI: buffers, rounds, and parsing of answers."""

from __future__ import annotations

import numpy as np

from ef_horovod.errors import ProtocolError
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import HEADER_NBYTES, MISSED, Kind, Message, unpack
from ef_horovod.server.rounds import longest_message
from ef_horovod.transports.base import Answer


class AskedBucket:
    """A worker's side of a bucket that a server aggregates.

    Args:
        index: of the bucket, among those of all servers.
        spec: of the bucket.
    """

    def __init__(self, index: int, spec: BucketSpec) -> None:
        self.index, self.spec, self.server = index, spec, -1
        self._method = spec.make_method()
        self.round = 0  # number of answers passed on
        self.backlog: list[Answer] = []  # of later rounds, not yet answered for all buckets
        self.step = 0  # of the message under way
        self.outgoing = self.incoming = np.empty(0, np.uint8)

    def open(self, server: int) -> None:
        """Allocate buffers for messages to and from a server."""
        nbytes = longest_message(self.spec)
        self.server = server
        self.outgoing, self.incoming = (np.empty(nbytes, np.uint8) for _ in range(2))

    def read(self, data: np.ndarray, fingerprint: int, *, with_quorum: bool) -> Answer:
        """Parse a server's answer.

        Args:
            data: the message, uint8[m]; the answer refers to it.
            fingerprint: of the config.
            with_quorum: if True, the server counts the steps, and this rank may have been late.

        Raises:
            ProtocolError: it is not the expected answer.
        """
        message, body = unpack(data)
        counted = not message.flags & MISSED
        step = message.step if with_quorum else self.step
        expected = Message(
            message.kind, 0, self.index, step, self.round, fingerprint, message.flags
        )
        if message == expected:
            if message.kind is Kind.PAYLOAD:
                return Answer(payload=body, counted=counted)
            length = self._method.message_length(self.spec.length, step)
            if message.kind is Kind.NUMBERS and body.size == 4 * length:
                return Answer(numbers=body.view(np.float32), counted=counted)
            if message.kind is Kind.DROP:
                return Answer(counted=counted)
        raise ProtocolError(
            f"a server sent {message} with {body.size} bytes about '{self.spec.name}', expected "
            f"{expected} as an answer; install the same ef_horovod on all ranks"
        )


assert HEADER_NBYTES % 8 == 0  # bodies can be viewed as numbers without a copy
