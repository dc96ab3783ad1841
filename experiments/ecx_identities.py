"""The errors of two steps telescope, those of one do not: measured on random vectors.

u is the same average of the same vectors without compression; Dl_t is the aggregator's error plus
the mean of the workers'. All without the filter where nothing else is said.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import ef_horovod as ef
from ef_horovod.methods.schedules import value_at
from experiments.claims import Report
from experiments.ecx_variants import LastError

STEPS, WORKERS, D = 60, 5, 30
ALPHAS = {"0.1": 0.1, "(t+1)^(-2/3)": ef.Decay(2 / 3), "1/(t+1)": ef.Decay(1), "1": 1.0}
COMPRESSORS = (ef.OneBit(), ef.TopK(ratio=0.5))
ROUNDING = 1e-5  # states are float32 and the errors are up to 30 times the sums that are compared


class Trace(NamedTuple):
    """What a method did; each is float64[steps, d]."""

    directions: np.ndarray  # v
    errors: np.ndarray  # Dl


def check(report: Report) -> None:
    """Verdicts on the identities, the largest deviation of all alphas and compressors."""
    vectors = np.random.default_rng(0).normal(size=(STEPS, WORKERS, D)).astype(np.float32)
    one_step, summed = [], []
    for alpha in ALPHAS.values():
        for compressor in COMPRESSORS:
            trace = drive(_ecx(compressor, alpha), vectors)
            one_step.append(telescoping(trace, vectors, alpha))
            summed.append(_sum_off(trace, vectors, alpha))
    _claim(report, "v_t = u_t + a_(t-1) Dl_(t-1) - a_t Dl_t", max(one_step))
    _claim(report, "sum of v = sum of u - a_t Dl_t: one error from the true iterate", max(summed))
    for compressor in COMPRESSORS:
        _check_others(report, compressor, vectors)


def _check_others(report: Report, compressor: ef.Compressor, vectors: np.ndarray) -> None:
    """What breaks the identity, and what ECX becomes at certain weights."""
    alpha = 0.1
    plain = drive(
        LastError(compressor, server_compressor=compressor, alpha=alpha, beta=1.0), vectors
    )
    for what, trace in (
        ("EC", plain),
        ("ECX, filter 0.3", drive(_ecx(compressor, alpha, 0.3), vectors)),
    ):
        off = telescoping(trace, vectors, alpha)
        report.claim(
            f"{what}, {compressor}, alpha 0.1: breaks that identity", "> 0.01", f"{off:.2g}",
            off > 0.01,
        )  # fmt: skip
    weights = alpha * (1 - alpha) ** np.arange(STEPS)[::-1]
    lag = (plain.directions - averages(vectors, alpha)).sum(0) + weights @ plain.errors
    off = np.abs(lag).max() / np.abs(plain.errors).max()
    _claim(report, f"EC, {compressor}: off by the moving average of all its errors", off)
    same = drive(_ecx(compressor, alpha, 1 / (2 - alpha)), vectors)
    off = np.abs(same.directions - plain.directions).max() / np.abs(plain.directions).max()
    _claim(report, f"ECX, {compressor}, filter 1 / (2 - alpha): is EC", off)
    double = drive(ef.DoubleSqueeze(compressor, server_compressor=compressor), vectors, "error")
    ecx = drive(_ecx(compressor, 1.0), vectors)
    off = np.abs(ecx.directions - double.directions).max()
    report.claim(f"ECX, {compressor}, alpha 1: is DoubleSqueeze", "to the last bit",
                 f"off by {off:g}", off == 0)  # fmt: skip


def drive(method: ef.Method, vectors: np.ndarray, field: str = "last") -> Trace:
    """Give float32[steps, workers, d] to a method's workers; `field` names the errors in states."""
    steps, count, d = vectors.shape
    states = [method.init(np.zeros(d, np.float32), count)[0] for _ in range(count)]
    server = method.init(np.zeros(d, np.float32), count)[1]
    directions, errors = [], []
    for t in range(steps):
        keys = [ef.Key(0, t, 0, i, count) for i in range(count)]
        pushed = [method.push(states[i], vectors[t, i].copy(), keys[i]) for i in range(count)]
        aggregate, server = method.reduce(server, [m for m, _ in pushed], keys[0].of_server())
        pulled = [method.pull(state, aggregate) for _, state in pushed]
        states = [state for _, state in pulled]
        directions.append(pulled[0][0].astype(np.float64))
        own = np.mean([getattr(state, field) for state in states], 0, np.float64)
        errors.append(own + getattr(server, field))
    return Trace(np.array(directions), np.array(errors))


def averages(vectors: np.ndarray, alpha: ef.Decay | float) -> np.ndarray:
    """u: the recursion v = (1 - a_t) v + a_t mean_i A_i, float64[steps, d]."""
    v, out = np.zeros(vectors.shape[2]), []
    for t, mean in enumerate(vectors.mean(1, np.float64)):
        now = value_at(alpha, t)
        v = (1 - now) * v + now * mean
        out.append(v)
    return np.array(out)


def telescoping(trace: Trace, vectors: np.ndarray, alpha: ef.Decay | float) -> float:
    """By how much the identity of one step fails, relative to its largest term."""
    weighted = np.array([value_at(alpha, t) * e for t, e in enumerate(trace.errors)])
    before = np.vstack([np.zeros(vectors.shape[2]), weighted[:-1]])
    off = np.abs(trace.directions - (averages(vectors, alpha) + before - weighted)).max()
    return float(off / max(np.abs(trace.directions).max(), np.abs(trace.errors).max()))


def _sum_off(trace: Trace, vectors: np.ndarray, alpha: ef.Decay | float) -> float:
    off = (trace.directions - averages(vectors, alpha)).sum(0)
    off += value_at(alpha, len(vectors) - 1) * trace.errors[-1]
    return float(np.abs(off).max() / np.abs(trace.errors).max())


def _ecx(compressor: ef.Compressor, alpha: ef.Decay | float, beta: float = 1.0) -> ef.Method:
    return ef.ErrorCompensatedX(compressor, server_compressor=compressor, alpha=alpha, beta=beta)


def _claim(report: Report, what: str, off: float) -> None:
    report.claim(what, f"off by < {ROUNDING:g}, rounding", f"{off:.1e}", off < ROUNDING)
