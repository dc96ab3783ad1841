"""What ErrorCompensatedX is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ef_horovod as ef
from ef_horovod.arrays import namespace


@dataclass(frozen=True)
class LastError(ef.ErrorCompensatedX):
    """EC: Delta_t = weight delta_{t-1}, ordinary compensation for methods that average.

    With beta < 1 the same low-pass filter as ErrorCompensatedX's; weight 0 is no compensation.
    """

    weight: float = 1.0

    def _compensate(self, a: Any, state: Any, step: int) -> None:
        xp = namespace(a)
        if state.filtered is None:
            xp.add(a, state.last, self.weight)
            return
        xp.average(state.filtered, state.last, self.beta, out=state.next_filtered)
        xp.add(a, state.next_filtered, self.weight)


def variants(compressor: ef.Compressor, alpha: ef.Decay | float) -> dict[str, ef.Method]:
    """The methods of all comparisons, which compress on both ways, under their names."""
    ways: dict[str, Any] = {
        "compressor": compressor,
        "server_compressor": compressor,
        "alpha": alpha,
    }
    return {
        "uncompressed": ef.ErrorCompensatedX(
            ef.Identity(), server_compressor=ef.Identity(), alpha=alpha, beta=1.0
        ),
        "no compensation": LastError(**ways, beta=1.0, weight=0.0),
        "EC": LastError(**ways, beta=1.0),
        "EC, filter 0.3": LastError(**ways, beta=0.3),
        "ECX": ef.ErrorCompensatedX(**ways, beta=1.0),
        "ECX, filter 0.3": ef.ErrorCompensatedX(**ways, beta=0.3),
    }
