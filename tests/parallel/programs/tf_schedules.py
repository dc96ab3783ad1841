"""Dense steps, a falling ratio and a policy in TensorFlow, eager and in graphs; facts."""

from __future__ import annotations

from itertools import pairwise

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from common import error_of, report
from tf_common import digest

import ef_horovod.tensorflow as ef

N, STEPS = 4, 8
TOP = ef.ErrorFeedback(ef.TopK(ratio=0.05))
CORRECTED = ef.MomentumCorrection(ef.TopK(ratio=0.05))
POLICY = ef.by_name({"a": ef.EF21(ef.TopK(ratio=0.05)), "b*": "compressed"})
KINDS = {
    "top": (TOP, {"dense_steps": N}),
    "corrected": (CORRECTED, {"dense_steps": N}),
    "double pass": (TOP, {"dense_steps": N, "exchange": "double_pass"}),
    "falling ratio": (ef.ErrorFeedback(ef.TopK(ratio=ef.Piecewise({0: 0.2, N: 0.05}))), {}),
    "two methods": (TOP, {"dense_steps": N, "dense": POLICY}),
    "sums": (ef.ErrorFeedback(ef.RandomK(0.1)), {"dense_steps": N}),
}
SHAPES = {"a": (60, 40), "b": (50, 60), "bias": (50,)}


class Loop:
    """Variables that follow averages of fixed random gradients."""

    def __init__(self, kind, *, graph=True, stock=False):
        method, options = KINDS[kind]
        self.variables = [tf.Variable(tf.zeros(s), name=n) for n, s in SHAPES.items()]
        make = ef.Compression if stock else ef.Reducer
        self.state = (
            make(method, self.variables, **options)
            if stock
            else make(self.variables, method, bucket_bytes=10_000, **options)
        )
        self._average = self._by_tape if stock else self.state.reduce
        self._run = tf.function(self._step) if graph else self._step

    def _by_tape(self, gradients):
        with tf.GradientTape() as tape:
            loss = tf.add_n(
                [tf.reduce_sum(v * g) for v, g in zip(self.variables, gradients, strict=True)]
            )
        tape = hvd.DistributedGradientTape(tape, compression=self.state)
        return tape.gradient(loss, self.variables)

    def _step(self, *gradients):
        for variable, average in zip(self.variables, self._average(gradients), strict=True):
            variable.assign_sub(0.1 * average)

    def train(self, steps):
        for t in steps:
            rng = np.random.default_rng((t, hvd.rank()))
            self._run(*(tf.constant(rng.normal(size=s), tf.float32) for s in SHAPES.values()))
        return self

    def state_dict(self):
        return getattr(self.state, "compression_state_dict", None) or self.state.state_dict

    def load(self, state):
        load = getattr(self.state, "load_compression_state_dict", None)
        (load or self.state.load_state_dict)(state)


def bytes_by_step(kind, **options):
    """What a rank sends in each step, and whether the ranks end equal."""
    loop, sent = Loop(kind, **options), [0]
    for t in range(STEPS):
        loop.train([t])
        sent.append(loop.state.stats()[-1].bytes_out)
    return {
        "digest": digest(loop.variables),
        "sent": [b - a for a, b in pairwise(sent)],
        "methods": sorted({row.method for row in loop.state.stats()[:-1]}),
    }


def resumed(kind, stop, **options):
    """Stop after some steps and go on in new objects."""
    whole, again = Loop(kind, **options).train(range(stop)), Loop(kind, **options)
    for mine, theirs in zip(again.variables, whole.variables, strict=True):
        mine.assign(theirs)
    again.load(whole.state_dict()())
    ends = [loop.train(range(stop, STEPS)).variables for loop in (whole, again)]
    return [digest(end) for end in ends]


def bad_steps():
    """A NaN on one rank in either phase drops the step; the others are as without it."""
    calm, loop = Loop("top"), Loop("top")
    calm.train(range(STEPS))
    for t in range(STEPS):
        if t in (1, 6):
            value = np.nan if hvd.rank() == 1 else 1.0
            averages = loop.state.reduce([tf.fill(s, value) for s in SHAPES.values()])
            assert all(np.isnan(a).all() for a in averages)
        loop.train([t])
    return digest(calm.variables), digest(loop.variables), loop.state.stats()[-1].skipped


def policy_differs():
    """Each rank gives the second method to another variable."""
    own = ef.by_name({"ab"[hvd.rank()]: ef.EF21(ef.TopK(ratio=0.05))})
    variables = [tf.Variable(tf.zeros(SHAPES[name]), name=name) for name in "ab"]
    return error_of(
        lambda: ef.Reducer(variables, TOP, dense=own).reduce([tf.zeros(v.shape) for v in variables])
    )


def main() -> None:
    hvd.init()
    ways = {
        "graph": {},
        "eager": {"graph": False},
        "stock": {"stock": True},
    }
    facts = {
        f"{kind}, {way}": bytes_by_step(kind, **options)
        for kind in KINDS
        for way, options in ways.items()
        if way == "graph" or kind in ("top", "two methods")
    }
    results = {
        "kinds": facts,
        "resumed": {
            f"{kind} {stop}": resumed(kind, stop)
            for kind in ("top", "corrected", "falling ratio", "two methods")
            for stop in (2, 6)
        },
        "bad": bad_steps(),
        "policy differs": policy_differs(),
        "differs": error_of(
            lambda: ef.Reducer([tf.Variable(tf.zeros(2000))], TOP, dense_steps=hvd.rank()).reduce(
                [tf.zeros(2000)]
            )
        ),
    }
    report(hvd.rank(), results)


main()
