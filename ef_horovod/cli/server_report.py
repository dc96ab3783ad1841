"""`ef-horovod report`: a table and a plot of the JSON lines that servers write with `--log`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ef_horovod.cli.plotting import COLORS, load_pyplot
from ef_horovod.errors import LogError
from ef_horovod.training.log_file import Entry, parsed

_NUMBER = (int, float)
# Required fields of an entry, written by `ef_horovod.server.monitor`.
_FIELDS: dict[str, tuple[type, ...]] = {
    "server": (int,),
    "seconds": _NUMBER,
    "round": (int,),
    "rounds_per_second": _NUMBER,
    "bytes_up": _NUMBER,
    "bytes_down": _NUMBER,
    "ratio_up": (*_NUMBER, type(None)),
    "ratio_down": (*_NUMBER, type(None)),
    "waited": (dict,),
    "dropped": (int,),
    "refused": (int,),
}


class Log(NamedTuple):
    """The last job of a log."""

    servers: dict[int, list[Entry]]  # entries by server, in order of time
    notes: list[str]  # about entries that were left out


class Summary(NamedTuple):
    """Sums over a server's entries in a job."""

    rounds: int
    seconds: float  # until the last entry
    bytes_up: float  # sum over all workers
    bytes_down: float
    dense: float | None  # bytes that all workers would have sent as float32; None if not logged
    waited: dict[int, float]  # seconds that all others waited for a worker, summed over buckets
    dropped: int  # rounds of a bucket without a result, or undone
    refused: int  # messages


