"""`ef.TrainingLog` for PyTorch: JSON lines, and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ef_horovod.common.extras import require
from ef_horovod.training import log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TrainingLog(log.TrainingLog):
    """Writes a JSON line about every `every`-th step; `ef-horovod report` draws it.

    Make it on all ranks and call `step` on all ranks after each step. Rank 0 writes, or each rank
    its own file if the path contains "{rank}". docs/training.md ("Watch a training") says what a
    line has, and when rank 0 warns. A process that finds an earlier log of a training goes on in
    the same file.

    Args:
        path: of the file; folders are made.
        optimizer: an `ef.DistributedOptimizer` or `ef.Compression`, or a list of them.
        every: steps per line. Errors and norms need a few passes over memory at these steps only.
        layers: whether lines have the norms by parameter.
        tensorboard: a folder for TensorBoard, or a `SummaryWriter`. It gets ef/loss, ef/ratio,
            ef/error_norm, ef/gradient_norm and ef/skipped of each line.

    Raises:
        LogError: the path is another file, or cannot be written.
        ModuleNotFoundError: TensorBoard is not installed.
        UnsupportedError: `optimizer` is something else.
        ValueError: `every` is out of range.

    Example:
        log = ef.TrainingLog("runs/topk.jsonl", optimizer, every=10)
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            log.step(loss)
            optimizer.zero_grad()
        log.close()
    """

    def __init__(
        self,
        path: str | Path,
        optimizer: log.Watched | Sequence[log.Watched],
        every: int = 10,
        *,
        layers: bool = True,
        tensorboard: str | Path | SummaryWriter | None = None,
    ) -> None:
        if tensorboard is not None:
            require("tensorboard", "ef.TrainingLog(tensorboard=)")
        self._tensorboard: Any = tensorboard
        shown = None if tensorboard is None else self._show
        super().__init__(path, optimizer, every, layers=layers, scalars=shown)

    def _show(self, scalars: dict[str, float], step: int) -> None:
        if isinstance(self._tensorboard, (str, Path)):  # opened only by ranks that write
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._tensorboard))
        for name, value in scalars.items():
            self._tensorboard.add_scalar(f"ef/{name}", value, step)
        self._tensorboard.flush()
