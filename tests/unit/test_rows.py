"""Sparse gradients as rows, between ranks of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.exchange.channel import finish_step
from ef_horovod.exchange.rows import Rows, RowsChannel
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.torch.engine import Engine, Options
from ef_horovod.training.policy import small_or_vector
from ef_horovod.transports.local import local_group

HEIGHT, WIDTH = 20, 3


def rows_of(rank: int, count: int) -> Rows:
    generator = np.random.default_rng(rank)
    values = generator.standard_normal((count, WIDTH)).astype(np.float32)
    return Rows(generator.integers(0, HEIGHT, count), values)


def dense(rows: Rows) -> np.ndarray:
    total = np.zeros((HEIGHT, WIDTH))
    np.add.at(total, rows.indices, rows.values)
    return total


def started(counts: list[int]) -> list[RowsChannel]:
    ranks = local_group(len(counts))
    channels = [RowsChannel("table", HEIGHT, WIDTH, transport) for transport in ranks]
    for rank, (channel, count) in enumerate(zip(channels, counts, strict=True)):
        channel.rows = rows_of(rank, count)
        channel.start(0)
    return channels


@pytest.mark.parametrize("counts", [[12, 15, 9], [0, 15, 1], [0, 0, 0]])
def test_ranks_get_the_mean_of_all_rows_to_the_last_bit(counts: list[int]) -> None:
    means = [finish_step([channel]) for channel in started(counts)]
    expected = sum(dense(rows_of(rank, count)) for rank, count in enumerate(counts)) / len(counts)
    for mean in means:
        assert mean is not None
        np.testing.assert_allclose(dense(mean[0]), expected, atol=1e-6)
        assert mean[0].indices.tolist() == sorted(set(mean[0].indices.tolist()))
        assert mean[0].values.tobytes() == means[0][0].values.tobytes()


def test_a_row_that_is_not_finite_drops_the_step_on_all_ranks() -> None:
    channels = started([4, 4])
    for channel in channels:
        assert finish_step([channel]) is not None
    for rank, channel in enumerate(channels):
        channel.rows = rows_of(rank, 4)
        channel.rows.values[2, 1] = np.inf if rank == 1 else 0
        channel.start(1)
    assert [finish_step([channel]) for channel in channels] == [None, None]
    assert [(c.stats().steps, c.stats().skipped) for c in channels] == [(1, 1), (1, 1)]


def test_a_committed_step_can_be_undone() -> None:
    (channel,) = started([5])
    assert finish_step([channel], undoable=True) is not None
    channel.undo()
    assert (channel.stats().steps, channel.stats().skipped) == (0, 1)


@pytest.mark.parametrize(
    ("count", "index", "word"),
    [(HEIGHT + 1, 0, "21 rows"), (-1, 0, "-1 rows"), (1, HEIGHT, "row 20"), (1, -1, "row -1")],
)
def test_damaged_messages_are_refused(count: int, index: int, word: str) -> None:
    class Damaging(EchoTransport):
        def allgather(self, name, data, measure=None):  # type: ignore[no-untyped-def]
            data[:16].view("<i8")[:] = count, index
            assert measure is not None
            return lambda: [data[: measure(data)]] * 2

    channel = RowsChannel("table", HEIGHT, WIDTH, Damaging(2))
    channel.rows = rows_of(0, 1)
    channel.start(0)
    with pytest.raises(PayloadError, match=word):
        channel.arrived()


def test_too_many_rows_are_refused_before_they_are_sent() -> None:
    channel = RowsChannel("table", HEIGHT, 1 << 20, EchoTransport(1000))
    channel.rows = Rows(np.arange(2), np.zeros((2, 1 << 20), np.float32))
    with pytest.raises(UnsupportedError, match="got 2 rows of 1048576 .* sparse_as_dense=True"):
        channel.start(0)


def test_servers_refuse_sparse_gradients_with_the_way_out() -> None:
    class Served(EchoTransport):
        has_server = True  # type: ignore[assignment]

        def open_bucket(self, name, length, method, seed):  # type: ignore[no-untyped-def]
            pass

    table = torch.nn.Embedding(100, 20, sparse=True)
    options = Options(
        method=ef.ErrorFeedback(ef.OneBit()),
        dense=small_or_vector,
        exchange="server",
        bucket_bytes=1 << 20,
        passes=1,
        seed=0,
        dense_steps=0,
        average=True,
        sparse_as_dense=False,
        overlap=True,
        check_sync=False,
    )
    engine = Engine(list(table.named_parameters()), [], options, Served(2))
    with pytest.raises(UnsupportedError, match="exchange='server', .* pass sparse_as_dense=True"):
        table(torch.tensor([3])).sum().backward()
    engine.close()
