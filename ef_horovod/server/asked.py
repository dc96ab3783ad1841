"""One bucket at a worker, without any MPI: its buffers, its rounds, what an answer says."""

from __future__ import annotations

import numpy as np

from ef_horovod.errors import ProtocolError
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import HEADER_NBYTES, MISSED, Kind, Message, unpack
from ef_horovod.server.rounds import longest_message
from ef_horovod.transports.base import Answer


class AskedBucket:
    """A bucket that a server is asked about.

    Args:
        index: of the bucket, among those of all servers.
        spec: what it is.
    """

    def __init__(self, index: int, spec: BucketSpec) -> None:
        self.index, self.spec, self.server = index, spec, -1
        self._method = spec.make_method()
        self.round = 0  # answers that were handed on
        self.backlog: list[Answer] = []  # of later rounds that some other bucket has no answer of
        self.step = 0  # of the message that is under way
        self.outgoing = self.incoming = np.empty(0, np.uint8)

    def open(self, server: int) -> None:
        """Make room for messages to and from a server."""
        nbytes = longest_message(self.spec)
        self.server = server
        self.outgoing, self.incoming = (np.empty(nbytes, np.uint8) for _ in range(2))

    def read(self, data: np.ndarray, fingerprint: int, *, with_quorum: bool) -> Answer:
        """What a server's message says: uint8[m], which the answer keeps.

        Args:
            data: the message.
            fingerprint: of the config.
            with_quorum: the server counts the steps then, and this rank may have been late.

        Raises:
            ProtocolError: it is not the answer that is due.
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


assert HEADER_NBYTES % 8 == 0  # bodies can be read as numbers where they lie
