"""The test problems: gradients, smoothness constants, files, and what the theorems promise."""

from __future__ import annotations

import gzip
import itertools

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod import theory

LOSSES, REGULARISERS = ("logistic", "squares"), ("none", "l2", "nonconvex")
each_problem = pytest.mark.parametrize(
    ("loss", "regulariser"), list(itertools.product(LOSSES, REGULARISERS))
)


def problem(loss="logistic", regulariser="nonconvex", lam=0.1, *, rows=43, d=6, n=4, spread=1.0):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, d)) * np.exp(spread * np.linspace(-1, 1, rows))[:, None]
    labels = np.where(rng.random(rows) < 0.5, -1.0, 1.0)
    return theory.Problem(theory.contiguous_shards(features, labels, n), loss, regulariser, lam)


@each_problem
def test_gradients_are_derivatives(loss, regulariser):
    p = problem(loss, regulariser)
    x = np.random.default_rng(1).normal(size=6)
    for worker in range(4):
        numeric = [
            (p.value(worker, x + h) - p.value(worker, x - h)) / 2e-6 for h in 1e-6 * np.eye(6)
        ]
        np.testing.assert_allclose(p.gradient(worker, x, 7), numeric, rtol=1e-6, atol=1e-8)
    numeric = [(p.mean_value(x + h) - p.mean_value(x - h)) / 2e-6 for h in 1e-6 * np.eye(6)]
    np.testing.assert_allclose(p.mean_gradient(x), numeric, rtol=1e-6, atol=1e-8)


@each_problem
def test_batches_are_parts_of_the_gradient(loss, regulariser):
    p = problem(loss, regulariser)
    x = np.random.default_rng(1).normal(size=6)
    parts = [p.batch_gradient(0, x, np.array([row])) for row in range(10)]
    np.testing.assert_allclose(np.mean(parts, axis=0), p.gradient(0, x))


@each_problem
def test_constants_are_upper_bounds_and_sharp(loss, regulariser):
    """No pair of points is further apart than L_i says; at 0 the Hessian reaches the bound."""
    p = problem(loss, regulariser)
    constants = p.smoothness(pooled=False)
    rng = np.random.default_rng(2)
    for _ in range(50):
        x, z = rng.normal(size=(2, 6))
        distance = np.linalg.norm(x - z)
        for worker, L in enumerate(constants.L_i):
            moved = np.linalg.norm(p.gradient(worker, x) - p.gradient(worker, z))
            assert moved <= L * distance * (1 + 1e-9)
        moved = np.linalg.norm(p.mean_gradient(x) - p.mean_gradient(z))
        assert moved <= constants.L * distance * (1 + 1e-9)
    for worker, L in enumerate(constants.L_i):
        columns = [
            (p.gradient(worker, h) - p.gradient(worker, -h)) / 2e-5 for h in 1e-5 * np.eye(6)
        ]
        assert np.linalg.eigvalsh(np.array(columns))[-1] == pytest.approx(L, rel=1e-5)


def test_constants_of_a_problem_with_a_known_answer():
    """A_i = a_i I with 2 rows each: lambda_max / N_i = a_i^2 / 2."""
    shards = [a * np.eye(2) for a in (1.0, 2.0, 4.0)]
    c = theory.smoothness_constants(shards, "logistic", "nonconvex", 0.1)
    np.testing.assert_allclose(c.L_i, [0.325, 0.7, 2.2], rtol=1e-12)
    quadratic = np.sqrt((0.325**2 + 0.7**2 + 2.2**2) / 3)
    expected = (1 + 4 + 16) / 6 / 4 + 0.2, 3.225 / 3, quadratic
    np.testing.assert_allclose((c.L, c.L_AM, c.L_QM), expected, rtol=1e-12)
    squares = theory.smoothness_constants(shards, "squares")
    np.testing.assert_allclose(squares.L_i, [0.5, 2.0, 8.0], rtol=1e-12)
    l2 = theory.smoothness_constants(shards, "squares", "l2", 0.1)
    np.testing.assert_allclose(l2.L_i, [0.6, 2.1, 8.1], rtol=1e-12)
    # f's L does not exceed the mean of the L_i
    assert c.L <= c.L_AM


