"""PowerSGD: projections, the warm start, shapes, and the defects of other implementations."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tensorflow as tf
import torch
from workers import Workers, channels, float32_zeros, gradients, host, memory, run_channels

import ef_horovod as ef
from ef_horovod.arrays import kernels_matrices
from ef_horovod.exchange.channel import finish_step
from ef_horovod.tensorflow.buckets import Bucket as TensorFlowBucket
from ef_horovod.testing.echo_tensorflow import EchoOps
from ef_horovod.torch.buckets import Bucket as TorchBucket
from ef_horovod.training.buckets import BucketPlan, Slot
from ef_horovod.training.state import read_state, write_state
from ef_horovod.transports.local import local_group
from ef_horovod.wire import HEADER_NBYTES

A, B, R = 24, 30, 3
MATRIX = ef.PowerSGD(rank=R, shapes=((A, B),))


def low_rank(rank=R, *, seed=0, noise=0.0):
    """float32[A * B]: a matrix of this rank with singular values of different sizes, and noise."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(A, rank)) * 2.0 ** -np.arange(rank), rng.normal(size=(B, rank))
    return (left @ right.T + noise * rng.normal(size=(A, B))).astype(np.float32).reshape(-1)


def squared(x):
    return float(np.sum(np.square(x, dtype=np.float64)))


def numbers(message):
    """What a message of Identity says."""
    return message.decompress().astype(np.float64)


def best_error(matrix, rank):
    """Frobenius norm of what no matrix of this rank can say."""
    singular = np.linalg.svd(matrix.reshape(A, B).astype(np.float64), compute_uv=False)
    return np.sqrt(np.sum(singular[rank:] ** 2))


