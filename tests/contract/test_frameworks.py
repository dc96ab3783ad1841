"""One algorithm, one copy: NumPy, torch, eager TensorFlow and tf.function send the same bytes.

Here every compressor and every method for 50 steps; tests/parallel/test_same_numbers.py has all
pairs of them, for fewer steps.
"""

from __future__ import annotations

import pytest
import tensorflow as tf

import ef_horovod as ef
from ef_horovod.tensorflow import buckets
from ef_horovod.testing.frameworks import by_channel, check_frameworks
from ef_horovod.testing.frameworks_tensorflow import by_ops, eager
from ef_horovod.testing.pairs import selection

METHODS = selection()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_frameworks_send_the_same_bytes_and_end_with_the_same_state(method):
    check_frameworks(method, ("torch", "tensorflow"))


def test_states_are_compared_where_there_are_some():
    state = by_channel(ef.EF21(ef.TopK(ratio=0.1), momentum=0.3))["state"]
    assert {"worker.tracked", "worker.velocity", "server.total"} <= state.keys()
    assert any(state["worker.tracked"])


EXACT_ON_DEVICES = [
    # OneBit's scale and PowerSGD's factors are sums, which TensorFlow's own ops take in another
    # order.
    method
    for method in METHODS
    if not isinstance(method.compressor, ef.OneBit) and not isinstance(method, ef.PowerSGD)
]


@pytest.mark.parametrize("method", EXACT_ON_DEVICES, ids=repr)
@pytest.mark.parametrize("wrap", [eager, tf.function], ids=["eager", "tf.function"])
def test_the_way_for_gpus_sends_the_same_bytes(method, wrap, monkeypatch):
    """With vectors in tf.Variables and TensorFlow's own ops, on the CPU."""
    monkeypatch.setattr(buckets, "on_gpu", lambda variable: True)
    reference = by_channel(method)
    others = by_ops(method, wrap)
    for fact, expected in reference.items():
        assert others[fact] == expected, f"{fact} differ from NumPy's"
