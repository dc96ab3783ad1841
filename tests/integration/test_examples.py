"""The example scripts run, learn and send as little as they say."""

from __future__ import annotations

import re
import sys

import pytest
from jobs import ROOT, run_example
from processes import BIN, run_job

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


@pytest.mark.parametrize("arguments", [[], ["--ddp"]])
def test_a_job_of_torchrun_learns_with_few_bytes(arguments: list[str]) -> None:
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    output = run_job([*torchrun, str(ROOT / "examples/torch_distributed.py"), *arguments])
    found = re.findall(r"accuracy ([\d.]+), sent (\d+) bytes, dense (\d+)", output)
    assert len(found) == 1, f"rank 0 alone reports: {output}"
    accuracy, sent, dense = map(float, found[0])
    assert accuracy > 0.88
    assert dense / sent > 30


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


@pytest.mark.slow
def test_momentum_before_the_compression_is_for_large_learning_rates() -> None:
    """docs/methods.md has this table."""
    title, *rows = run_example("numpy_momentum.py").splitlines()
    rates = [float(rate) for rate in title.removeprefix("learning rate").split()]
    losses = {row[:24].strip(): [float(loss) for loss in row[24:].split()] for row in rows}
    dense, after, masked, unmasked = losses.values()
    assert rates[-1] == 0.3
    assert masked[-1] < after[-1] / 5, "at a large one masking keeps it stable"
    assert unmasked[-1] > 5 * masked[-1]
    assert masked[0] > 1.2 * dense[0], "at a small one masking costs momentum"
    assert unmasked[0] < 1.3 * dense[0]


def test_a_server_and_its_workers() -> None:
    """By the command that launch/server runs; both ways at most 1/50 of dense."""
    options = ["-s", "1", "-w", "2", "--method", "DoubleSqueeze(TopK(0.01), TopK(0.01))"]
    launch = [sys.executable, "-m", "ef_horovod.server.launch", *options]
    output = run_job([*launch, "--", sys.executable, str(ROOT / "examples" / "server_numpy.py")])
    distances = [float(d) for d in re.findall(r"distance to the solution ([\d.]+)", output)]
    assert len(distances) == 6
    assert distances[0] > 0.2
    assert distances[-1] < 0.01
    (up, down) = map(int, re.findall(r"sent 1/(\d+) of dense, received 1/(\d+)", output)[0])
    assert min(up, down) >= 50


@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        ("DoubleSqueeze(OneBit(), server_compressor=OneBit())", 30),
        pytest.param(
            "DoubleSqueeze(TopK(0.01), server_compressor=TopK(0.01))",
            50,
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_torch_with_a_server(method: str, ratio: float) -> None:
    """A few steps: the loss falls, and both ways have as few bytes as promised."""
    launch = [sys.executable, "-m", "ef_horovod.server.launch", "-s", "1", "-w", "2"]
    script = str(ROOT / "examples" / "server_torch.py")
    words = ["--epochs", "3", "--method", method]
    output = run_job([*launch, "--", sys.executable, script, *words])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < 1.5, "ten classes: 2.3 at the start"
    found = re.findall(r"accuracy ([\d.]+); .*1/([\d.]+) of dense.*1/([\d.]+)\)", output)
    assert len(found) == 1, f"worker 0 alone reports: {output}"
    accuracy, up, down = map(float, found[0])
    assert accuracy > 0.5, "one of ten by chance"
    assert min(up, down) > ratio
