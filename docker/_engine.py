"""What the scripts beside this file share: the engine, compose, and commands with a limit."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "ef-horovod"
COMPOSE_FILE = ROOT / "docker" / "compose.yml"
SECONDS_TO_ANSWER = 30
SECONDS_TO_END = 15
INSTALL = "`apt-get install docker.io docker-compose` on Debian and Ubuntu, see docs/docker.md"


class EngineError(RuntimeError):
    """Something is missing or took too long; the message says what, and the way out."""


def require_engine() -> None:
    """Raise unless a client is there and an engine answers it."""
    if shutil.which("docker") is None:
        raise EngineError(f"docker was not found on PATH, expected Docker: {INSTALL}")
    try:
        done = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"the Docker engine did not answer in {SECONDS_TO_ANSWER} s, expected one that runs: "
            "see `docker info`"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise EngineError(
            f"no Docker engine answers ({lines[-1]}), expected one that runs: start it with "
            f"`systemctl start docker` or as root `dockerd`, install it with {INSTALL}"
        )


def compose_command() -> list[str]:
    """`docker compose` (v2), or docker-compose (v1) where there is no plugin."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise EngineError(
        "neither `docker compose` nor docker-compose was found, expected one of them: "
        "`apt-get install docker-compose`, or Docker's docker-compose-plugin"
    )


def run(command: list, limit: float, *, env: dict | None = None, quiet: bool = False) -> int:
    """Run a command to its end, and end it with all that it started when the limit has passed.

    It has a session of its own, so Ctrl-C reaches this process alone, which ends it in turn.

    Raises:
        EngineError: the limit has passed.
    """
    output = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"`{' '.join(str(word) for word in command[:3])} ...` did not end within {limit:g} s"
        ) from None
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process, and then what it has left of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def signals_raise() -> None:
    """Let SIGTERM and SIGHUP end this process by an exception, as Ctrl-C does."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    # A shell's background job ignores it, and Python then does too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def signals_wait() -> None:
    """Let nothing interrupt what follows, which is short and has limits of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def fail(prog: str, error: EngineError) -> int:
    print(f"{prog}: error: {error}", file=sys.stderr)
    return 1
