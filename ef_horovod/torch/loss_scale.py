"""The protocol between a `torch.amp.GradScaler` and a wrapped optimizer.

If an optimizer has `_step_supports_amp_scaling`, a scaler calls its `step()` in every step on every
rank. The scaler sets two attributes in it: `found_inf`, and `grad_scale`, the scale that gradients
still have (None after `scaler.unscale_`). For other optimizers, the scaler skips `step()` on a rank
whose own gradients are not finite; the other ranks would then wait for it.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.torch.buckets import require_untouched
from ef_horovod.torch.engine import Engine

_FRAMES = 12  # between a scaler and step(): wrappers of schedulers and profilers


class ScalerCall(NamedTuple):
    """A call of `optimizer.step()` by a scaler.

    Args:
        scaler: the caller; None if not found.
        scale: factor that gradients contain; None if `unscale_` was called.
        found_inf: whether a gradient is not finite, on this rank alone, before an exchange.
    """

    scaler: torch.amp.GradScaler | None
    scale: float | None
    found_inf: bool


def take_call(optimizer: Any) -> ScalerCall | None:
    """The scaler's call of `step()`, or None; clears it, so that the base's `step()` sees none."""
    if getattr(optimizer, "found_inf", None) is None:
        return None
    scale, found_inf = optimizer.grad_scale, bool(optimizer.found_inf)
    optimizer.grad_scale = optimizer.found_inf = None  # fused optimizers would unscale again
    return ScalerCall(_calling_scaler(), None if scale is None else float(scale), found_inf)


def average_unscaled(optimizer: Any, engine: Engine, call: ScalerCall) -> bool:
    """`engine.finish` in a scaler's `step()`: delivers unscaled averages.

    Returns:
        Whether the step is good.

    Raises:
        RuntimeError: the scaler is new while gradients are under way, or a gradient under way was
            changed by more than `unscale_`.
        UnsupportedError: the scaler is not found.
    """
    if call.scaler is None and engine.scaler is None:
        raise UnsupportedError(
            "got step() from a loss scaler that is not found, expected a torch.amp.GradScaler; "
            "pass it as grad_scaler= to ef.DistributedOptimizer"
        )
    scaler = call.scaler or engine.scaler
    assert scaler is not None
    scale = scaler.get_scale()
    now = 1.0 if call.scale is None else scale
    require_untouched(engine.buckets, now / scale)
    if scaler is not engine.scaler:
        engine.use_scaler(scaler, now)
    good = engine.finish(scale=now)
    if not good and call.scaler is not None:
        # The scaler sees the NaNs of a step dropped on all ranks, so that scales stay equal.
        call.scaler._check_inf_per_device(optimizer)
    return good


def unscale_averages(optimizer: Any, engine: Engine, call: ScalerCall) -> bool:
    """The same after `synchronize()`: averages have the scale, unless `unscale_` was called.

    Raises:
        UnsupportedError: the error-feedback state contains scaled gradients.
    """
    if engine.scaler is None and engine.has_state:
        raise UnsupportedError(
            "got a GradScaler after synchronize() that the optimizer did not know of, expected it "
            "before, to keep error-feedback state in unscaled units; pass grad_scaler=scaler to "
            "ef.DistributedOptimizer, or leave out synchronize()"
        )
    if call.found_inf:
        if engine.undoable:
            engine.undo()
        return False
    if call.scale is not None:
        for parameter, _ in engine.named_parameters():
            if parameter.grad is not None:
                parameter.grad.div_(call.scale)
    return True


def unscale(optimizer: Any, call: ScalerCall) -> None:
    """Divide gradients by the scale that they still have, as the scaler does for other optimizers.

    Raises:
        UnsupportedError: the scaler is not found, and could not hear of other ranks' infinities.
    """
    if call.scaler is None:
        raise UnsupportedError(
            "got step() from a loss scaler that is not found, expected a torch.amp.GradScaler; "
            "write scaler.step(optimizer)"
        )
    if call.scale is not None:
        call.scaler.unscale_(optimizer)


def lower_scale(optimizer: Any, call: ScalerCall) -> None:
    """Let the scaler count a step that all ranks left out as one with an infinity of its own."""
    assert call.scaler is not None
    for found_inf in call.scaler._check_inf_per_device(optimizer).values():
        found_inf.fill_(1.0)


def require_scaler_call(engine: Engine) -> None:
    """Raise if `step()` is called directly while gradients have a loss scale."""
    if engine.scaler is not None:
        raise RuntimeError(
            "step() would use gradients that are multiplied by the loss scale, expected it to be "
            "called by the scaler; write scaler.step(optimizer), or synchronize(), "
            "scaler.unscale_(optimizer) and scaler.step(optimizer) inside skip_synchronize()"
        )


def _calling_scaler() -> torch.amp.GradScaler | None:
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        frame = frame.f_back if frame is not None else None
        caller = frame.f_locals.get("self") if frame is not None else None
        if isinstance(caller, torch.amp.GradScaler):
            return caller
    return None
