"""MomentumCorrection against the paper's recursion in float64, torch.optim.SGD, ErrorFeedback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from workers import CONTRACTIONS, D, Workers, channels, gradients, memory, run_channels

import ef_horovod as ef
from ef_horovod.methods.base import SGDMomentum
from ef_horovod.testing.tools import array_of, host

SPARSE = [
    ef.TopK(k=7),
    ef.RandomK(0.1),
    ef.RandomK(0.1, shared=False),
    ef.RandomBlock(0.1, block=5),
    ef.RandomSparsify(0.1),
    ef.HardThreshold(4.0),
]
each_form = pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
each_sparse = pytest.mark.parametrize("compressor", SPARSE, ids=repr)


class Paper:
    """A worker as the paper has it, in float64; its `sent` is that of the worker under test."""

    def __init__(self, momentum, nesterov, masking):
        self.momentum, self.nesterov, self.masking = momentum, nesterov, masking
        self.u, self.v = np.zeros(D), np.zeros(D)

    def accumulate(self, g):
        if self.nesterov:  # here u is m times the velocity of PyTorch
            self.u = self.momentum * (self.u + g)
            self.v = self.v + self.u + g
        else:
            self.u = self.momentum * self.u + g
            self.v = self.v + self.u

    def send(self, mask):
        sent = np.where(mask, self.v, 0.0)
        self.v = np.where(mask, 0.0, self.v)
        if self.masking:
            self.u = np.where(mask, 0.0, self.u)
        return sent


@each_form
@pytest.mark.parametrize("masking", [False, True], ids=["unmasked", "masked"])
@each_sparse
def test_workers_follow_the_papers_recursion(compressor, masking, nesterov):
    method = ef.MomentumCorrection(compressor, 0.8, nesterov, masking)
    group, papers = Workers(method, 3), [Paper(0.8, nesterov, masking) for _ in range(3)]
    for t, g in enumerate(gradients(3, 60)):
        messages, direction = group.step(g, t)
        sent = np.zeros(D)
        for paper, own, message, state in zip(papers, g, messages, group.states, strict=True):
            paper.accumulate(own.astype(np.float64))
            mask = message.decompress() != 0
            if isinstance(compressor, ef.TopK):  # of those that nearly tie, either may be sent
                assert np.abs(paper.v[mask]).min() >= np.abs(paper.v[~mask]).max() * (1 - 1e-5)
            sent += paper.send(mask) / 3
            scale = 1e-5 * np.abs(own).max()
            np.testing.assert_allclose(state.accumulation, paper.v, rtol=1e-5, atol=scale)
            velocity = state.velocity * np.float32(0.8 if nesterov else 1)
            np.testing.assert_allclose(velocity, paper.u, rtol=1e-5, atol=scale)
        np.testing.assert_allclose(direction, sent, rtol=1e-5, atol=scale)


@each_form
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_without_compression_it_is_sgd_of_pytorch(framework, nesterov):
    """Three workers against one optimizer on the mean gradient; plain momentum to the last bit."""
    method = ef.MomentumCorrection(ef.Identity(), momentum=0.9, nesterov=nesterov)
    group = Workers(method, 1, lambda d: array_of(framework, np.zeros(d, np.float32)))
    x, y = torch.zeros(D), torch.zeros(D, requires_grad=True)
    optimizer = torch.optim.SGD([y], lr=0.1, momentum=0.9, nesterov=nesterov)
    for t, g in enumerate(gradients(1, 50)):
        _, direction = group.step([array_of(framework, g[0])], t)
        x.add_(torch.from_numpy(direction), alpha=-0.1)
        y.grad = torch.from_numpy(g[0].copy())
        optimizer.step()
        if not nesterov:
            assert torch.equal(x, y.detach())
        torch.testing.assert_close(x, y.detach(), rtol=1e-5, atol=1e-5)


@each_form
@pytest.mark.parametrize("compressor", [ef.TopK(ratio=1.0), ef.RandomK(1.0)], ids=repr)
def test_a_ratio_of_one_is_momentum_sgd_without_masking_and_none_with_it(compressor, nesterov):
    g = gradients(3, 30)
    dense = Workers(ef.MomentumCorrection(ef.Identity(), nesterov=nesterov), 3).run(g)
    unmasked = ef.MomentumCorrection(compressor, nesterov=nesterov, masking=False)
    np.testing.assert_allclose(Workers(unmasked, 3).run(g), dense, rtol=1e-5, atol=1e-5)
    masked = Workers(ef.MomentumCorrection(compressor, nesterov=nesterov), 3).run(g)
    factor = 1.9 if nesterov else 1.0  # of the gradient: (1 + m) g in Nesterov's form
    np.testing.assert_allclose(masked, factor * g.mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compressor", CONTRACTIONS, ids=repr)
def test_without_momentum_it_is_error_feedback_to_the_last_bit(compressor):
    corrected = Workers(ef.MomentumCorrection(compressor, momentum=0), 3)
    plain, g = Workers(ef.ErrorFeedback(compressor), 3), gradients(3, 30)
    assert corrected.run(g).tobytes() == plain.run(g).tobytes()
    for ours, theirs in zip(corrected.states, plain.states, strict=True):
        assert ours.accumulation.tobytes() == theirs.error.tobytes()
        assert ours.velocity is None


@pytest.mark.parametrize("compressor", [ef.TopK(k=7), ef.RandomK(0.1), ef.Identity()], ids=repr)
@each_form
def test_no_momentum_is_lost_without_masking(compressor, nesterov):
    """All that was sent and v are the sum of all velocities, with no rounding in these numbers."""
    group = Workers(ef.MomentumCorrection(compressor, 0.5, nesterov, masking=False))
    sent, total, u = np.zeros(D), np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 8, integers=True)):
        sent += group.step(g, t)[1]
        u = 0.5 * u + g[0]
        total += g[0] + 0.5 * u if nesterov else u
        np.testing.assert_array_equal(sent + group.states[0].accumulation, total)


@each_form
@pytest.mark.parametrize("masking", [None, True, False])
@each_sparse
def test_what_was_sent_starts_again(compressor, masking, nesterov):
    group = Workers(ef.MomentumCorrection(compressor, 0.9, nesterov, masking), 2)
    for t, g in enumerate(gradients(2, 40)):
        before = [state.velocity * 1 for state in group.states]
        messages, _ = group.step(g, t)
        for message, state, old, own in zip(messages, group.states, before, g, strict=True):
            mask = message.decompress() != 0
            assert mask.any() or not isinstance(compressor, ef.TopK)
            assert not state.accumulation[mask].any()
            expected = np.float32(0.9) * old + own
            if masking is not False:
                expected[mask] = 0
            np.testing.assert_array_equal(state.velocity, expected)


def test_quantized_entries_start_again_too():
    """Then sends entries with an error, which stays in v."""
    group = Workers(ef.MomentumCorrection(ef.Then(ef.TopK(k=7), ef.Natural())))
    for t, g in enumerate(gradients(1, 10)):
        messages, _ = group.step(g, t)
        mask = messages[0].decompress() != 0
        assert np.count_nonzero(mask) == 7
        assert np.array_equal(group.states[0].velocity == 0, mask)
        assert group.states[0].accumulation[mask].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_dropped_step_changes_neither_u_nor_v(clip, bad):
    method = ef.MomentumCorrection(ef.TopK(k=7), clip=clip)
    ranks = channels(method, 3)
    for t, g in enumerate(gradients(3, 10)):
        run_channels(ranks, g, t)
        before = [memory(method, channel.worker) for channel in ranks]
        spoiled = g.copy()
        spoiled[1, 3] = bad
        assert run_channels(ranks, spoiled, t + 1) == [None] * 3
        assert [memory(method, channel.worker) for channel in ranks] == before
        assert before[0].keys() == {"accumulation.0", "velocity.0"}


@each_form
def test_each_worker_is_clipped_by_its_own_norm(nesterov):
    """To clip / sqrt(n): gradients of independent noise then have a mean as clipped as one's."""
    clip, g = 6.0, gradients(4, 30)
    g[:, 1] *= 1e-3  # below the threshold
    limit = clip / np.sqrt(4)
    norms = np.linalg.norm(g.astype(np.float64), axis=2, keepdims=True)
    assert (norms[:, 1] < limit).all()
    assert (norms[:, 0] > limit).all()
    by_hand = (g * np.minimum(1, limit / norms)).astype(np.float32)
    for compressor in (ef.Identity(), ef.TopK(k=50)):
        clipped = ef.MomentumCorrection(compressor, nesterov=nesterov, clip=clip)
        free = ef.MomentumCorrection(compressor, nesterov=nesterov)
        found, expected = Workers(clipped, 4).run(g), Workers(free, 4).run(by_hand)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_small_parameters_get_momentum_and_clipping_without_compression():
    method = ef.MomentumCorrection(ef.TopK(k=7), 0.8, nesterov=True, masking=True, clip=2.0)
    small = method.uncompressed()
    assert repr(small) == "MomentumCorrection(Identity(), momentum=0.8, nesterov=True, clip=2.0)"
    assert small.allreducible
    assert small.uncompressed() == small
    assert ef.MomentumCorrection(ef.TopK(k=7), momentum=0).uncompressed() is None
    assert ef.MomentumCorrection(ef.TopK(k=7), momentum=0, clip=1.0).uncompressed() is not None


