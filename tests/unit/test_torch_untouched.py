"""Gradients that a GradScaler has looked at or unscaled are untouched; changed ones are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ef_horovod.torch.buckets import Taken, require_untouched

SCALE = 4.0


def _taken(dtype: torch.dtype, values: list[float]) -> tuple[torch.Tensor, Any]:
    parameter = torch.nn.Parameter(torch.ones(len(values), dtype=dtype))
    # NaN with its sign bit, as x86 makes it.
    parameter.grad = -torch.tensor(values, dtype=dtype)
    slot = SimpleNamespace(name="weight", parameter=parameter)
    return parameter, SimpleNamespace(slots=[slot], filled={parameter: Taken.of(parameter.grad)})


def _use_scaler(parameter: torch.Tensor, *, unscale: bool) -> float:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    if unscale:
        scaler.unscale_(optimizer)
        return 1.0 / SCALE
    scaler._check_inf_per_device(optimizer)
    return 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("odd", [0.3, float("nan"), float("inf")])
def test_what_a_scaler_does_is_no_change(dtype: torch.dtype, unscale: bool, odd: float) -> None:
    parameter, bucket = _taken(dtype, [1.7, 0.0, odd])
    require_untouched([bucket], _use_scaler(parameter, unscale=unscale))


@pytest.mark.parametrize("unscale", [False, True])
def test_a_change_beside_the_scaler_is_noticed(unscale: bool) -> None:
    parameter, bucket = _taken(torch.float32, [1.7, 0.0, 0.3])
    factor = _use_scaler(parameter, unscale=unscale)
    assert parameter.grad is not None
    parameter.grad.data[2] *= 0.9
    with pytest.raises(RuntimeError, match="the gradient of 'weight' was changed"):
        require_untouched([bucket], factor)


def test_gradients_in_one_flat_buffer_are_told_apart() -> None:
    buffer, bucket = torch.ones(4), SimpleNamespace(slots=[], filled={})
    for name in "ab":
        parameter = torch.nn.Parameter(torch.zeros(2))
        start = 2 * len(bucket.slots)
        parameter.grad = buffer[start : start + 2]
        parameter.grad.mul_(2)  # as a backward pass does, which raises the version of all
        bucket.slots.append(SimpleNamespace(name=name, parameter=parameter))
        bucket.filled[parameter] = Taken.of(parameter.grad)
    require_untouched([bucket])
    buffer[3] = 7
    with pytest.raises(RuntimeError, match="the gradient of 'b' was changed"):
        require_untouched([bucket])
