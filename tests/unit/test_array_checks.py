"""Arrays that cannot be compressed, or added to, are refused before a number is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef

PAYLOAD = ef.Identity().compress(np.ones(4, np.float32))
BOTH = pytest.mark.parametrize("function", ["compress", "compress_with_residual"])


@BOTH
@pytest.mark.parametrize("x", [np.ones(4, complex), torch.ones(4, dtype=torch.complex64)])
def test_complex_numbers_are_called_complex(function, x):
    with pytest.raises(TypeError, match="complex.*expected a real.*view_as_real") as caught:
        getattr(ef.TopK(k=2), function)(x)
    assert "integers" not in str(caught.value)


@BOTH
@pytest.mark.parametrize("x", [np.ones(4, int), torch.ones(4, dtype=torch.bool)])
def test_what_is_no_floating_point_number_is_refused(function, x):
    with pytest.raises(TypeError, match="expected a real, floating-point one; .*convert it first"):
        getattr(ef.TopK(k=2), function)(x)


@BOTH
def test_a_mask_is_not_lost(function):
    x = np.ma.masked_array([1.0, 2.0, 3.0], mask=[False, True, False])
    with pytest.raises(TypeError, match="MaskedArray, expected an array without a mask"):
        getattr(ef.TopK(k=2), function)(x)


@BOTH
@pytest.mark.parametrize("x", [[1.0, 2.0], 3.0, None])
def test_what_is_no_array_is_refused(function, x):
    with pytest.raises(TypeError, match="expected a NumPy array, a torch or a TensorFlow tensor"):
        getattr(ef.TopK(k=2), function)(x)


@BOTH
def test_a_key_that_is_none_is_refused(function):
    with pytest.raises(TypeError, match=r"got key=3, expected an ef.Key; write .* ef.Key\("):
        getattr(ef.TopK(k=2), function)(np.ones(4), 3)


def test_a_list_cannot_be_added_to():
    with pytest.raises(TypeError, match="got builtins.list, expected a NumPy array"):
        PAYLOAD.add_to([0.0] * 4)


def _read_only() -> np.ndarray:
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("dense", "problem"),
    [
        (_read_only(), "is read-only"),
        (np.zeros(8, np.float32)[::2], "is a view with gaps"),
        (np.zeros(8, np.float32)[::-2], "is a view with gaps"),
        (torch.zeros(8)[::2], "is a view with gaps"),
        (torch.zeros(1).expand(4), "is a view with gaps"),
        (torch.zeros(4, requires_grad=True), "requires a gradient"),
    ],
)
@pytest.mark.parametrize("payload", [PAYLOAD, ef.TopK(k=2).compress(np.ones(4))])
def test_what_cannot_be_changed_in_place_is_not_added_to(payload, dense, problem):
    before = dense.tolist()
    with pytest.raises(ValueError, match=f"{problem}, expected one that can be changed in place"):
        payload.add_to(dense)
    assert dense.tolist() == before


@pytest.mark.parametrize("weight", ["2", True, None, float("nan")])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ValueError, match="add_to got weight=.*, expected a number"):
        PAYLOAD.add_to(np.zeros(4, np.float32), weight)