@pytest.mark.parametrize("exchange", ["reduce", "gather", "double_pass"])
def test_small_parameters_are_exact_by_each_exchange(exchange):
    small = ef.MomentumCorrection(ef.TopK(k=7), nesterov=True).uncompressed()
    ranks, g = channels(small, 3, exchange=exchange), gradients(3, 20)
    expected = Workers(small, 3).run(g)
    for t in range(20):
        for direction in run_channels(ranks, g[t], t):
            np.testing.assert_allclose(direction, expected[t], rtol=1e-5, atol=1e-5)


def test_a_method_says_what_the_optimizer_must_leave_to_it():
    top = ef.TopK(k=7)
    assert ef.MomentumCorrection(top).sgd_momentum == SGDMomentum(0.9, False)
    assert ef.MomentumCorrection(top, 0.5, nesterov=True).sgd_momentum == SGDMomentum(0.5, True)
    others = ef.MomentumCorrection(top, momentum=0), ef.ErrorFeedback(top), ef.EF21(top)
    assert [method.sgd_momentum for method in others] == [None] * 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"momentum": 1}, r"got momentum=1, expected the weight .* in \[0, 1\); 0.9 is usual"),
        ({"momentum": None}, "got momentum=None, expected the weight of the old velocity"),
        ({"nesterov": 1}, "got nesterov=1, expected True or False"),
        (
            {"momentum": 0, "nesterov": True},
            "got nesterov=True with momentum=0, expected",
        ),
        ({"masking": 1}, "got masking=1, expected True or False"),
        ({"clip": 0}, r"got clip=0, expected the norm .* in \(0, inf\); leave it out"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^MomentumCorrection {sentence}"):
        ef.MomentumCorrection(ef.TopK(k=7), **options)


@pytest.mark.parametrize("compressor", [ef.OneBit(), ef.Identity(), ef.Cast("float16")], ids=repr)
def test_only_sparsifiers_mask(compressor):
    with pytest.raises(ValueError, match="masking=True with .*, which sends no single entries"):
        ef.MomentumCorrection(compressor, masking=True)
    default, off = (ef.MomentumCorrection(compressor, masking=m) for m in (None, False))
    g = gradients(2, 10)
    assert Workers(default, 2).run(g).tobytes() == Workers(off, 2).run(g).tobytes()


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
@pytest.mark.parametrize("compressor", [*SPARSE, ef.Then(ef.TopK(k=7), ef.Natural())], ids=repr)
def test_clear_puts_zeros_where_a_payload_has_entries(compressor, framework):
    x = np.random.default_rng(0).normal(size=D).astype(np.float32) * 4
    payload, ones = compressor.compress(x), array_of(framework, np.ones(D, np.float32))
    if framework == "tensorflow":
        import tensorflow as tf

        ones = tf.Variable(ones)
    payload.clear(ones)
    assert np.array_equal(host(ones), (payload.decompress() == 0).astype(np.float32))
