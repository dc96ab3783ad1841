"""What all wrapped optimizers can do, whatever they send."""

from __future__ import annotations

from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.torch import wrapping
from ef_horovod.training.driver import StepDriver
from ef_horovod.transports.base import Transport


class _Wrapped:
    """Methods that a wrapped optimizer's class gets in addition to the user's class `_base`.

    They go into the class itself, not into a base class, under Horovod's module name. Reason:
    `hvd.broadcast_optimizer_state` uses `super(type(optimizer), optimizer).step` as the plain step
    of such an optimizer. For the same reason there is no `super()` in these methods.
    """

    _base: type[torch.optim.Optimizer]
    _engine: Any = None  # None with a single rank
    step_skipped = False
    outside = False  # of the process set
    param_groups: list[dict[str, Any]]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler calls `step()` in every step; see `loss_scale`."""
        return self._engine is not None or self.__dict__.get("_step_supports_amp_scaling", False)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the new parameters would not be averaged."""
        if not self.param_groups:  # Horovod makes an optimizer of this class
            raise UnsupportedError(
                "got an optimizer that is wrapped already, expected a plain torch optimizer; wrap "
                "it once, by hvd.DistributedOptimizer or by this package, or call its unwrap()"
            )
        raise UnsupportedError(
            "got a new parameter group for a wrapped optimizer, expected none, because its "
            "parameters would not be averaged; add it to the optimizer before wrapping"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch: learning rates, momenta and similar state."""
        with wrapping.same_groups(self):  # type: ignore[arg-type]
            self._base.load_state_dict(self, state_dict)  # type: ignore[arg-type]

    def unwrap(self) -> None:
        """Turn into the plain optimizer: remove hooks, error-feedback state and these methods.

        State and parameter groups stay. It can be wrapped again, for instance after layers were
        frozen. A copy has no exchange with other ranks; unwrap and wrap it as well.
        """
        if self._engine is not None:
            self._engine.close()
        wrapping.unwrap(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return wrapping.copied(self, protocol)

    @property
    def transport(self) -> Transport | None:
        """Transport to the other workers, with `rank` and `size`; None with a single rank."""
        return self._engine.transport if self._engine is not None else None

    @property
    def drivers(self) -> list[StepDriver[Any]]:
        """For `ef.TrainingLog`."""
        return [] if self._engine is None else [self._engine]

    def stats(self) -> list[ChannelStats]:
        """One row per bucket, then the total; empty with a single rank.

        A row has bytes, the relative compression error of the last step, and seconds spent
        compressing, waiting and decompressing. Call it between steps.
        """
        return self._engine.stats() if self._engine is not None else []

    def compression_state_dict(self) -> dict[str, Any]:
        """This rank's error-feedback state by parameter name; save one file per rank."""
        return self._engine.state_dict() if self._engine is not None else {}

    def merged_state_dict(self) -> dict[str, Any]:
        """State of all ranks together, for `ef.save`; collective. Empty with a single rank."""
        return self._engine.merged_state_dict() if self._engine is not None else {}

    def checkpoint(self) -> dict[str, Any]:
        """`compression_state_dict()`, by the name that also saves servers' state, if there are any.

        Call it on all ranks after the same step.
        """
        return self._engine.checkpoint() if self._engine is not None else {}

    def load_compression_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `compression_state_dict` or `checkpoint` of this rank.

        Raises:
            UnsupportedError: with servers, after the first step; servers load their state before.
            ValueError: the rank, number of ranks, method or model differs.
        """
        if self._engine is not None:
            self._engine.load_state_dict(state)
