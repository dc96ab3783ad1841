"""An exchange from outside the package trains as one of the package does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import checksummed_exchange
import numpy as np
import pytest
from launching import Results, horovod_job

import ef_horovod as ef
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.registry import EXCHANGES, exchange_of, register_exchange
from ef_horovod.transports.local import LocalTransport, local_group

pytestmark = pytest.mark.parallel

STEPS, RANKS = 6, 2
CHECKSUMMED = EXCHANGES.pop("checksummed")  # which other tests are not to find


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXCHANGES, "checksummed", CHECKSUMMED)


@pytest.fixture(scope="module", params=["torch", "tensorflow"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp(request.param)
    return horovod_job(RANKS, "outside_exchange.py", out, request.param)


@pytest.mark.parametrize("method", ["top-k", "threshold"])
def test_it_ends_at_the_same_weights_and_sends_its_checksums(method: str, results: Results) -> None:
    for result in results:
        own, gather = (result[f"{method} by {kind}"] for kind in ("checksummed", "gather"))
        assert own["weights"] == gather["weights"] == results[0][f"{method} by gather"]["weights"]
        assert own["bytes"] == gather["bytes"] + STEPS * checksummed_exchange.SUM_NBYTES


def simulated(exchange: str, method: ef.Method, transport: LocalTransport | None = None) -> ef.Run:
    return ef.simulate(
        method, lambda i, x, t: x - i, np.zeros(9), workers=3, steps=4, step_size=0.5,
        exchange=exchange, transport=transport,
    )  # fmt: skip


def test_simulation_and_cost_model_know_it() -> None:
    method = ef.EF21(ef.TopK(k=2))
    runs = [simulated(kind, method) for kind in ("checksummed", "gather")]
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    with ThreadPoolExecutor(2) as ranks:
        shared = partial(simulated, "checksummed", method)
        for run in ranks.map(shared, local_group(2, timeout=20)):
            assert run.x.tobytes() == runs[0].x.tobytes()
            assert run.bytes_sent == runs[0].bytes_sent
    assert runs[0].bytes_sent == runs[1].bytes_sent + 4 * 2 * checksummed_exchange.SUM_NBYTES
    moved = ef.cost.method_traffic(method, 9, 3, "checksummed")
    assert moved.sent == runs[0].bytes_sent / 4
    network = ef.cost.Network.read("100mbit")
    both = [ef.cost.step_cost(method, 9, 3, name, network) for name in ("checksummed", "gather")]
    assert both[0].step > both[1].step


def test_names_are_not_taken_twice() -> None:
    for name in ("gather", "auto"):
        other = type("Other", (checksummed_exchange.Checksummed,), {"name": name})
        with pytest.raises(ValueError, match=f"asks for the name '{name}', which .* has, expected"):
            register_exchange(other)
    assert exchange_of("gather") is EXCHANGES["gather"]
    with pytest.raises(ValueError, match="got exchange='gathr', expected one of .*'checksummed'"):
        exchange_of("gathr")


def variant(**changes: object) -> type:
    """The exchange with something changed, under another name."""
    return type("Other", (checksummed_exchange.Checksummed,), {"name": "other", **changes})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (variant(name="auto:1gbit"), "got name='auto:1gbit', expected lower-case letters"),
        (variant(name=None), "got name=None, expected lower-case"),
        (variant(start=Exchange.start), "exchange 'other' has no start, expected one"),
        (variant(compresses=False), "exchange 'other' has no open, expected one"),
        (variant(has_answers=True), "exchange 'other' has no open, expected one"),
        (checksummed_exchange.Checksummed(), "expected a subclass of Exchange; write @register"),
        (dict, "expected a subclass of Exchange; write @register"),
    ],
)
def test_what_would_fail_later_is_not_registered(cls: type, message: str) -> None:
    with pytest.raises(ef.UnsupportedError, match=message):
        register_exchange(cls)
    assert "other" not in EXCHANGES


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda *_, **__: None, "returned None for 'x', expected a function that waits"),
        (lambda *_, **__: lambda: None, "returned None for 'x', expected a list of payloads"),
        (lambda *_, **__: lambda: [np.zeros(3)], "expected a list of payloads"),
        (lambda *_, **__: list, r"returned 0 payload\(s\) for 'x', expected 3, one per rank;"),
        (
            lambda _, transport, name, payload, *, fixed_size: lambda: [payload],
            r"returned 1 payload\(s\) for 'x', expected 3, one per rank;",
        ),
    ],
)
def test_payloads_that_are_missing_raise(
    start: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, training went on with what there was."""
    monkeypatch.setitem(EXCHANGES, "other", variant(start=start)())
    with pytest.raises(ef.UnsupportedError, match=message):
        ef.simulate(
            ef.EF21(ef.TopK(k=2)), lambda i, x, t: x - i, np.zeros(9), workers=3, steps=1,
            step_size=0.5, exchange="other", name="x",
        )  # fmt: skip
