"""One algorithm, one copy: NumPy, torch, eager TensorFlow and tf.function send the same bytes.

Here every class of compressors and methods for 50 steps, and with --all every compressor; for fewer
steps tests/parallel/test_same_numbers.py has every one of both, and with --all all pairs.
"""

from __future__ import annotations

import pytest

import ef_horovod as ef
from ef_horovod.testing.frameworks import by_channel, check_frameworks
from ef_horovod.testing.pairs import selection

CLASSES = {}
for chosen in selection():
    for kind in (type(chosen), type(chosen.compressor)):
        CLASSES.setdefault(kind, chosen)
METHODS = [
    method if method in CLASSES.values() else pytest.param(method, marks=pytest.mark.exhaustive)
    for method in selection()
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_frameworks_send_the_same_bytes_and_end_with_the_same_state(method):
    check_frameworks(method, ("torch", "tensorflow"))


def test_states_are_compared_where_there_are_some():
    state = by_channel(ef.EF21(ef.TopK(ratio=0.1), momentum=0.3))["state"]
    assert {"worker.tracked", "worker.velocity", "server.total"} <= state.keys()
    assert any(state["worker.tracked"])