def report(log: Path, out: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Print a log's table and notes, then plot it.

    Args:
        log: file that servers wrote with `--log`.
        out: the image; default the log's name with .png.
        say: prints a text.

    Raises:
        LogError: the log is missing, empty or malformed, or `out` would overwrite it, cannot be
            written or has no image's suffix.
        UnsupportedError: matplotlib is not installed.
    """
    out = out or log.with_suffix(".png")
    if out.resolve() == log.resolve():
        raise LogError(f"got {out} as log and image, expected two files; name the image by --out")
    found = read_log(log)
    say(table(found))
    for note in found.notes:
        say(note)
    plot(found, out)
    say(f"The plot is in {out}")


def read_log(file: Path) -> Log:
    """The entries of the last job in a log, by server.

    An incomplete last line, as a killed server leaves it, is skipped with a note.

    Raises:
        LogError: the file is missing, has no entry, or has a line that is not an entry.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(
            f"could not read {file} ({error}), expected a log; name the FILE of a "
            "server's --log, or of ef.TrainingLog"
        ) from None
    lines, notes = text.splitlines(), []
    if lines and not text.endswith("\n") and _is_cut_off(lines[-1]):
        notes.append(f"Line {len(lines)}, the last one, was cut off and is left out.")
        del lines[-1]
    entries = [_entry(line, f"{file}, line {i + 1}") for i, line in enumerate(lines)]
    if not entries:
        raise LogError(
            f"{file} has no entries, expected one every ten seconds and one at the end; see "
            "whether the server got as far as a round"
        )
    servers, jobs = _last_job(entries)
    if jobs > 1:
        notes.append(f"The log has {jobs} jobs, this is the last one.")
    return Log(servers, notes)


def _is_cut_off(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _entry(line: str, where: str) -> Entry:
    entry = parsed(line, where, "an entry of a server; name its --log")
    for name, kinds in _FIELDS.items():
        if not isinstance(entry.get(name, _FIELDS), kinds) or isinstance(entry[name], bool):
            got = repr(entry[name]) if name in entry else "nothing"
            raise LogError(
                f"{where} has {got} as {name!r}, expected {' or '.join(k.__name__ for k in kinds)};"
                " name the FILE of a server's --log, of this version of ef_horovod"
            )
    try:
        entry["waited"] = {int(who): float(seconds) for who, seconds in entry["waited"].items()}
    except (TypeError, ValueError):
        raise LogError(
            f"{where} has {entry['waited']!r} as 'waited', expected seconds by worker number; name "
            "the FILE of a server's --log"
        ) from None
    return entry


def _last_job(entries: Sequence[Entry]) -> tuple[dict[int, list[Entry]], int]:
    """Entries of the last job, and the number of jobs; in a new job, rounds restart at 0."""
    servers: dict[int, list[Entry]] = {}
    jobs = 1
    for entry in entries:
        earlier = servers.get(entry["server"], [])
        if earlier and entry["round"] <= earlier[-1]["round"]:
            servers, jobs, earlier = {}, jobs + 1, []
        servers[entry["server"]] = [*earlier, entry]
    return dict(sorted(servers.items())), jobs


def summarize(entries: Sequence[Entry]) -> Summary:
    """Sums over a server's entries; each entry covers the rounds since the previous one."""
    rounds, up, down, dense = 0, 0.0, 0.0, 0.0
    waited: dict[int, float] = defaultdict(float)
    for entry in entries:
        since = entry["round"] - rounds
        rounds = entry["round"]
        up += since * entry["bytes_up"]
        down += since * entry["bytes_down"]
        if entry["ratio_up"]:
            dense += since * entry["bytes_up"] / entry["ratio_up"]
        for who, seconds in entry["waited"].items():
            waited[who] += seconds
    last = entries[-1]
    return Summary(
        rounds, last["seconds"], up, down, dense or None, dict(waited), last["dropped"],
        last["refused"],
    )  # fmt: skip


def _together(parts: Sequence[Summary]) -> Summary:
    """The sum over a job's servers, which serve different buckets in the same rounds."""
    waited: dict[int, float] = defaultdict(float)
    for part in parts:
        for who, seconds in part.waited.items():
            waited[who] += seconds
    return Summary(
        rounds=min(part.rounds for part in parts),
        seconds=max(part.seconds for part in parts),
        bytes_up=sum(part.bytes_up for part in parts),
        bytes_down=sum(part.bytes_down for part in parts),
        dense=sum(part.dense or 0.0 for part in parts) or None,
        waited=dict(waited),
        dropped=sum(part.dropped for part in parts),
        refused=sum(part.refused for part in parts),
    )


def table(log: Log) -> str:
    """One row per server, and a sum if there are several; bytes are summed over all workers."""
    from tabulate import tabulate

    parts = {str(server): summarize(entries) for server, entries in log.servers.items()}
    if len(parts) > 1:
        parts["all"] = _together(list(parts.values()))
    rows = [_row(name, part) for name, part in parts.items()]
    return tabulate(rows, headers="keys", disable_numparse=True, colalign=["right"] * len(rows[0]))


def _row(name: str, part: Summary) -> dict[str, str]:
    slowest = max(part.waited, key=lambda who: part.waited[who], default=None)
    waited = "-" if slowest is None else f"{slowest} ({part.waited[slowest]:.1f} s)"
    return {
        "server": name,
        "rounds": f"{part.rounds:,}",
        "rounds/s": f"{part.rounds / part.seconds:.2f}" if part.seconds else "-",
        "MB up": f"{part.bytes_up / 1e6:,.2f}",
        "of dense": _ratio(part.bytes_up, part.dense),
        "MB down": f"{part.bytes_down / 1e6:,.2f}",
        "of dense ": _ratio(part.bytes_down, part.dense),
        "waited for worker": waited,
        "dropped": f"{part.dropped:,}",
        "refused": f"{part.refused:,}",
    }


def _ratio(nbytes: float, dense: float | None) -> str:
    return f"1/{dense / nbytes:.1f}" if dense and nbytes else "-"


def plot(log: Log, file: Path) -> None:
    """Plot rounds per second and MB per round over time by server, and the waits per worker."""
    pyplot = load_pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in known:
        raise LogError(
            f"got {file} as image, expected a name that ends in one of {', '.join(known)}; name it "
            "by --out"
        )
    figure, (speed, traffic, waiting) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for i, (server, entries) in enumerate(log.servers.items()):
        color, seconds = COLORS[i % len(COLORS)], [entry["seconds"] for entry in entries]
        rates = [entry["rounds_per_second"] for entry in entries]
        speed.plot(seconds, rates, "o-", color=color, label=f"server {server}")
        for way, line in (("up", "o-"), ("down", "x:")):
            nbytes = [entry[f"bytes_{way}"] / 1e6 for entry in entries]
            traffic.plot(seconds, nbytes, line, color=color, label=f"server {server}, {way}")
    speed.set(xlabel="seconds", ylabel="rounds per second", ylim=(0, None))
    traffic.set(xlabel="seconds", ylabel="MB in a round, all workers together", ylim=(0, None))
    for panel in (speed, traffic):
        panel.set_xlim(0, None)
        panel.legend(frameon=False, fontsize="small")
        panel.grid(alpha=0.3)
    _plot_waiting(log, waiting)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise LogError(
            f"could not write {file} ({error}), expected a place for the image; name another one "
            "by --out"
        ) from None
    finally:
        pyplot.close(figure)


def _plot_waiting(log: Log, panel: Any) -> None:
    waited = _together([summarize(entries) for entries in log.servers.values()]).waited
    if waited:
        panel.bar([str(who) for who in sorted(waited)], [waited[who] for who in sorted(waited)])
    else:
        panel.text(0.5, 0.5, "nobody waits with a quorum", ha="center", transform=panel.transAxes)
    panel.set(xlabel="worker", ylabel="seconds that all others waited for it")
