"""Keys: draws that follow from (seed, step, tensor, rank) alone, in every process and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ef_horovod.arrays.keys import Key, tensor_id

words = st.integers(0, 2**32 - 1)


def test_golden_draws():
    """Ranks of one job may run different builds of Python: the draws may never change."""
    key = Key(seed=7, step=3, tensor=5, rank=2)
    assert key.draw(shared=True) == 0x720D8B908B31C9CF
    assert key.draw(shared=False) == 0x15640F60FC7EE44F
    assert Key().draw(shared=True) == 0x2130748AAAC80268
    assert tensor_id("conv1.weight") == 3410522421


@given(words, words, words, words, words)
def test_shared_draws_ignore_the_rank_and_others_do_not(seed, step, tensor, rank, other):
    a, b = Key(seed, step, tensor, rank), Key(seed, step, tensor, other)
    assert a.draw(shared=True) == b.draw(shared=True)
    assert (a.draw(shared=False) == b.draw(shared=False)) == (rank == other)
    assert a.draw(shared=True) != a.draw(shared=False)
    assert 0 <= a.draw(shared=False) < 2**64


def test_nearby_keys_draw_different_numbers():
    keys = [
        Key(seed, step, tensor, rank)
        for seed in range(10)
        for step in range(10)
        for tensor in range(10)
        for rank in range(10)
    ]
    assert len({key.draw(shared=False) for key in keys}) == len(keys)
    assert len({key.draw(shared=True) for key in keys}) == len(keys) // 10
    ones = sum(key.draw(shared=False).bit_count() for key in keys)
    assert abs(ones / (64 * len(keys)) - 0.5) < 0.005  # six standard deviations are 0.00375


def test_large_and_negative_words_are_taken():
    assert Key(seed=2**80 + 1).draw(shared=True) == Key(seed=1).draw(shared=True)
    assert 0 <= Key(seed=-1, step=2**63).draw(shared=False) < 2**64


def test_names_give_the_same_number_in_every_process():
    code = "from ef_horovod.arrays.keys import tensor_id; print(tensor_id('layer.0.weight'))"
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs == [f"{tensor_id('layer.0.weight')}\n"] * 2