@pytest.mark.parametrize("t", range(4))
def test_what_is_sent_and_what_is_lost_are_perpendicular(t):
    """||M - P B^T||^2 = ||M||^2 - ||M B||^2, in even and odd steps."""
    group = Workers(MATRIX, d=A * B)
    for step, (g,) in enumerate(gradients(1, t + 1, d=A * B)):
        whole = g + group.states[0].error
        (message,), direction = group.step([g], step)
    lost = group.states[0].error
    assert squared(lost) > 0.01 * squared(whole)
    assert squared(lost) == pytest.approx(squared(whole) - squared(numbers(message)), rel=1e-5)
    assert squared(direction) == pytest.approx(squared(numbers(message)), rel=1e-5)
    np.testing.assert_allclose(direction + lost, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("t", [0, 1])
def test_the_mean_of_messages_is_the_message_of_the_mean(t):
    many, one = Workers(MATRIX, 4, d=A * B), Workers(MATRIX, d=A * B)
    for step, g in enumerate(gradients(4, t + 1, d=A * B)):
        messages, direction = many.step(g, step)
        (message,), of_mean = one.step([g.mean(0)], step)
    mean = np.mean([numbers(m) for m in messages], axis=0)
    np.testing.assert_allclose(mean, numbers(message), atol=1e-5 * np.abs(mean).max())
    np.testing.assert_allclose(direction, of_mean, atol=1e-5 * np.abs(of_mean).max())
    assert max(abs(numbers(m) - mean).max() for m in messages) > 0.1, "workers say the same"


@pytest.mark.parametrize("compressor", [ef.Identity(), ef.Cast("float16"), ef.Cast("bfloat16")])
def test_what_was_sent_and_the_errors_add_up_to_the_gradients(compressor):
    method = ef.PowerSGD(compressor, rank=R, shapes=((A, B),))
    group, g = Workers(method, 3, d=A * B), gradients(3, 41, d=A * B)
    directions = group.run(g)
    total = g.mean(1, dtype=np.float64).sum(0)
    sent = directions.sum(0, dtype=np.float64) + group.mean("error")
    np.testing.assert_allclose(sent, total, atol=2e-5 * np.abs(total).max())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_matrix_of_low_rank_is_sent_whole_in_two_steps(rank):
    """Even steps find its column space, odd ones say all that is in it: mean errors vanish."""
    group, target = Workers(MATRIX, 2, d=A * B), low_rank(rank)
    total, left = np.zeros(A * B), []
    for t in range(8):
        total += group.step([target + 1, target - 1], t)[1]
        left.append(np.sqrt(squared((t + 1) * target - total) / squared(target)))
        np.testing.assert_allclose(group.mean("error"), (t + 1) * target - total, atol=1e-4)
    assert left[0] > 0.3, "the first step said everything"
    assert max(left[1::2]) < 1e-5


def test_the_warm_start_finds_the_best_subspace():
    """Without memory of errors, directions of one matrix become its best approximation."""
    target = low_rank(6, noise=0.1)
    group, ratios = Workers(MATRIX, d=A * B), []
    for t in range(40):
        group.states[0] = group.states[0]._replace(error=float32_zeros(A * B))
        _, direction = group.step([target], t)
        ratios.append(np.sqrt(squared(direction - target)) / best_error(target, R))
    assert ratios[0] > 1.5
    assert ratios[4] < 1.1
    assert ratios[39] < 1 + 1e-4
    assert all(later < earlier + 1e-5 for earlier, later in pairwise(ratios))


def test_a_cold_start_in_each_step_would_not():
    """So the test above notices a warm start that is lost."""
    target, ratios = low_rank(6, noise=0.1), []
    for t in range(40):
        _, direction = Workers(MATRIX, d=A * B).step([target], t)
        ratios.append(np.sqrt(squared(direction - target)) / best_error(target, R))
    assert min(ratios) > 1.1


def test_ranks_share_their_bases_and_seeds_make_others():
    """The first basis, and those of what a zero gradient leaves, are drawn by the shared key."""
    one, other = Workers(MATRIX, 3, d=A * B), Workers(MATRIX, 3, d=A * B, name="other")
    np.random.seed(7)  # which must have no say
    before = np.random.get_state()[1].copy()
    g = gradients(3, 2, d=A * B)
    one.step(g[0]), other.step(g[0])
    bases = [state.under_way.bases for state in one.states]
    assert all(basis.tobytes() == bases[0].tobytes() for basis in bases)
    assert not np.array_equal(bases[0], other.states[0].under_way.bases)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    "first",
    [
        np.zeros(A * B, np.float32),
        low_rank(1),
        np.float32(1e-30) * low_rank(2),
        np.float32(1e15) * low_rank(R),
        np.eye(A, B, dtype=np.float32).reshape(-1),
    ],
    ids=["zeros", "rank 1", "tiny", "large", "identity"],
)
def test_what_is_degenerate_costs_no_direction_for_ever(first):
    """Zeros or a matrix of lower rank, for some steps: then all ranks find all directions again."""
    group, target = Workers(MATRIX, 2, d=A * B), low_rank()
    for t in range(5):
        _, direction = group.step([first, first], t)
        assert np.isfinite(direction).all()
        for state in group.states:
            basis = state.under_way.bases.reshape(R, -1).astype(np.float64)
            np.testing.assert_allclose(basis @ basis.T, np.eye(R), atol=1e-6)
    group.states = [state._replace(error=float32_zeros(A * B)) for state in group.states]
    for t in (5, 6):  # the first finds them, the second says all that is in them
        group.step([target, target], t)
    assert squared(group.mean("error")) < 1e-10 * squared(target)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 200])
def test_orthonormalise(n):
    rng = np.random.default_rng(n)
    for r in {1, min(2, n), min(5, n), min(n, 20)}:
        for rows in (
            rng.normal(size=(r, n)),
            np.zeros((r, n)),
            np.ones((r, n)),
            np.full((r, n), np.nan),
            np.full((r, n), np.inf),
            np.full((r, n), 3e38),
            np.full((r, n), 1e-45),
            rng.normal(size=(r, 1)) * rng.normal(size=n),
            rng.normal(size=(r, n)) * 10.0 ** rng.integers(-30, 30, size=(r, 1)),
        ):
            basis = rows.astype(np.float32)
            kernels_matrices.orthonormalise(basis, np.uint64(5))
            wide = basis.astype(np.float64)
            np.testing.assert_allclose(wide @ wide.T, np.eye(r), atol=5e-7)
    whole = rng.normal(size=(min(n, 5), n)).astype(np.float32)
    basis = whole.copy()
    kernels_matrices.orthonormalise(basis, np.uint64(5))
    np.testing.assert_allclose((whole @ basis.T) @ basis, whole, atol=1e-5)  # the same space


