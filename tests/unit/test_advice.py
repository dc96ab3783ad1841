"""Warnings of a training log: when they come, what they say, and that they come once."""

from __future__ import annotations

import math

import pytest

from ef_horovod.training.advice import Advice, break_even


def entry(step, *, working=0.0, seconds=0.0, sent=10, dense=1000, error=1.0, lost=0.5):
    """A line after `step` steps; the others are values per step."""
    return {
        "step": step, "seconds": step * seconds, "bytes_out": step * sent,
        "dense_bytes_out": step * dense, "seconds_compress": 0.75 * step * working,
        "seconds_decompress": 0.25 * step * working,
        "error_norm": error, "gradient_norm": 1.0, "relative_error": {"total": lost},
    }  # fmt: skip


def looked(entries):
    advice = Advice()
    return [text for each in entries for text in advice.look(each)]


def test_compression_that_takes_most_of_a_step_says_where_it_would_pay():
    steps = range(100, 2000, 100)
    (text,) = looked([entry(s, working=6e-3, seconds=1e-2, sent=0, dense=750_000) for s in steps])
    assert "60% of the time (6 ms a step)" in text
    assert "slower than 1 Gbit/s" in text
    assert not looked([entry(s, working=4e-3, seconds=1e-2) for s in steps])


def test_few_steps_are_not_judged():
    assert not looked([entry(s, working=6e-3, seconds=1e-2) for s in range(10, 100, 10)])


def test_more_bytes_than_dense_are_told():
    steps = range(100, 2000, 100)
    (text,) = looked([entry(s, working=1e-3, seconds=1e-2, sent=1500) for s in steps])
    assert "sent 1,500 bytes a step, expected fewer than the 1,000" in text
    assert not looked([entry(s, seconds=1e-2, sent=1500) for s in steps]), "nothing is compressed"


def test_without_compression_no_time_is_told():
    steps = range(100, 2000, 100)
    assert not looked([entry(s, working=6e-3, seconds=1e-2, sent=1000) for s in steps])


def test_an_error_that_grows_without_end_is_told_once():
    (text,) = looked([entry(s, error=0.1 * s) for s in range(10, 2000, 10)])
    assert "the compression error grew from" in text
    assert "times the gradient's norm within 490 steps" in text


@pytest.mark.parametrize("kept", [0.1, 0.01])
def test_an_error_memory_that_fills_up_is_no_fault(kept):
    """|e| of error feedback that keeps a part of p = g + e, for a gradient that stays as it is."""
    filling = [
        entry(s, error=(1 - (1 - kept) ** s) / kept, lost=math.sqrt(1 - kept))
        for s in range(1, 3000)
    ]
    assert not looked(filling)
    assert not looked(filling[9::10])


def test_noise_is_no_growth():
    assert not looked([entry(s, error=20 + 15 * math.sin(s)) for s in range(10, 20000, 10)])


def test_lines_without_norms_are_passed_over():
    missing = entry(10) | {"error_norm": None, "gradient_norm": None}
    assert not looked([missing] * 100)


def test_break_even():
    assert break_even(1_250_000, 0, 0.01) == 1e9
    assert break_even(100, 200, 0.01) == 0.0
    assert break_even(100, 10, 0.0) is None
