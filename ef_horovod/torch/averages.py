"""Averages that were delivered by `synchronize()`: are they applied, kept or thrown away?"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ef_horovod.torch.buckets import Taken


class Averages:
    """What is in `p.grad` after `synchronize()`, until `step()`.

    Args:
        parameters: whose gradients are averages now.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._before = {p: Taken.of(p) for p in parameters}
        self._gradients = {p: Taken.of(p.grad, sampled=False) for p in self._before}

    def were_applied(self) -> bool:
        """Whether parameters were changed since: by hand, or by an optimizer inside (SAM)."""
        return any(not taken.is_unchanged(p) for p, taken in self._before.items())

    def were_kept(self, parameter: torch.Tensor) -> bool:
        """Whether the gradient that a backward pass has brought contains the average.

        Raises:
            RuntimeError: it cannot be told.
        """
        average, now = self._gradients[parameter], parameter.grad
        if now is not average.gradient or self.were_applied():
            return False
        if now is not None and now._version == average.version + 1:
            return True  # the pass has added to it
        raise RuntimeError(
            "got a backward pass after synchronize() without step(), and averaged gradients that "
            "were changed, expected step(), or zero_grad() or discard() to leave the step out; "
            "call one of them first"
        )
