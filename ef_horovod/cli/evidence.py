"""What was measured of learning per step: trainings with a method, next to dense ones.

`docs/results/learning.md` has the settings and all numbers; each line here is one of its rows.
"""

from __future__ import annotations

from typing import NamedTuple

from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.then import Then
from ef_horovod.methods.base import Method
from ef_horovod.methods.parsing import read_method

SOURCE = "docs/results/learning.md"
GRADIENTS, UPDATES, MOMENTA = "gradients", "updates", "momenta"  # what is compressed
TEXT = "characters of a text, AdamW, 1600 steps"
IMAGES = "CIFAR-10, SGD, 4 ranks, 3120 steps"


class Evidence(NamedTuple):
    """One method in one training.

    Attributes:
        method: as text.
        compressed: the gradients (`ef.DistributedOptimizer`), the updates
            (`ef.CompressedUpdates`), or the momenta (a method that replaces the optimizer).
        training: task, optimizer and number of steps.
        against_dense: the difference to dense training after the same number of steps.
    """

    method: str
    compressed: str
    training: str
    against_dense: str


EVIDENCE = (
    Evidence(
        "ErrorFeedback(Then(TopK(0.01), OneBit()))", UPDATES, IMAGES, "accuracy 0.1 points lower"
    ),
    Evidence("ErrorFeedback(OneBit())", UPDATES, TEXT, "loss 1.1 % higher"),
    Evidence("ErrorFeedback(OneBit())", GRADIENTS, TEXT, "loss 46 % higher"),
    Evidence("ErrorFeedback(TopK(0.01))", GRADIENTS, TEXT, "loss 15 % higher"),
    Evidence("EF21(TopK(0.01))", GRADIENTS, TEXT, "loss 60 % higher"),
    Evidence("FrozenAdam(OneBit())", MOMENTA, TEXT, "loss 0.3 % higher"),
    Evidence("FrozenAdam(Then(TopK(0.04), OneBit()))", MOMENTA, TEXT, "loss 0.8 % higher"),
)


def evidence_of(method: Method) -> list[Evidence]:
    """Trainings with this method and kind of compressor, whatever its ratio.

    Example:
        >>> from ef_horovod.methods.parsing import read_method
        >>> [e.against_dense for e in evidence_of(read_method("FrozenAdam(OneBit())"))]
        ['loss 0.3 % higher']
    """
    return [e for e in EVIDENCE if _kind(read_method(e.method)) == _kind(method)]


def _kind(method: Method) -> tuple[type, ...]:
    return (type(method), *_parts(method.compressor))


def _parts(compressor: Compressor) -> tuple[type, ...]:
    if isinstance(compressor, Then):
        return (*_parts(compressor.sparsifier), *_parts(compressor.values))
    return (type(compressor),)
