"""Tracks whether averages from `synchronize()` were applied, kept or discarded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ef_horovod.torch.buckets import Taken


class Averages:
    """The averages in `p.grad` between `synchronize()` and `step()`.

    Args:
        parameters: their gradients are averages now.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._before = {p: Taken.of(p) for p in parameters}
        self._gradients = {p: Taken.of(p.grad, sampled=False) for p in self._before}

    def were_applied(self) -> bool:
        """Whether parameters have changed since: by hand, or by an inner optimizer (SAM)."""
        return any(not taken.is_unchanged(p) for p, taken in self._before.items())

    def were_kept(self, parameter: torch.Tensor) -> bool:
        """Whether the gradient after another backward pass still contains the average.

        Raises:
            RuntimeError: this cannot be determined.
        """
        average, now = self._gradients[parameter], parameter.grad
        if now is not average.gradient or self.were_applied():
            return False
        if now is not None and now._version == average.version + 1:
            return True  # the pass added to it
        raise RuntimeError(
            "got a backward pass after synchronize() without step(), and averaged gradients that "
            "were changed, expected step(), or zero_grad() or discard() to leave the step out; "
            "call one of them first"
        )
