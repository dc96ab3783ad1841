"""The example scripts run, learn and send as little as they say."""

from __future__ import annotations

import re

import pytest
from jobs import run_example

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(
    ("script", "dense_over_sent"),
    [
        ("torch_minimal.py", 30),
        ("torch_stock.py", 20),
        ("torch_amp_clip.py", 30),
        ("tensorflow_keras_fit.py", 30),
        ("tensorflow_custom_loop.py", 30),
    ],
)
def test_script_learns_with_few_bytes(script: str, dense_over_sent: float) -> None:
    output = run_example(script, ranks=2)
    found = re.findall(r"accuracy ([\d.]+), sent (\d+) bytes, dense (\d+)", output)
    assert len(found) == 1, f"rank 0 alone reports: {output}"
    accuracy, sent, dense = map(float, found[0])
    assert accuracy > 0.88
    assert dense / sent > dense_over_sent  # biases included, which stay dense
    for norm in re.findall(r"largest norm ([\d.]+)", output):  # of the script that clips
        assert 0.9 < float(norm) <= 1.001, "some step was clipped, and none left longer"


def test_simulation_shows_what_feedback_is_for() -> None:
    rows = re.findall(r"(\S.*\S)\s+gap (\S+), +([\d,]+) bytes", run_example("numpy_simulate.py"))
    gaps = {name: float(gap) for name, gap, _ in rows}
    sent = {name: int(number.replace(",", "")) for name, _, number in rows}
    exact = "NoFeedback(Identity())"
    plain = "NoFeedback(TopK(ratio=0.02))"
    ef21 = "EF21(TopK(ratio=0.02))"
    assert gaps[exact] < 1e-5
    assert gaps[ef21] < 1e-5, "EF21 converges to the optimum"
    assert gaps[plain] > 0.5, "top-k without feedback does not"
    assert sent[ef21] == sent[plain] < sent[exact] / 6
