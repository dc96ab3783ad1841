"""The entries of at least a fixed threshold; their number varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.schedules import keep_scheduled_number
from ef_horovod.compressors.base import require_finite
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.sparse import (
    Chosen,
    Coded,
    Entries,
    Sparsifier,
    coded,
    coded_nbytes,
    read_coded,
)
from ef_horovod.wire import Fields


@register_compressor(wire_id=13)
@dataclass(frozen=True)
class HardThreshold(Sparsifier):
    """Keep x_i where |x_i| >= threshold, exactly; nothing at all where there is none.

    With error feedback every entry of the error memory stays below the threshold for all gradients.
    So there is an absolute bound, ||x - C(x)||^2 < d threshold^2, instead of a contraction.
    For a given volume over the whole training it minimises the total error; top-k minimises the
    error per step. All layers share the threshold, so bucketing does not change the operator.
    `ef_horovod.theory.threshold_from_budget` and `calibrate` find one for a budget.

    Args:
        threshold: in units of the compressed vector, in `ErrorFeedback` the gradient.

    Raises:
        ValueError: the threshold is not a positive, finite number.

    Wire format:
        That of `TopK`; k follows from the data, so messages are padded to a size class on the way
        (docs/wire-format.md).

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.HardThreshold(2.0).compress(numpy.array([3.0, -1.0, 2.0, -4.0])).decompress()
        array([ 3.,  0.,  2., -4.])

    References:
        Sahu, Dutta, Abdelmoniem, Banerjee, Canini, Kalnis: Rethinking gradient sparsification as
        total error minimization (NeurIPS 2021).
    """

    threshold: float | Any
    ascending: ClassVar[bool] = True

    def __post_init__(self) -> None:
        way_out = "theory.calibrate finds one for a number of entries a step"
        what = "a number in the units of a gradient"
        keep_scheduled_number(self, "threshold", "(0, inf)", way_out, what)

    @property
    def fixed_size(self) -> bool:
        return False

    @property
    def supports_error_feedback(self) -> bool:
        return True  # by its absolute bound

    @classmethod
    def examples(cls) -> tuple[HardThreshold, ...]:
        return cls(1.0), cls(0.05)

    def count(self, d: int) -> int:
        return 0

    def places_nbytes(self, d: int) -> int:
        return coded_nbytes(0, d)

    def choose(self, x: Array, key: Key) -> Chosen:
        indices, values = namespace(x).at_least(x, self.threshold)
        require_finite(values, self)  # NaN and infinity are never below
        return Chosen(coded(x, indices), Entries(indices), values)

    @classmethod
    def read(cls, fields: Fields, d: int) -> Coded:
        return read_coded(fields, d, cls.__name__)
