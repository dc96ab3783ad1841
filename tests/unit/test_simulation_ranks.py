"""simulate over the ranks of a job, here threads; and the experiments' workers on them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.methods.estimators import PAGE
from ef_horovod.transports.local import local_group

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.workers import Workers

D = 30
TARGETS = np.random.default_rng(0).normal(size=(6, D))
GATHERED = [
    ef.EF21(ef.TopK(k=3)),
    ef.EF21(ef.TopK(k=3), participation=0.5),
    ef.EF21(ef.Natural(), server_compressor=ef.TopK(k=9)),
    ef.ErrorFeedback(ef.RandomK(0.2, shared=False)),
    ef.ErrorFeedback(ef.HardThreshold(0.3)),
]
SUMMED = [ef.NoFeedback(ef.Identity()), ef.ErrorFeedback(ef.RandomK(0.2))]
CREWS = [(1, 4), (2, 4), (4, 4), (4, 6)]  # ranks, workers


def gradient(worker, x, step):
    noise = np.random.default_rng((worker, step)).normal(size=x.shape)
    return x - TARGETS[worker] + 0.1 * noise


def on_ranks(ranks, action):
    """What action(transport) returns on each rank."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(action, local_group(ranks, timeout=20)))


def run(method, workers, transport=None, **changes):
    options = {"steps": 25, "step_size": 0.1, "seed": 3, "estimator": PAGE(0.5)} | changes
    return ef.simulate(
        method, gradient, np.zeros(D), workers=workers, transport=transport, **options
    )


@pytest.mark.parametrize(("ranks", "workers"), CREWS)
@pytest.mark.parametrize("method", GATHERED + SUMMED, ids=repr)
def test_workers_on_ranks_do_what_workers_in_one_process_do(method, ranks, workers):
    alone = run(method, workers)
    for result in on_ranks(ranks, lambda transport: run(method, workers, transport)):
        if method in GATHERED:
            assert result.x.tobytes() == alone.x.tobytes()
        np.testing.assert_allclose(result.x, alone.x, atol=1e-6)


@pytest.mark.parametrize(("ranks", "workers"), CREWS)
@pytest.mark.parametrize("method", GATHERED + SUMMED, ids=repr)
def test_bytes_are_those_of_workers_in_one_process(method, ranks, workers):
    alone = run(method, workers).bytes_sent
    found = [r.bytes_sent for r in on_ranks(ranks, lambda t: run(method, workers, t))]
    assert sum(found) // ranks == alone
    assert ranks == workers or len(set(found)) == 1


def test_each_rank_has_its_share_of_the_states():
    shares = on_ranks(4, lambda transport: len(run(GATHERED[0], 6, transport).states))
    assert shares == [1, 2, 1, 2]


@pytest.mark.parametrize("method", [GATHERED[0], SUMMED[0]], ids=repr)
@pytest.mark.parametrize("workers", [2, 5])
def test_a_bad_gradient_on_one_rank_ends_the_run_on_all(method, workers):
    def attempt(transport):
        def spoiled(worker, x, step):
            return x * np.nan if (worker, step) == (1, 3) else x + 1

        with pytest.raises(ef.NonFiniteError, match="step 3: the workers' messages"):
            ef.simulate(
                method,
                spoiled,
                np.zeros(D),
                workers=workers,
                steps=9,
                step_size=0.1,
                transport=transport,
            )
        return True

    assert all(on_ranks(2, attempt))


def test_fewer_workers_than_ranks_are_refused():
    with pytest.raises(ValueError, match="got 2 workers for 3 ranks, expected at least as many"):
        run(GATHERED[0], 2, local_group(3)[0])


def test_ranks_have_no_server():
    (transport,) = local_group(1)
    with pytest.raises(ef.errors.UnsupportedError, match="exchange='server' with a transport"):
        run(GATHERED[0], 2, transport, exchange="server")


def test_stop_ends_the_run_after_its_step():
    result = run(GATHERED[0], 4, stop=lambda entry: entry["step"] == 6)
    assert [entry["step"] for entry in result.history] == list(range(7))
    assert result.x.tobytes() == run(GATHERED[0], 4, steps=7).x.tobytes()


def crew(workers, transport=None, method=GATHERED[1], **changes):
    """History of an experiment's run."""
    options = {"steps": 12, "step_size": 0.1, "observe": lambda x: {"x": x}} | changes
    return Workers(transport).run(method, gradient, np.zeros(D), workers=workers, **options)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_an_experiment_says_the_same_on_all_ranks_as_in_one_process(workers):
    expected = crew(workers)
    for history in on_ranks(3, lambda transport: crew(workers, transport)):
        assert len(history) == len(expected)
        for entry, other in zip(history, expected, strict=True):
            assert entry.pop("x").tobytes() == other["x"].tobytes()
            assert entry == {key: value for key, value in other.items() if key != "x"}


@pytest.mark.parametrize("method", GATHERED + SUMMED, ids=repr)
def test_bytes_both_ways_are_those_of_a_server(method):
    last = crew(4, method=method)[-1]
    served = run(method, 4, steps=12, exchange="server", estimator=ef.Estimator())
    assert int(last["bytes_up"]) == served.bytes_sent
    assert int(last["bytes_down"]) == served.bytes_received


def test_points_are_shared_among_ranks():
    points, asked = [np.full(2, float(i)) for i in range(7)], []

    def value(x):
        asked.append(x[0])
        return float(x[0] ** 2)

    for values in on_ranks(3, lambda transport: Workers(transport).map(value, points)):
        assert values.tolist() == [float(i) ** 2 for i in range(7)]
    assert sorted(asked) == [float(i) for i in range(7)]


def test_what_the_lead_makes_and_its_errors_reach_all_ranks():
    assert (
        on_ranks(3, lambda transport: Workers(transport).from_lead(lambda: "made")) == ["made"] * 3
    )
    assert Workers().from_lead(lambda: "made") == "made"

    def missing():
        raise FileNotFoundError("found no data")

    def attempt(transport):
        with pytest.raises(FileNotFoundError, match="found no data"):
            Workers(transport).from_lead(missing)
        return transport.rank

    assert on_ranks(3, attempt) == [0, 1, 2]
