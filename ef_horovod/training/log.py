"""`TrainingLog`: what a training sends and loses, as JSON lines; for every framework."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ef_horovod.common.extras import require
from ef_horovod.common.options import flag, whole
from ef_horovod.errors import LogError, UnsupportedError
from ef_horovod.exchange.stats import ChannelStats, total_stats
from ef_horovod.training.advice import Advice
from ef_horovod.training.buckets import own_methods
from ef_horovod.training.driver import LayerNorms, StepDriver
from ef_horovod.training.log_file import (
    COUNTERS,
    FORMAT,
    VERSION,
    LogFile,
    refuse_others,
    require_folder,
)

_PACKAGES = ("numpy", "torch", "tensorflow", "keras", "horovod", "mpi4py")
_SHOWN = ("loss", "ratio", "error_norm", "gradient_norm", "skipped")  # as scalars
Scalars = Callable[[dict[str, float], int], None]


class Watched(Protocol):
    """What a log can watch: an optimizer, reducer, `ef.Compression` or server `Worker`."""

    @property
    def drivers(self) -> Sequence[StepDriver[Any]]: ...

    @property
    def transport(self) -> Any: ...

    def stats(self) -> list[ChannelStats]: ...


class TrainingLog:
    """Writes a JSON line about every `every`-th step; `ef-horovod report` draws it.

    Make it on all ranks and call `step` on all ranks after each step. Rank 0 writes, or each rank
    its own file if the path contains "{rank}". docs/training.md ("Watch a training") says what a
    line has, and when rank 0 warns. A process that finds an earlier log of a training goes on in
    the same file.

    Args:
        path: of the file; folders are made.
        optimizer: a `Worker`, or an optimizer or reducer of an adapter, or a list of them.
        every: steps per line. Errors and norms need a few passes over memory at these steps only.
        layers: whether lines have the norms by parameter.
        scalars: gets {name: value} and the step for each line, to show them elsewhere.

    Raises:
        LogError: the path is another file, or its folder cannot be written. Later failures give a
            warning: a log does not end a training.
        UnsupportedError: `optimizer` or `path` is something else.
        ValueError: `every` is out of range, or a loss is no single number.

    Example:
        log = TrainingLog("runs/topk.jsonl", worker, every=10)
        for inputs, labels in batches:
            loss, gradients = loss_and_gradients(inputs, labels)
            update(worker.push_pull(gradients))
            log.step(loss)
        log.close()
    """

    def __init__(
        self,
        path: str | Path,
        optimizer: Watched | Sequence[Watched],
        every: int = 10,
        *,
        layers: bool = True,
        scalars: Scalars | None = None,
    ) -> None:
        if not isinstance(path, (str, Path)):
            raise UnsupportedError(
                f"TrainingLog got {path!r} as path, expected a file name and then the optimizer; "
                "write for example TrainingLog('runs/topk.jsonl', optimizer)"
            )
        self._every = whole("TrainingLog", "every", every, 1, None, "10 writes every tenth step")
        flag("TrainingLog", "layers", layers)
        several = isinstance(optimizer, (list, tuple))
        self._watched: list[Any] = [*optimizer] if several else [optimizer]  # type: ignore[misc]
        for one in self._watched:
            _require_watched(one)
        self._path, self._layers, self._scalars = Path(path), layers, scalars
        # Now and on all ranks, not in the middle of the first steps and on one.
        refuse_others(self._path)
        require_folder(self._path)
        self._file: LogFile | None = None  # opened at the first line, when the rank is known
        self._writes: bool | None = None
        self._calls, self._begin = 0, time.perf_counter()
        self._pending: tuple[Any, int | None] | None = None  # of the last step, without a line
        self._advice = Advice()
        self._before = total_stats(self._rows())  # counters start with the log
        self._measure_next()

    def step(self, loss: Any = None, *, step: int | None = None) -> None:
        """Note that a step has ended; call it between two steps, on all ranks.

        Args:
            loss: a number, or a tensor of one element, which is read only at logged steps. None if
                unknown.
            step: number of steps taken, if it is not that of the optimizer; with a single rank,
                pass it in a training that was resumed.
        """
        _require_number(loss)  # on all ranks, or one of them would be missing in the next step
        self._calls += 1
        if self._writes is None:
            self._writes = self._is_writer()
        if not self._writes:
            return
        self._pending = (loss.detach() if hasattr(loss, "detach") else loss, step)
        if self._calls % self._every == 0:
            self.close()
        self._measure_next()

    def close(self) -> None:
        """Write a line about the last step, if it has none yet; call it at the end."""
        if self._pending is None or not self._writes:
            return
        (loss, step), self._pending = self._pending, None
        now = self._look(loss, step)
        try:
            if self._file is None:
                self._file = LogFile(self._own_path())
                self._file.append(self._header(now))
            self._file.append(now.entry)
        except (OSError, LogError) as error:  # must not end the training
            self._writes = False
            warnings.warn(
                f"could not write {self._own_path()} ({error}), the training goes on without a log",
                stacklevel=2,
            )
        self._tell(now.entry)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _measure_next(self) -> None:
        """Before a step that will be logged: let it measure its gradient."""
        if self._writes is not False and (self._calls + 1) % self._every == 0:
            for driver in self._drivers():
                driver.measure()

    def _drivers(self) -> list[StepDriver[Any]]:
        return [driver for one in self._watched for driver in one.drivers]

    def _rows(self) -> list[ChannelStats]:
        return [row for one in self._watched for row in one.stats()[:-1]]

    def _look(self, loss: Any, step: int | None) -> _Now:
        """A line about the last step."""
        rows, drivers = self._rows(), self._drivers()
        total = _since(self._before, total_stats(rows))
        norms: dict[str, LayerNorms] = {}
        for driver in drivers:
            norms |= driver.layer_norms()
        here = total.steps if drivers else self._calls  # steps of this log
        if step is None:
            step = max((driver.steps_taken() for driver in drivers), default=here)
        entry: dict[str, Any] = {
            "step": step,
            "loss": None if loss is None else float(loss),
            "time": round(time.time(), 3),
            "seconds": round(time.perf_counter() - self._begin, 6),
            "skipped": total.skipped,
            "bytes_out": total.bytes_out,
            "bytes_in": total.bytes_in,
            "dense_bytes_out": total.dense_bytes_out,
            "ratio": total.ratio,
            "seconds_compress": round(total.seconds_compress, 6),
            "seconds_wait": round(total.seconds_wait, 6),
            "seconds_decompress": round(total.seconds_decompress, 6),
            "relative_error": {row.name: _short(row.relative_error) for row in [*rows, total]},
            "error_norm": _whole_norm([each.error for each in norms.values()]),
            "gradient_norm": _whole_norm([each.gradient for each in norms.values()]),
        }
        if self._layers:
            entry["layers"] = {name: _shortened(both) for name, both in norms.items()}
        return _Now(entry, rows, step - here)

    def _header(self, now: _Now) -> dict[str, Any]:
        drivers, transport = self._drivers(), self._transport()
        loaded = [name for name in _PACKAGES if name in sys.modules]
        versions = {name: _version(name) for name in ("ef_horovod", *loaded)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "start": max(now.start, 0),
            "time": round(time.time(), 3),
            "method": repr(drivers[0].method) if drivers else None,
            "own_methods": {
                name: repr(method)
                for one in drivers
                for name, method in own_methods(one.buckets, one.method).items()
            },
            "exchanges": sorted({row.exchange for row in now.rows}),
            "rank": transport.rank if transport is not None else 0,
            "ranks": transport.size if transport is not None else 1,
            "parameters": sum(row.num_elements for row in now.rows),
            "buckets": len(now.rows),
            "every": self._every,
            "versions": {"python": sys.version.split()[0], **versions},
        }

    def _tell(self, entry: dict[str, Any]) -> None:
        transport = self._transport()
        if transport is None or transport.rank == 0:
            for text in self._advice.look(entry):
                warnings.warn(text, stacklevel=4)
        if self._scalars is not None:
            shown = {name: entry[name] for name in _SHOWN if entry[name] is not None}
            self._scalars(shown, entry["step"])

    def _transport(self) -> Any:
        """To the other ranks; None with a single rank, or outside of the process set."""
        return next((one.transport for one in self._watched if one.transport is not None), None)

    def _is_writer(self) -> bool:
        transport, each = self._transport(), "{rank}" in str(self._path)
        if transport is None:
            return _ranks_of_job() == 1 or each
        return transport.rank == 0 or (each and transport.rank > 0)

    def _own_path(self) -> Path:
        transport = self._transport()
        rank = transport.rank if transport is not None else 0
        return Path(str(self._path).replace("{rank}", str(rank)))


class TensorBoardLog(TrainingLog, ABC):
    """Base of the logs of the frameworks: lines, and the same numbers in TensorBoard.

    Args:
        path, optimizer, every, layers: as in `TrainingLog`.
        tensorboard: a folder for TensorBoard, or the framework's writer.

    Raises:
        LogError, UnsupportedError, ValueError: as in `TrainingLog`.
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        optimizer: Watched | Sequence[Watched],
        every: int = 10,
        *,
        layers: bool = True,
        tensorboard: Any = None,
    ) -> None:
        if tensorboard is not None:
            require("tensorboard", "ef.TrainingLog(tensorboard=)")
        self._tensorboard = tensorboard
        shown = None if tensorboard is None else self._show
        super().__init__(path, optimizer, every, layers=layers, scalars=shown)

    def _show(self, scalars: dict[str, float], step: int) -> None:
        if isinstance(self._tensorboard, (str, Path)):  # opened only by ranks that write
            self._tensorboard = self._open(str(self._tensorboard))
        self._write({f"ef/{name}": value for name, value in scalars.items()}, step)
        self._tensorboard.flush()

    @abstractmethod
    def _open(self, folder: str) -> Any:
        """The framework's writer into a folder."""

    @abstractmethod
    def _write(self, scalars: dict[str, float], step: int) -> None:
        """Pass numbers on to the writer."""


