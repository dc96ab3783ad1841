"""Cloning: the paper's example, the factor sqrt(2) and the function that stays the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_horovod import theory

constants_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


def test_the_example_of_one_hard_worker():
    each = [1, 1, 1, 100]
    constants = theory.Smoothness(25.75, each)
    assert round(constants.L_QM, 4) == 50.0075
    assert constants.L_AM == 25.75
    cloning = theory.clone(each)
    assert cloning.copies.tolist() == [1, 1, 1, 4]
    assert cloning.total == 7
    np.testing.assert_allclose(cloning.scale, [7 / 4, 7 / 4, 7 / 4, 7 / 16])
    assert round(cloning.L_QM, 2) == 33.09
    assert round(cloning.bound, 2) == 36.42


@given(each=constants_lists)
def test_bounds_and_the_mean_over_clones(each):
    cloning = theory.clone(each)
    n = len(each)
    assert n <= cloning.total <= 2 * n
    assert cloning.L_QM / cloning.bound <= 1 + 1e-9
    assert cloning.bound == pytest.approx(np.sqrt(2) * np.mean(each))
    # (1/N) sum over the clones of scale_i f_i is (1/n) sum f_i, whatever the f_i
    np.testing.assert_allclose(cloning.copies * cloning.scale / cloning.total, 1 / n)
    clones = np.repeat(cloning.scale * each, cloning.copies)
    np.testing.assert_allclose(cloning.L_QM, theory.Smoothness(1.0, clones).L_QM)


@given(value=st.floats(1e-3, 1e3), n=st.integers(1, 50))
def test_equal_workers_are_not_cloned(value, n):
    """Their mean is rounded, and must not look smaller than each of them."""
    cloning = theory.clone([value] * n)
    assert cloning.total == n
    np.testing.assert_allclose(cloning.L_QM, value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.clone([]), "finite positive numbers"),
        (lambda: theory.clone([1.0, -1.0]), "from -1.0 to 1.0"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