SHAPES = {
    (512, 64, 3, 3): (512, 576),  # torch's convolution: out x (in kh kw)
    (3, 3, 64, 512): (576, 512),  # the same of Keras
    (60, 40): (60, 40),
    (40, 60): (40, 60),
    (300, 1, 3, 3): (300, 9),  # depthwise
    (256, 8, 32): (256, 256),  # heads of attention in Keras
    (8, 32, 256): (256, 256),
    (1000, 4): None,  # 4 (1000 + 4) >= 4000
    (8, 8): None,
    (9, 9): (9, 9),
    (500,): None,
    (): None,
    (0, 5): None,
    (1, 1000): None,
}


@pytest.mark.parametrize(("shape", "expected"), SHAPES.items(), ids=str)
def test_shapes_are_cut_into_matrices_or_left_as_they_are(shape, expected):
    d = int(np.prod(shape))
    rows, columns = expected or (0, 0)
    # Rank 4 of 9 x 9 takes 72 numbers of 81; the rank of small ones is cut to their sides.
    method = ef.PowerSGD(rank=4).for_shapes([shape])
    group, lengths = Workers(method, d=d), []
    for t in range(2):
        g = np.random.default_rng(t).normal(size=d).astype(np.float32)
        (message,), direction = group.step([g], t)
        lengths.append(message.num_elements)
    assert lengths == ([4 * rows, 4 * columns] if expected else [d, d])
    if not expected:
        assert direction.tobytes() == g.tobytes()
        assert not group.states[0].error.any()


@pytest.mark.parametrize(("d", "expected"), [(500, (20, 25)), (10_000, (100, 100)), (1009, None)])
def test_a_bare_vector_is_one_matrix_about_square(d, expected):
    group = Workers(ef.PowerSGD(rank=1), d=d)
    sizes = [group.step(gradients(1, 1, d=d)[0], t)[0][0].num_elements for t in range(2)]
    if expected:
        assert tuple(sizes) == expected
    assert sum(sizes) < 2.4 * np.sqrt(d)


@pytest.mark.parametrize("d", range(6))
def test_short_vectors_arrive_whole(d):
    group = Workers(ef.PowerSGD(), 2, d=d)
    for t in range(3):
        g = np.arange(2 * d, dtype=np.float32).reshape(2, d)
        assert group.step(g, t)[1].tolist() == g.mean(0).tolist()


def two_parameters(zeros):
    """A bucket of a matrix, a vector and another matrix."""
    shapes = {"first": (40, 50), "bias": (50,), "second": (50, 20)}
    slots, start = [], 0
    for name, shape in shapes.items():
        parameter = zeros(shape)
        size = int(np.prod(shape))
        slots.append(Slot(name, parameter, start, start + size))
        start += size
    return slots


def test_matrices_of_a_bucket_share_one_message_and_all_bytes_are_counted():
    """An even and an odd step send 4 r (a + b) bytes for each matrix: what PowerSGD does in one."""
    slots = two_parameters(np.zeros)
    for exchange, header in (("gather", HEADER_NBYTES), ("reduce", 0)):
        ends = local_group(2, timeout=5)
        plan = BucketPlan("bucket", slots, ef.PowerSGD(rank=2))
        ranks = [plan.open(float32_zeros(3050), end, exchange=exchange) for end in ends]
        sent, before = [], 0
        for t, g in enumerate(gradients(2, 2, d=3050)):
            run_channels(ranks, g, t)
            sent.append(ends[0].bytes_sent - before)
            before = ends[0].bytes_sent
        # To one other rank; of a sum, a ring of two sends each number once.
        assert sent == [header + 4 * (2 * 40 + 2 * 50 + 50), header + 4 * (2 * 50 + 2 * 20 + 50)]
        assert ranks[0].stats().num_elements == 3050


def torch_bucket(plan, transport):
    return TorchBucket.open(plan, plan.decide(transport), transport, seed=0)


