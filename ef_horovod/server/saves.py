"""When a server saves its state: once all workers have asked, or when the job ends early."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from ef_horovod.errors import ProtocolError, ServerError
from ef_horovod.server.checkpoint import load, save
from ef_horovod.server.rounds import ServedBucket


class Saves:
    """The checkpoints of one server.

    Args:
        folder: for checkpoints, or None.
        server: this server's number.
        workers: number of workers.
        say: gets a readable line.
    """

    def __init__(
        self, folder: Path | None, server: int, workers: int, say: Callable[[str], None]
    ) -> None:
        self._folder, self._server, self._workers, self._say = folder, server, workers, say
        self._last = 0  # step of the last checkpoint
        self.asked: dict[int, int] = {}  # worker to the step it wants saved
        self.asked_at = 0.0  # time of the first request

    def load(self, buckets: Collection[ServedBucket], step: int, fingerprint: int) -> None:
        """Restore the buckets' state after `step` steps.

        Raises:
            ConfigMismatchError: there is no such checkpoint.
        """
        state = load(self._folder, step, fingerprint, [bucket.spec.name for bucket in buckets])
        for bucket in buckets:
            bucket.load(state, step)
        self._last = step

    def ask(
        self, worker: int, step: int, buckets: Collection[ServedBucket], fingerprint: int
    ) -> bool:
        """Note a worker's request for a checkpoint after `step` steps; the last request saves it.

        Returns:
            Whether it was saved.

        Raises:
            ProtocolError: there is no folder, or the request is not between two steps.
            ServerError: workers asked for different steps.
        """
        if self._folder is None:
            raise ProtocolError(
                f"worker {worker} asked for a checkpoint, expected a server with a folder for it; "
                "start the server with --checkpoint FOLDER"
            )
        known = {bucket.step for bucket in buckets}
        before = {last - 1 for last in known}
        if any(bucket.begun for bucket in buckets) or (
            known and step not in known and step not in before
        ):
            raise ProtocolError(
                f"worker {worker} asked for a checkpoint of step {step}, expected it between two "
                f"steps and of step {sorted(known)}; let all workers ask after the same step"
            )
        if not self.asked:
            self.asked_at = time.monotonic()
        self.asked[worker] = step
        if len(self.asked) < self._workers:
            return False
        steps = set(self.asked.values())
        if len(steps) > 1:
            raise ServerError(
                f"workers asked for checkpoints of steps {sorted(steps)} at once, expected the "
                "same step; let all workers ask after the same step"
            )
        self.asked.clear()
        self._write(step, buckets, fingerprint)
        return True

    def save_what_is_complete(self, buckets: Collection[ServedBucket], fingerprint: int) -> None:
        """When the job ends early, save the last step complete in all buckets."""
        step = min((bucket.step for bucket in buckets), default=0)
        if self._folder is None or step in (0, self._last):
            return
        try:
            self._write(step, buckets, fingerprint)
        except (ServerError, ValueError) as error:
            self._say(f"could not save step {step}: {error}")

    def _write(self, step: int, buckets: Collection[ServedBucket], fingerprint: int) -> None:
        assert self._folder is not None
        state: dict[str, np.ndarray] = {}
        for bucket in buckets:
            state |= bucket.to_save(step)
        try:
            file = save(self._folder, step, self._server, fingerprint, state)
        except OSError as error:
            raise ServerError(
                f"server {self._server} could not write step {step} to {self._folder} ({error}), "
                "expected a place for its checkpoints; make room, or name another --checkpoint"
            ) from None
        self._last = step
        self._say(f"saved {file}")
