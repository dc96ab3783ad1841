"""check_method notices each way in which a method can break the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.arrays import namespace
from ef_horovod.compressors.base import DEFAULT_KEY
from ef_horovod.errors import NonFiniteError
from ef_horovod.methods.base import Method, vector_like
from ef_horovod.methods.error_feedback import ErrorFeedback, ErrorFeedbackState
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method
from ef_horovod.testing import check_method, each_method_check
from ef_horovod.testing.methods import check_bad_gradient

BREAKS: list[tuple[str, type[Method], ef.Compressor]] = []


# Broken methods are registered for one test each.
pytestmark = pytest.mark.usefixtures("own_classes")


def breaks(message, compressor=ef.TopK(k=3)):  # noqa: B008 - frozen
    """Collect a method that check_method must refuse with this message."""

    def collect(cls):
        BREAKS.append((message, dataclass(frozen=True)(cls), compressor))
        return cls

    return collect


@breaks("expected a NamedTuple")
class PlainState(ErrorFeedback):
    def init(self, x, workers=1):
        worker, server = super().init(x, workers)
        return list(worker), server


@breaks("something else than methods")
class ListsCompressors(ErrorFeedback):
    @classmethod
    def examples(cls, compressor):
        return (compressor,)


@breaks("changes an array of the state")
class WritesInPush(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        namespace(gradient).add(state.error, gradient)
        namespace(gradient).assign(gradient, state.error)
        message, residual = self.compressor.compress_with_residual(gradient, key)
        return message, ErrorFeedbackState(error=residual)


@breaks("goes on in another way after a dropped push")
class CountsPushes(ErrorFeedback):
    pushes: ClassVar[list] = []

    def push(self, state, gradient, key=DEFAULT_KEY):
        self.pushes.append(None)
        namespace(gradient).divide(gradient, float(len(self.pushes)), out=gradient)
        return super().push(state, gradient, key)


@breaks("refuses with NonFiniteError")
class SwallowsNaN(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        try:
            return super().push(state, gradient, key)
        except NonFiniteError:
            return self.compressor.compress(np.zeros_like(state.error)), state


@breaks("takes it")
class RefusesAll(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        if gradient.max() > 100:
            raise NonFiniteError("too large")
        return super().push(state, gradient, key)


@breaks("expected what TopK\\(k=3\\) lost of it")
class ForgetsLoss(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        message, pushed = super().push(state, gradient, key)
        pushed = ErrorFeedbackState(error=gradient * 1)
        namespace(gradient).fill(gradient, 0.0)
        return message, pushed


@breaks("is fixed_size, but sends")
class SendsMoreNowAndThen(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        compressor = ef.TopK(k=4 if key.step == 3 else 3)
        message, residual = compressor.compress_with_residual(gradient, key)
        return message, ErrorFeedbackState(error=residual)


@breaks("none of them its compressor's")
class TakesAnotherCompressor(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        message, residual = ef.TopK(k=7).compress_with_residual(gradient, key)
        return message, ErrorFeedbackState(error=residual)

    def skip(self, gradient, key):
        return ef.TopK(k=7).skip(gradient)


@breaks("is not fixed_size, yet")
class HidesItsSize(ErrorFeedback):
    fixed_size = False


@breaks("skip gives a message without the flag")
class SkipsWithZeros(ErrorFeedback):
    def skip(self, gradient, key):
        return self.compressor.compress(gradient * 0)


@breaks("for torch than for numpy")
class DependsOnFramework(ErrorFeedback):
    def push(self, state, gradient, key=DEFAULT_KEY):
        if not isinstance(gradient, np.ndarray):
            gradient *= 1.5
        return super().push(state, gradient, key)


@breaks("whose numbers cannot be summed", ef.OneBit())
class ClaimsSummable(ErrorFeedback):
    allreducible = True


class Averages(ErrorFeedback):
    """Each worker's message is normed: their sum is not enough to know."""

    def reduce(self, server, messages, key):
        xp = namespace(server.mean)
        xp.fill(server.mean, 0.0)
        for message in messages:
            part = message.decompress()
            message.add_to(server.mean, 1 / float(np.linalg.norm(part)))
        return server.mean, server


breaks("is allreducible, but goes elsewhere", ef.RandomK(0.1))(Averages)


class Counted(NamedTuple):
    """A worker that counts what it has sent."""

    error: Any
    sent: Any


@breaks("from a checkpoint")
class ForgetsAtCheckpoints(ErrorFeedback):
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "error"})


@breaks("which no checkpoint holds")
class RemembersText(ErrorFeedback):
    def init(self, x, workers=1):
        return Counted(vector_like(x), "never"), super().init(x, workers)[1]

    def push(self, state, gradient, key=DEFAULT_KEY):
        message, pushed = super().push(state, gradient, key)
        return message, Counted(pushed.error, f"{key.step}")


@breaks("different directions")
class PullsOwnErrors(ErrorFeedback):
    def pull(self, state, aggregate):
        return aggregate + state.error, state


@breaks("cannot merge its state")
class MergesNothing(ErrorFeedback):
    merging: ClassVar = {}


@breaks("takes another direction on 6 ranks than on 3")
class MergesASumAsAMean(ef.EF21):
    merging: ClassVar = ef.EF21.merging | {"server.total": Merge.SHARED}


class HiddenError(NamedTuple):
    """A channel does not see that this took the gradient's memory, and hands it out again."""

    errors: tuple


@breaks("takes another direction in a channel")
class HidesItsError(ErrorFeedback):
    def init(self, x, workers=1):
        return HiddenError((vector_like(x),)), super().init(x, workers)[1]

    def push(self, state, gradient, key=DEFAULT_KEY):
        message, pushed = super().push(ErrorFeedbackState(*state.errors), gradient, key)
        return message, HiddenError((pushed.error,))


@pytest.mark.parametrize(
    ("message", "cls", "compressor"), BREAKS, ids=[cls.__name__ for _, cls, _ in BREAKS]
)
def test_broken_clause_is_named(message, cls, compressor):
    broken = register_method(cls)(compressor)
    with pytest.raises(AssertionError, match=message) as caught:
        check_method(broken, frameworks=("numpy", "torch"))
    assert cls.__name__ in str(caught.value)


def test_a_check_whose_break_others_notice_first():
    check_bad_gradient(ErrorFeedback(ef.TopK(k=3)), np.nan)
    with pytest.raises(AssertionError, match="does not drop step 0 on all ranks"):
        check_bad_gradient(SwallowsNaN(ef.TopK(k=3)), np.nan)


def test_unregistered_method_is_refused():
    @dataclass(frozen=True)
    class Unregistered(ErrorFeedback):
        pass

    with pytest.raises(AssertionError, match="not registered"):
        check_method(Unregistered(ef.TopK(k=3)))


def test_methods_for_a_fixed_number_of_workers_pass():
    check_method(ef.EF21(ef.TopK(k=3), weights=(1, 2, 3)), frameworks=("numpy", "torch"))


def test_frameworks_choose_the_checks():
    def names(frameworks):
        checks = each_method_check(ef.EF21(ef.TopK(k=3)), frameworks)
        return [check.func.__name__ for check in checks]

    assert names(("numpy",)).count("check_channels") == 1
    assert "check_states" not in names(("numpy", "tensorflow"))
    assert "check_states" in names(("torch",))
