"""One algorithm, one copy: NumPy, torch, eager TensorFlow and tf.function send the same bytes.

Here every compressor and every method for 50 steps; tests/parallel/test_same_numbers.py has all
pairs of them, for fewer steps.
"""

from __future__ import annotations

import pytest

import ef_horovod as ef
from ef_horovod.testing.frameworks import by_channel, check_frameworks
from ef_horovod.testing.pairs import selection

METHODS = selection()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_frameworks_send_the_same_bytes_and_end_with_the_same_state(method):
    check_frameworks(method, ("torch", "tensorflow"))


def test_states_are_compared_where_there_are_some():
    state = by_channel(ef.EF21(ef.TopK(ratio=0.1), momentum=0.3))["state"]
    assert {"worker.tracked", "worker.velocity", "server.total"} <= state.keys()
    assert any(state["worker.tracked"])
