"""A server's progress reports: readable lines, and JSON lines for `--log`."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

EVERY_SECONDS = 10.0


class Totals(NamedTuple):
    """Counters of a server since its start."""

    rounds: int  # complete in all buckets
    bytes_up: int  # received, with all headers
    bytes_down: int
    dropped: int  # rounds of a bucket that were dropped or taken back
    refused: int  # messages


class ServerMonitor:
    """Reports every `every` seconds, and at the end.

    Args:
        totals: reads the counters.
        dense_nbytes: bytes that all workers would send per round as float32.
        say: gets a readable line.
        log: file to append JSON lines to, or None; servers of a job can share it.
        server: this server's number.
        every: seconds between two reports.
        clock: returns seconds, with any start.
    """

    def __init__(
        self,
        totals: Callable[[], Totals],
        dense_nbytes: int,
        say: Callable[[str], None],
        log: Path | None = None,
        server: int = 0,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals, self._dense, self._say = totals, dense_nbytes, say
        self._server, self._every, self._clock = server, every, clock
        self._file: TextIO | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._file = log.open("a", encoding="utf-8")
        self._begin = self._last = clock()
        self._before = totals()
        self._last_ones: Counter[int] = Counter()
        self._waited: dict[int, float] = defaultdict(
            float
        )  # seconds that all others waited for a worker
        self._latest: dict[int, float] = {}  # bucket to time of the latest message of its round

    def arrived(self, worker: int, bucket: int, complete: bool) -> None:
        """Note a worker's message. If it completes the bucket's round, all others waited for it.

        The waiting time is that since the previous message of the round.
        """
        now = self._clock()
        if not complete:
            self._latest[bucket] = now
            return
        self._last_ones[worker] += 1
        self._waited[worker] += now - self._latest.pop(bucket, now)

    def look(self) -> None:
        """Report, if a report is due."""
        if self._clock() - self._last >= self._every:
            self.report()

    def report(self) -> None:
        """Report the rounds since the last report, if any."""
        now, totals = self._clock(), self._totals()
        rounds = totals.rounds - self._before.rounds
        if rounds > 0:
            self._write(self._entry(rounds, totals, now))
        self._last, self._before = now, totals
        self._last_ones.clear()
        self._waited.clear()

    def close(self) -> None:
        """Write the last report and close the log."""
        self.report()
        if self._file is not None:
            self._file.close()

    def _entry(self, rounds: int, totals: Totals, now: float) -> dict[str, Any]:
        up, down = (
            (getattr(totals, name) - getattr(self._before, name)) / rounds
            for name in ("bytes_up", "bytes_down")
        )
        slowest = self._last_ones.most_common(1)
        worker, times = slowest[0] if slowest else (None, 0)
        return {
            "server": self._server,
            "seconds": round(now - self._begin, 3),
            "round": totals.rounds,
            "rounds_per_second": rounds / max(now - self._last, 1e-9),
            "bytes_up": up,  # per round, of all workers together
            "bytes_down": down,
            "ratio_up": up / self._dense if self._dense else None,
            "ratio_down": down / self._dense if self._dense else None,
            "slowest_worker": worker,
            "slowest_share": times / max(sum(self._last_ones.values()), 1),
            # Seconds that all others waited for a worker, summed over buckets.
            "waited": {str(who): round(self._waited[who], 6) for who in sorted(self._waited)},
            "dropped": totals.dropped,
            "refused": totals.refused,
        }

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
            except OSError as error:  # must not end the training
                self._say(f"could not write to the log ({error}), and goes on without one")
                self._file = None
        up, down = (
            f"{entry[f'bytes_{way}'] / 1e6:.2f} MB {way}"
            + (f" (1/{1 / entry[f'ratio_{way}']:.0f})" if entry[f"ratio_{way}"] else "")
            for way in ("up", "down")
        )
        line = (
            f"round {entry['round']}: {entry['rounds_per_second']:.1f} rounds/s, a round has {up} "
            f"and {down}"
        )
        if entry["slowest_worker"] is not None:
            share = 100 * entry["slowest_share"]
            line += f"; worker {entry['slowest_worker']} was last in {share:.0f} %"
        self._say(line)
