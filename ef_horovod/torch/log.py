"""`ef.TrainingLog` for PyTorch: JSON lines, and TensorBoard."""

from __future__ import annotations

from typing import Any

from ef_horovod.training.log import TensorBoardLog


class TrainingLog(TensorBoardLog):
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
        LogError: the path is another file, or its folder cannot be written.
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

    def _open(self, folder: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder)

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
