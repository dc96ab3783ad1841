"""Run a long command with one line of progress and its full output in a log.

Standard library only, because launch scripts load this file by path before packages are installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TAIL_LINES = 15
ERROR_LINES = 10
ERROR = re.compile(r"CMake Error|error:|undefined reference|No space left|Killed", re.IGNORECASE)


class CommandFailed(RuntimeError):
    """A command ended with a non-zero status; the message shows the end of its output."""


class Ticker:
    """Progress line: redrawn twice a second on a terminal, otherwise a few plain lines."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.percent: int | None = None
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()
        self._next_plain = 10
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    def __enter__(self) -> Ticker:
        print(self.label + " ...", end="" if self.live else "\n", flush=True)
        if self.live:
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        if self.live:
            self._thread.join()
        word = "done" if kind is None else "failed"
        print(f"{self._clear()}{self.label}: {word} in {self.seconds:.0f} s", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def update(self, percent: int) -> None:
        """Show a new percentage. It never decreases, because several make targets run at once."""
        self.percent = max(percent, self.percent or 0)
        if not self.live and self.percent >= self._next_plain:
            print(f"  {self.label}: {self.percent} % after {self.seconds:.0f} s", flush=True)
            self._next_plain = self.percent // 10 * 10 + 10

    def _redraw(self) -> None:
        while not self._stop.wait(0.5):
            percent = "" if self.percent is None else f" {self.percent} %"
            print(
                f"{self._clear()}{self.label} ...{percent} {self.seconds:.0f} s", end="", flush=True
            )

    def _clear(self) -> str:
        return "\r\033[K" if self.live else ""


class Excerpt:
    """Excerpt of a long output for an error message: the first errors and the last lines."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.tail: list[str] = []

    def add(self, line: str) -> None:
        if ERROR.search(line) and len(self.errors) < ERROR_LINES:
            self.errors.append(line)
        self.tail = [*self.tail[-TAIL_LINES + 1 :], line]

    def text(self) -> str:
        earlier = [line for line in self.errors if line not in self.tail]
        return "".join([*earlier, "...\n", *self.tail] if earlier else self.tail)


def run_logged(
    command: Sequence[object],
    *,
    label: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    percent_of: Callable[[str], int | None] = lambda line: None,
) -> None:
    """Run `command`, append its output to `log`, and show `label` with the elapsed time.

    Raises:
        CommandFailed: the command ended with a non-zero status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    excerpt = Excerpt()
    with Ticker(label) as ticker, log.open("a", encoding="utf-8") as sink:
        sink.write(f"\n$ {' '.join(words)}\n")
        process = subprocess.Popen(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # to end its compilers together with it
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sink.write(line)
                excerpt.add(line)
                percent = percent_of(line)
                if percent is not None:
                    ticker.update(percent)
            status = process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if status != 0:
            raise CommandFailed(
                f"{label}: the command ended with status {status}, expected 0; "
                f"the whole output is in {log}, the lines that matter are:\n{excerpt.text()}"
            )
