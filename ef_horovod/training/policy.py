"""Which parameters are compressed, and checks of parameters and methods; equal on all ranks."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback

Parameter = Any  # torch.Tensor, tensorflow.Variable or keras.Variable
DensePolicy = Callable[[str, Parameter], bool | Method]
MIN_COMPRESSED_ELEMENTS = 1024


def small_or_vector(name: str, parameter: Parameter) -> bool:
    """The default policy: biases, norms and small parameters stay uncompressed.

    They are a small part of the bytes, but compressing them often harms training. A policy gets
    name and parameter and returns whether the parameter stays uncompressed, or a method for it. It
    must decide the same on all ranks. `lambda name, parameter: False` compresses everything.
    """
    return len(parameter.shape) <= 1 or math.prod(parameter.shape) < MIN_COMPRESSED_ELEMENTS


def method_of(dense: DensePolicy, name: str, parameter: Parameter, method: Method) -> Method | None:
    """The method that a policy gives to a parameter; None if it stays uncompressed.

    Args:
        dense: the policy.
        name, parameter: its arguments.
        method: of the parameters for which the policy returns False.

    Raises:
        UnsupportedError: the policy returns something else than True, False or a method, or a
            method that leaves another part of its work to the optimizer.
    """
    answer = dense(name, parameter)
    if isinstance(answer, Method):
        if _part_of_optimizer(answer) != _part_of_optimizer(method):
            raise UnsupportedError(
                f"dense= gives '{name}' {answer!r} beside {method!r}, expected one with the same "
                "momentum, because one optimizer steps all parameters; take MomentumCorrection "
                "with that momentum for both or for neither, and likewise FrozenAdam"
            )
        return answer
    if not isinstance(answer, (bool, np.bool_)):
        raise UnsupportedError(
            f"dense= returned {answer!r} for '{name}', expected True (uncompressed), False or a "
            "method; write for example bool(...) or EF21(TopK(0.1)), or take ef.by_name"
        )
    return None if answer else method


def _part_of_optimizer(method: Method) -> tuple[Any, bool]:
    """What the method does in place of the optimizer."""
    return method.sgd_momentum, method.makes_updates


def require_answers(named: list[tuple[str, Parameter]], dense: DensePolicy, method: Method) -> None:
    """Ask the policy about all parameters, before anything is sent; raises as `method_of` does."""
    for name, parameter in named:
        method_of(dense, name, parameter, method)


def require_distinct(named: list[tuple[str, Parameter]]) -> list[tuple[str, Parameter]]:
    """Return `named` if all parameters are real, and each name and parameter occurs once.

    Raises:
        ValueError: two parameters have the same name, or a parameter has two names.
        UnsupportedError: a parameter is complex.
    """
    for what, items in (("name", [n for n, _ in named]), ("parameter", [id(p) for _, p in named])):
        count = Counter(items)
        twice = [name for (name, _), item in zip(named, items, strict=True) if count[item] > 1]
        if twice:
            raise ValueError(
                f"got the same {what} more than once among the parameters ({twice[:4]}), expected "
                "each once; pass model.named_parameters() or model.trainable_variables, which "
                "list tied parameters once"
            )
    for name, parameter in named:
        if "complex" in str(parameter.dtype):
            raise UnsupportedError(
                f"parameter '{name}' is complex, expected a real one, because only float32 is "
                "sent; keep real and imaginary parts as real numbers (torch.view_as_real) in it"
            )
    return named


def require_method(compression: Any) -> Method:
    """Return `compression` if it is a method.

    Raises:
        UnsupportedError: it is not a method; the message says what to write instead.
    """
    if isinstance(compression, Method):
        return compression
    if isinstance(compression, Compressor):
        way_out = f"wrap it: ErrorFeedback({compression}) or EF21({compression})"
    elif hasattr(compression, "decompress"):  # hvd.Compression.fp16, ef.Compression
        way_out = (
            "such an adapter goes to hvd.DistributedOptimizer; here write EF21(TopK(ratio=0.01)), "
            "or NoFeedback(Cast('float16')) for fp16"
        )
    else:
        way_out = "write EF21(TopK(ratio=0.01)), or NoFeedback(Cast('float16')) for fp16"
    raise UnsupportedError(f"got compression={compression!r}, expected a method; {way_out}")


def warn_of_surprises(
    named: list[tuple[str, Parameter]], method: Method, dense: DensePolicy, rank: int
) -> None:
    """Warn on rank 0 of float64, of patterns that fit no name, or if nothing is compressed.

    Call it once per optimizer, from the function that the user calls.

    Args:
        named: names and parameters whose gradients are reduced.
        method: for the compressed parameters.
        dense: the policy.
        rank: of this process; only rank 0 warns.
    """
    if rank != 0 or not named:
        return
    doubles = [name for name, parameter in named if "float64" in str(parameter.dtype)]
    if doubles:
        warnings.warn(
            f"got float64 in {len(doubles)} of {len(named)} parameters (such as '{doubles[0]}'), "
            "expected float32 or less, because all gradients are reduced in float32; train in "
            "float32, or without this package if float64 sums are needed",
            stacklevel=3,
        )
    unused = getattr(dense, "unused", None)  # of `by_name`
    for pattern in unused([name for name, _ in named]) if unused is not None else ():
        warnings.warn(
            f"got the pattern {pattern!r} in by_name, which fits none of {len(named)} parameters "
            f"(such as '{named[0][0]}'), expected it to fit some; correct it, unless it is for "
            "another optimizer's parameters",
            stacklevel=3,
        )
    if method != NoFeedback(Identity()) and not any(
        method_of(dense, name, p, method) for name, p in named
    ):
        largest = max(math.prod(parameter.shape) for _, parameter in named)
        warnings.warn(
            f"got no parameter to compress by {method!r}: dense= keeps all {len(named)} "
            f"uncompressed, the largest of {largest} elements (the default keeps those of fewer "
            f"than {MIN_COMPRESSED_ELEMENTS} elements or of one dimension), expected at least one; "
            "pass dense=lambda name, parameter: False to compress all of them",
            stacklevel=3,
        )


def is_elastic() -> bool:
    """Whether this is an elastic Horovod job."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def refuse_elastic() -> None:
    """Raise in an elastic job, because states and transports need a fixed set of ranks.

    Raises:
        UnsupportedError: the job is elastic.
    """
    if is_elastic():
        raise UnsupportedError(
            "got an elastic Horovod job, expected a fixed number of ranks, because error-feedback "
            "state does not follow ranks that come and go here; start it with horovodrun -np N, or "
            "take ef.DistributedOptimizer in PyTorch"
        )


def refuse_process_set(process_set: Any) -> None:
    """Raise for a process set in a job with parameter servers.

    Raises:
        UnsupportedError: there is one.
    """
    if process_set is not None:
        raise UnsupportedError(
            "got a process_set with exchange='server', expected none, because the job's "
            "workers are those that mpirun started; leave it out"
        )
