"""The file of a training log: JSON lines, a header in front of those of each `TrainingLog`.

The header says what trains. A process that resumes a training writes another header and goes on in
the same file. Counters in a line count from the header's `start` on. `read_log` joins the parts.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ef_horovod.errors import LogError

FORMAT, VERSION = "ef_horovod training log", 1
_BEGINNING = f'{{"format": "{FORMAT}"'
# Counters in a line, since the step at which its header says that the log starts.
COUNTERS = (
    "skipped", "bytes_out", "bytes_in", "dense_bytes_out",
    "seconds", "seconds_compress", "seconds_wait", "seconds_decompress",
)  # fmt: skip
_NORMS = ("loss", "error_norm", "gradient_norm")
Entry = dict[str, Any]
_A_LINE = "a line of a training log; name a file of ef.TrainingLog"


class TrainingRun(NamedTuple):
    """A training as its log tells it."""

    file: Path
    header: Entry  # the last one
    lines: list[Entry]  # with steps that do not fall; counters from the start of the training
    notes: list[str]  # what was left out


def is_log(file: Path) -> bool:
    """Whether a file begins as a training log, or ends while it does.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        start = opened.read(len(_BEGINNING)).decode("utf-8", "replace")
    return bool(start) and _BEGINNING.startswith(start)


class LogFile:
    """Appends lines to a log; each is written at once.

    Args:
        file: a new file, or an earlier log, whose last line is removed if it was cut off.

    Raises:
        LogError: the file is something else, or cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        require_folder(file)
        try:
            if file.exists() and file.stat().st_size:
                refuse_others(file)
                _cut(file)
            file.touch()
        except OSError as error:
            raise _unwritable(file, error) from None

    def append(self, entry: Entry) -> None:
        """Write a line.

        Raises:
            OSError: it could not be written.
        """
        with self._file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(_finite(entry), allow_nan=False) + "\n")


def refuse_others(file: Path) -> None:
    """Raise if a file exists and is something else than a training log.

    Raises:
        LogError: it is.
    """
    try:
        fits = not file.exists() or file.stat().st_size == 0 or is_log(file)
    except OSError as error:
        raise _unreadable(file, error) from None
    if not fits:
        raise LogError(
            f"{file} is another file, expected a training log to go on in, or none; name another "
            "path"
        )


def require_folder(file: Path) -> None:
    """Make the folder of a log.

    Raises:
        LogError: it cannot be made, or nothing can be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(f"no permission to write in {file.parent}")
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> LogError:
    return LogError(
        f"could not write {file} ({error}), expected a place for the training log; name another "
        "path"
    )


def _cut(file: Path) -> None:
    """Remove a last line that has no end."""
    with file.open("rb+") as opened:
        opened.truncate(opened.read().rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(file: Path) -> TrainingRun:
    """The training in a log.

    Where a process resumed from an earlier step than the last one logged, its lines replace those
    after that step. A last line that was cut off is left out.

    Raises:
        LogError: the file is missing, is something else, is of a newer version, or is damaged.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None
    lines, notes = text.splitlines(), []
    if lines and not text.endswith("\n"):
        notes.append(f"{file}: the last line was cut off and is left out.")
        del lines[-1]
    header: Entry = {}
    found: list[Entry] = []
    before: Entry = {}
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        entry = parsed(line, where, _A_LINE)
        if number == 1 or "format" in entry:
            header = _checked_header(entry, where)
            if header["start"] == 0 and found:
                notes.append(f"{file}: the log has several trainings, this is the last one.")
            _drop_after(header["start"], found)
            before = found[-1] if found else {}
        else:
            entry = _checked_line(entry, where)
            _drop_after(entry["step"], found)  # after a state was loaded within the process
            found.append(entry | {name: entry[name] + before.get(name, 0) for name in COUNTERS})
    if not found:
        raise LogError(f"{file} has no steps, expected some; see whether the training got so far")
    return TrainingRun(file, header, found, notes)


def _unreadable(file: Path, error: Exception) -> LogError:
    return LogError(
        f"could not read {file} ({error}), expected a training log; name a file of ef.TrainingLog"
    )


def parsed(line: str, where: str, expected: str) -> Entry:
    """The JSON object in a line.

    Args:
        line: of a log.
        where: names file and line.
        expected: ends the message: what was expected, and the way out.

    Raises:
        LogError: the line is something else.
    """
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise LogError(f"{where} is no JSON ({error}), expected {expected}") from None
    if not isinstance(entry, dict):
        raise LogError(f"{where} has {line[:60]!r}, expected {expected}")
    return entry


def _checked_header(entry: Entry, where: str) -> Entry:
    if entry.get("format") != FORMAT:
        raise LogError(
            f"{where} has no header, expected that of a training log; name a file of ef.TrainingLog"
        )
    if entry.get("version") != VERSION:
        raise LogError(
            f"{where} has version {entry.get('version')!r} of a training log, expected {VERSION}; "
            "read it with the version of ef_horovod that wrote it"
        )
    _require_numbers(entry, ("start", "ranks", "parameters"), where)
    for name, kind in (("versions", dict), ("exchanges", list)):
        held = entry.setdefault(name, kind())
        if not isinstance(held, kind) or not all(isinstance(part, str) for part in held):
            raise _wrong(where, held, name, "texts")
    return entry


def _checked_line(entry: Entry, where: str) -> Entry:
    _require_numbers(entry, ("step", *COUNTERS), where)
    for name in _NORMS:
        if entry.get(name) is None:
            entry[name] = math.nan
    _require_numbers(entry, _NORMS, where)
    layers = entry.setdefault("layers", {})
    for norms in layers.values() if isinstance(layers, dict) else [layers]:
        if not isinstance(norms, list) or len(norms) != 2 or not all(map(_is_norm, norms)):
            raise _wrong(where, norms, "layers", "two norms for each parameter")
    return entry


def _require_numbers(entry: Entry, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not _is_number(entry.get(name)):
            raise _wrong(where, entry.get(name), name, "a number")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _is_norm(value: Any) -> bool:
    return value is None or _is_number(value)  # None: not finite


def _wrong(where: str, value: Any, name: str, expected: str) -> LogError:
    return LogError(
        f"{where} has {repr(value)[:60]} as {name!r}, expected {expected}; name a file of "
        "ef.TrainingLog"
    )


def _drop_after(step: int, lines: list[Entry]) -> None:
    while lines and lines[-1]["step"] > step:
        lines.pop()