def test_pooled_and_equal_workers_differ_where_shards_do():
    small, large = np.ones((1, 1)), np.zeros((3, 1)) + 1e-9
    pooled = theory.smoothness_constants([small, large], "squares")
    equal = theory.smoothness_constants([small, large], "squares", pooled=False)
    np.testing.assert_allclose((pooled.L, equal.L), (1 / 4, 1 / 2))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_either_gram_side_gives_the_largest_eigenvalue(shape):
    parts = [np.random.default_rng(seed).normal(size=shape) for seed in (0, 1)]
    weighted = 0.5 * parts[0].T @ parts[0] + 2 * parts[1].T @ parts[1]
    expected = np.linalg.eigvalsh(weighted)[-1]
    assert theory.gram_norm(parts, [0.5, 2.0]) == pytest.approx(expected, rel=1e-12)
    one = np.linalg.norm(parts[0], 2) ** 2
    assert theory.gram_norm(parts[:1]) == pytest.approx(one, rel=1e-12)


def test_pl_constants():
    shards = [np.diag([3.0, 2.0, 0.0])]
    assert theory.pl_constant(shards, "squares") == pytest.approx(4 / 3)
    assert theory.pl_constant(shards, "squares", "l2", 0.1) == pytest.approx(0.1)
    assert theory.pl_constant([np.eye(2)], "squares", "l2", 0.1) == pytest.approx(0.6)
    assert theory.pl_constant([np.ones((1, 4))], "squares") == pytest.approx(4.0)
    assert theory.pl_constant([np.ones((1, 4))], "squares", "l2", 0.5) == pytest.approx(0.5)
    assert theory.pl_constant(shards, "logistic", "l2", 0.3) == 0.3


def test_pl_inequality_holds_without_full_rank():
    p = problem("squares", "none", 0.0, rows=8, d=12, n=2)
    mu = p.pl_constant()
    features = np.concatenate(p.features)
    labels = np.concatenate([shard.labels for shard in p.shards])
    best = p.mean_value(np.linalg.lstsq(features, labels, rcond=None)[0])
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=12)
        gap = p.mean_value(x) - best
        assert np.sum(p.mean_gradient(x) ** 2) >= 2 * mu * gap * (1 - 1e-9)


@pytest.mark.parametrize("mean", ["QM", "AM"])
def test_the_lyapunov_function_of_ef21_never_grows(mean):
    """f + step / (2 theta) G is what the proofs of both steps bound, with their own G."""
    p = problem("logistic", "nonconvex", 0.1, spread=2.0)
    constants, compressor = p.smoothness(pooled=False), ef.TopK(k=1)
    alpha = compressor.contraction(6)
    step = {"QM": theory.ef21_step, "AM": theory.ef21_am_step}[mean](constants, alpha)
    n = constants.n
    weights = np.full(n, 1 / n) if mean == "QM" else 1 / (n**2 * constants.weights)
    x, tracked, values = np.ones(6), np.zeros((n, 6)), []
    for _ in range(200):
        gradients = np.array([p.gradient(i, x) for i in range(n)])
        tracked += [
            compressor.compress(difference).decompress() for difference in gradients - tracked
        ]
        error = weights @ np.sum((tracked - gradients) ** 2, axis=1)
        values.append(p.mean_value(x) + step / (2 * theory.theta(alpha)) * error)
        x = x - step * tracked.mean(0)
    assert np.all(np.diff(values) <= 1e-12)
    assert values[-1] < values[0]


@pytest.mark.parametrize("mean", ["QM", "AM"])
def test_the_rate_under_the_pl_condition(mean):
    """Psi = f - f* + step / theta G shrinks by 1 - step mu a round."""
    p = problem("squares", "l2", 0.5)
    constants, mu, compressor = p.smoothness(pooled=False), p.pl_constant(), ef.TopK(k=2)
    hessian = np.mean([A.T @ A / len(A) for A in p.features], axis=0) + 0.5 * np.eye(6)
    best = p.mean_value(np.linalg.solve(hessian, -p.mean_gradient(np.zeros(6))))
    alpha, n = compressor.contraction(6), constants.n
    pick = {"QM": theory.ef21_pl_step, "AM": theory.ef21_am_pl_step}[mean]
    step = pick(constants, alpha, mu)
    weights = np.full(n, 1 / n) if mean == "QM" else 1 / (n**2 * constants.weights)
    x, tracked, psi = np.ones(6), np.zeros((n, 6)), []
    for _ in range(300):
        gradients = np.array([p.gradient(i, x) for i in range(n)])
        tracked += [
            compressor.compress(difference).decompress() for difference in gradients - tracked
        ]
        error = weights @ np.sum((tracked - gradients) ** 2, axis=1)
        psi.append(p.mean_value(x) - best + step / theory.theta(alpha) * error)
        x = x - step * tracked.mean(0)
    bound = psi[0] * (1 - step * mu) ** np.arange(300)
    assert np.all(np.array(psi) <= bound * (1 + 1e-9) + 1e-12)