class _Now(NamedTuple):
    """A line, with what the header needs."""

    entry: dict[str, Any]
    rows: list[ChannelStats]
    start: int  # steps before those of this log


def _since(before: ChannelStats, total: ChannelStats) -> ChannelStats:
    """The total of the steps after `before`."""
    counted = ("steps", *(name for name in COUNTERS if hasattr(total, name)))
    return replace(
        total, **{name: getattr(total, name) - getattr(before, name) for name in counted}
    )


def _require_watched(optimizer: Any) -> None:
    if not all(hasattr(optimizer, name) for name in ("drivers", "stats")):
        raise UnsupportedError(
            f"TrainingLog got a {type(optimizer).__name__} as optimizer, expected one that "
            "ef.DistributedOptimizer returned, or an ef.Reducer, ef.Compression or Worker; wrap "
            "the optimizer first"
        )


def _require_number(loss: Any) -> None:
    shape = getattr(loss, "shape", ())
    if isinstance(loss, str) or math.prod(tuple(shape)) != 1:
        raise ValueError(
            f"TrainingLog got {str(loss)[:60]!r} as loss, expected a number or a tensor of one "
            "element; pass for example loss.mean()"
        )


def _ranks_of_job() -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    names = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _whole_norm(norms: list[float]) -> float | None:
    return float(f"{sum(norm * norm for norm in norms) ** 0.5:.6g}") if norms else None


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _shortened(norms: LayerNorms) -> list[float]:
    return [_short(norms.error), _short(norms.gradient)]