@pytest.mark.parametrize(
    ("make", "zeros", "transport"),
    [
        (torch_bucket, torch.zeros, lambda: local_group(1)[0]),
        (
            lambda plan, ops: TensorFlowBucket(plan, ops, exchange="auto", seed=0),
            lambda shape: tf.Variable(tf.zeros(shape)),
            lambda: EchoOps(2),
        ),
    ],
    ids=["torch", "tensorflow"],
)
def test_adapters_tell_the_shapes(make, zeros, transport):
    plan = BucketPlan("bucket", two_parameters(zeros), ef.PowerSGD(rank=2))
    channel = make(plan, transport()).channel
    assert channel.method.shapes == ((40, 50), (50,), (50, 20))
    assert repr(channel.method) == "PowerSGD(rank=2)"
    channel.start(0)
    assert channel._message.num_elements == 2 * 40 + 2 * 50 + 50


class OneChannel:
    """What memories belong to."""

    def __init__(self, slots, channel):
        self.slots, self.channel = slots, channel


def test_a_checkpoint_goes_into_other_buckets():
    """The warm start belongs to a parameter; before an odd step it is a left factor."""
    slots, method = two_parameters(np.zeros), ef.PowerSGD(rank=2)
    parts = [slots[:2], [slots[2]._replace(start=0, stop=1000)]]
    g = gradients(1, 8, d=3050)[:, 0]

    def opened(own):
        plan = BucketPlan("b", own, method)
        return OneChannel(own, plan.open(float32_zeros(plan.length), local_group(1)[0]))

    def step(bucket, part, t):
        bucket.channel.gradient[:] = part
        bucket.channel.start(t)
        return finish_step([bucket.channel])[0].copy()

    for stop in (5, 6):
        whole, split = opened(slots), [opened(own) for own in parts]
        for t in range(stop):
            step(whole, g[t], t)
        saved = read_state([whole])
        assert {n: len(v["worker.factors"]) for n, v in saved.items()} == {
            "first": 100,
            "bias": 0,
            "second": 100,
        }
        write_state(split, saved)
        for t in range(stop, 8):
            parted = np.concatenate(
                [step(split[0], g[t, :2050], t), step(split[1], g[t, 2050:], t)]
            )
            assert parted.tobytes() == step(whole, g[t], t).tobytes()


@pytest.mark.parametrize("steps", [[0, 0, 0, 0], [1, 3, 5, 6], [0, 1, 1, 7]], ids=str)
def test_steps_with_gaps_lose_the_warm_start_and_nothing_else(steps):
    """What is kept is the other side's then, and makes some basis, equal on all ranks."""
    group, g = Workers(MATRIX, 2, d=A * B), gradients(2, 4, d=A * B)
    sent = np.sum([group.step(part, t)[1] for part, t in zip(g, steps, strict=True)], axis=0)
    total = g.mean(1).sum(0)
    np.testing.assert_allclose(sent + group.mean("error"), total, atol=1e-4)
    bases = [state.under_way.bases.reshape(R, -1) for state in group.states]
    np.testing.assert_array_equal(*bases)
    np.testing.assert_allclose(bases[0] @ bases[0].T, np.eye(R), atol=1e-6)


def test_statistics_know_what_was_lost():
    (channel,) = channels(ef.PowerSGD(rank=2), 1)
    for t, g in enumerate(gradients(1, 4)):
        before = host(channel.worker.error).copy()
        (direction,) = run_channels([channel], g, t)
        lost = np.sqrt(squared(g[0] + before - direction) / squared(g[0] + before))
        assert channel.stats().relative_error == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("size", [3e38, 1e36, 1e30])
def test_no_infinity_enters_the_error_memory(size):
    group = Workers(MATRIX, d=A * B)
    g = np.float32(size) * np.sign(low_rank()).astype(np.float32)
    before = memory(MATRIX, group.states[0])
    try:
        group.step([g.copy()])
    except ef.NonFiniteError:
        assert memory(MATRIX, group.states[0]) == before
        assert size > 1e36
    else:
        assert np.isfinite(group.states[0].error).all()


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2", None])
def test_ranks_that_are_none_are_refused(rank):
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        ef.PowerSGD(rank=rank)


def test_wrong_shapes_and_compressors_are_refused():
    with pytest.raises(ValueError, match=r"of 20 entries for a vector of 21, expected as many"):
        ef.PowerSGD(shapes=((4, 5),)).init(float32_zeros(21))
    with pytest.raises(ValueError, match="expected one that keeps the error smaller"):
        ef.PowerSGD(ef.RandomK(0.1, scale="unbiased"))
