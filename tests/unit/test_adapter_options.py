"""Options of adapters and of `simulate` are checked before anything is built or sent."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ef_horovod as ef
from ef_horovod.server import Worker
from ef_horovod.training.buckets import Slot
from ef_horovod.training.options import check_options

METHOD = ef.ErrorFeedback(ef.TopK(k=1))
WRONG = {
    "backward_passes_per_step": (1.5, 0, True, "2"),
    "bucket_bytes": (0, -1, 1.5, True, "25MB"),
    "seed": ("a", 1.5, True, None, 2**64),
    "dense": (True, "bias", 1024),
    "exchange": (3, None, True),
    "process_set": (3, [0, 1], "all"),
    "overlap": ("no", 0, None),
    "timeout": ("5", 0, -1, True, math.nan),
}
REFUSED = [(name, value) for name, values in WRONG.items() for value in values]
SENTENCE = r"got {}=.*, expected .*; "


def _refuses(make, name: str, value: object) -> None:
    with pytest.raises((ValueError, ef.UnsupportedError), match=SENTENCE.format(name)):
        make(**{name: value})


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_torch_adapters_refuse_options_of_other_kinds(name, value):
    import ef_horovod.torch as et

    model = torch.nn.Linear(2, 2)
    named = list(model.named_parameters())

    def optimizer(**options):
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        return et.DistributedOptimizer(sgd, named, METHOD, **options)

    _refuses(optimizer, name, value)
    if name not in ("backward_passes_per_step", "bucket_bytes", "overlap"):
        _refuses(lambda **options: et.Compression(METHOD, named, **options), name, value)


@pytest.mark.parametrize("value", [torch.amp.GradScaler, 1024.0])
def test_a_scale_or_a_class_is_no_grad_scaler(value):
    with pytest.raises(ef.UnsupportedError, match=r"expected a torch.amp.GradScaler; write"):
        check_options("DistributedOptimizer", grad_scaler=value)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_tensorflow_adapters_refuse_options_of_other_kinds(name, value):
    import keras
    import tensorflow as tf

    import ef_horovod.tensorflow as et

    if name == "overlap":
        with pytest.raises(TypeError, match="overlap"):
            et.Reducer([tf.Variable(1.0)], METHOD, overlap=value)
        return
    sgd = keras.optimizers.SGD(0.1)
    _refuses(lambda **options: et.DistributedOptimizer(sgd, METHOD, **options), name, value)
    if name != "backward_passes_per_step":
        _refuses(lambda **options: et.Reducer([tf.Variable(1.0)], METHOD, **options), name, value)
        if name != "bucket_bytes":
            variables = [tf.Variable(1.0)]
            _refuses(lambda **options: et.Compression(METHOD, variables, **options), name, value)


def test_typed_options_of_tape_and_optimizer_are_the_reducers():
    import inspect

    import ef_horovod.tensorflow as et
    from ef_horovod.tensorflow.options import ReducerOptions

    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(et.Reducer).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    typed = {name: kind.__forward_arg__ for name, kind in ReducerOptions.__annotations__.items()}
    assert typed == keywords


OF_WORKERS = ("bucket_bytes", "seed", "dense", "timeout")


@pytest.mark.parametrize(("name", "value"), [case for case in REFUSED if case[0] in OF_WORKERS])
def test_a_worker_refuses_options_of_other_kinds(name, value):
    _refuses(lambda **options: Worker([np.zeros(3)], METHOD, **options), name, value)


@pytest.mark.parametrize("parameters", [[1.0], [np.zeros(3, int)], {"w": [1.0]}])
def test_a_worker_takes_arrays_of_real_numbers(parameters):
    with pytest.raises(TypeError, match="expected"):
        Worker(parameters, METHOD)


@pytest.mark.parametrize(
    "gradient",
    [np.ones(3, complex), np.ma.masked_array(np.ones(3)), np.ones(3, int), ["a", "b", "c"]],
)
def test_a_worker_pushes_real_numbers(gradient):
    parameter = np.zeros(3, np.float32)
    bucket = SimpleNamespace(filled=set(), channel=SimpleNamespace(gradient=parameter.copy()))
    worker = object.__new__(Worker)
    worker.transport = SimpleNamespace(require_open=lambda: None)
    worker._place = {"w": (bucket, Slot("w", parameter, 0, 3))}
    with pytest.raises(TypeError, match="expected"):
        worker.push("w", gradient)
    assert not bucket.filled
    assert not bucket.channel.gradient.any()


def test_a_policy_takes_a_name_and_a_parameter():
    for policy in (lambda name: True, lambda: True, lambda a, b, c: True, 3):
        with pytest.raises(ef.UnsupportedError, match="it got dense=.*, expected a function"):
            check_options("it", dense=policy)
    check_options("it", dense=lambda name, parameter, extra=1: True)


def test_good_options_pass():
    check_options(
        "it", backward_passes_per_step=np.int64(2), bucket_bytes=1, seed=-1, dense=max,
        exchange="auto", process_set=None, overlap=np.True_, timeout=math.inf, others=3,
    )  # fmt: skip


def _simulate(**options):
    given = {"workers": 2, "steps": 3, "step_size": 0.1} | options
    x0 = given.pop("x0", np.zeros(3))
    gradient = given.pop("gradient", lambda worker, x, step: x - 1)
    return ef.simulate(METHOD, gradient, x0, **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", 0), ("workers", 2.5), ("workers", True), ("workers", "2"),
        ("steps", -1), ("steps", 1.5), ("steps", True),
        ("step_size", "0.1"), ("step_size", True), ("step_size", math.nan), ("step_size", None),
        ("seed", "a"), ("seed", 0.5), ("exchange", 3), ("estimator", 3), ("estimator", None),
        ("observe", 3), ("stop", True), ("transport", 3),
    ],
)  # fmt: skip
def test_simulate_refuses_options_of_other_kinds(name, value):
    _refuses(_simulate, name, value)


@pytest.mark.parametrize("value", [math.nan, "0.1", None, True])
def test_simulate_refuses_what_a_step_size_returns(value):
    with pytest.raises(ValueError, match=r"simulate got step_size\(0\)=.*, expected a number"):
        _simulate(step_size=lambda step: value)


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (np.zeros(3, int), "got x0 of int64, expected a real, floating-point one"),
        (np.zeros(3, complex), "got x0 of complex128, expected a real"),
        (np.ma.masked_array(np.zeros(3)), "expected an array without a mask"),
        ([0.0, 0.0], "expected a NumPy array"),
    ],
)
def test_simulate_refuses_a_start_that_would_lose_numbers(x0, message):
    with pytest.raises(TypeError, match=message):
        _simulate(x0=x0)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (lambda i, x, t: x + 1j, r"gradient\(0, x, 0\) of complex128, expected a real"),
        (lambda i, x, t: np.ma.masked_array(x), "expected an array without a mask"),
        (lambda i, x, t: [0.0] * 3, "expected a NumPy array"),
        (lambda i, x, t: torch.zeros(3), "is a Tensor, expected one like x0, a ndarray"),
    ],
)
def test_simulate_refuses_gradients_that_would_lose_numbers(gradient, message):
    with pytest.raises(TypeError, match=message):
        _simulate(gradient=gradient)


def test_simulate_takes_numbers_of_numpy():
    plain = _simulate(seed=3)
    numpy = _simulate(
        workers=np.int64(2), steps=np.int32(3), step_size=np.float64(0.1), seed=np.uint64(3)
    )
    assert np.array_equal(plain.x, numpy.x)
