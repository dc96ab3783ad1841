"""`ef.TrainingLog` for TensorFlow: JSON lines, and TensorBoard."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ef_horovod.training.log import TensorBoardLog


class TrainingLog(TensorBoardLog):
    """Writes a JSON line about every `every`-th step; `ef-horovod report` draws it.

    Make it on all ranks and call `step` on all ranks after each step. Rank 0 writes, or each rank
    its own file if the path contains "{rank}". docs/training.md ("Watch a training") says what a
    line has, and when rank 0 warns. A process that finds an earlier log of a training goes on in
    the same file.

    Args:
        path: of the file; folders are made.
        optimizer: an `ef.DistributedOptimizer`, `ef.Reducer` or `ef.Compression`, or a
            list of them.
        every: steps per line. Errors and norms need a few passes over memory at these steps only.
        layers: whether lines have the norms by parameter.
        tensorboard: a folder for TensorBoard, or a `tf.summary` writer. It gets ef/loss, ef/ratio,
            ef/error_norm, ef/gradient_norm and ef/skipped of each line.

    Raises:
        LogError: the path is another file, or its folder cannot be written.
        ModuleNotFoundError: TensorBoard is not installed.
        UnsupportedError: `optimizer` is something else.
        ValueError: `every` is out of range.

    Example:
        log = ef.TrainingLog("runs/topk.jsonl", reducer, every=10)
        for inputs, labels in batches:
            log.step(train_step(inputs, labels))
        log.close()
    """

    def _open(self, folder: str) -> Any:
        return tf.summary.create_file_writer(folder)

    def _write(self, scalars: dict[str, float], step: int) -> None:
        with self._tensorboard.as_default():
            for name, value in scalars.items():
                tf.summary.scalar(name, value, step=step)