def test_simulate_takes_a_problem():
    p = problem()
    step = theory.ef21_step(p.smoothness(), 0.5)
    run = ef.simulate(
        ef.EF21(ef.TopK(ratio=0.5)), p.gradient, np.ones(6), workers=4, steps=2000, step_size=step
    )
    assert np.linalg.norm(p.mean_gradient(run.x)) < 1e-4


def test_the_logistic_loss_does_not_overflow():
    shards = [theory.Shard(np.array([[1e4]]), np.array([1.0]))]
    p = theory.Problem(shards, "logistic", "none", 0.0)
    with np.errstate(all="raise", under="ignore"):
        assert p.value(0, np.array([-1.0])) == 1e4
        assert p.gradient(0, np.array([-1.0])) == -1e4
        assert p.value(0, np.array([1.0])) == 0.0


def test_shards_are_contiguous_and_the_last_takes_the_rest():
    labels = np.arange(11.0)
    shards = theory.contiguous_shards(labels[:, None], labels, 3)
    assert [shard.labels.tolist() for shard in shards] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8, 9, 10],
    ]
    assert all(np.array_equal(a[:, 0], y) for a, y in shards)


@pytest.mark.parametrize("name", ["tiny.txt", "tiny.txt.gz"])
@pytest.mark.parametrize("pair", [("0", "1"), ("1", "2"), ("-1", "+1")])
def test_load_libsvm(tmp_path, name, pair):
    text = "{1} 1:0.5 4:-2e-1 \n\n{0} 2:1 # a comment\n{1}\n".format(*pair)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write(text)
    features, labels = theory.load_libsvm(tmp_path / name)
    assert features.dtype == labels.dtype == np.float64
    assert features.tolist() == [[0.5, 0, 0, -0.2], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert labels.tolist() == [1, -1, 1]
    assert theory.load_libsvm(tmp_path / name, num_features=9)[0].shape == (3, 9)
    with pytest.raises(ValueError, match="has features up to 4"):
        theory.load_libsvm(tmp_path / name, num_features=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1:2\n1 0:3\n", "line 2: got index 0"),
        ("1 1:2\n-1 x\n", "line 2: .*expected 'label index:value"),
        ("1 1:2\n1 1:3\n", r"has labels \[1.\], expected exactly two classes"),
        ("", "at least 1"),
    ],
)
def test_files_that_are_not_libsvm(tmp_path, text, message):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        theory.load_libsvm(tmp_path / "bad.txt")


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="libsvmtools/datasets"):
        theory.load_libsvm(tmp_path / "phishing.txt.gz")


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.smoothness_constants([ONES], "hinge"), "got loss='hinge'"),
        (lambda: theory.smoothness_constants([ONES], "squares", "l1"), "got regulariser='l1'"),
        (lambda: theory.smoothness_constants([ONES], "squares", "l2", -1), "got lam=-1"),
        (lambda: theory.smoothness_constants([], "squares"), r"shapes \[\]"),
        (lambda: theory.smoothness_constants([ONES, ONES.T], "squares"), "with the same d"),
        (lambda: theory.smoothness_constants([ONES * np.nan], "squares"), "finite matrices"),
        (lambda: theory.smoothness_constants([ONES, 0 * ONES], "squares"), "all zero"),
        (lambda: theory.gram_norm([np.ones(3)]), "finite matrices"),
        (lambda: theory.pl_constant([ONES], "logistic", "nonconvex", 1), "needs no mu"),
        (lambda: theory.pl_constant([ONES], "logistic"), "needs no mu"),
        (lambda: theory.pl_constant([0 * ONES], "squares"), "needs no mu"),
        (lambda: theory.contiguous_shards(ONES, np.ones(2), 3), "got n=3 .*1 to 2 workers"),
        (lambda: theory.contiguous_shards(ONES, np.ones(3), 1), "one label for each row"),
        (
            lambda: theory.Problem([theory.Shard(ONES, np.ones(3))]),
            r"shard 0 has features of shape \(2, 3\) and labels of shape \(3,\)",
        ),
        (lambda: theory.Problem([theory.Shard(ONES, np.zeros(2))]), "expected -1 and \\+1"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
