"""Checks of the contract of methods (methods/base.py), also for third-party ones.

Each check is a function that raises AssertionError and names the broken clause. Workers, states and
payloads are real; all workers are in this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ef_horovod.compressors.base import Payload
from ef_horovod.compressors.topk import TopK
from ef_horovod.errors import NonFiniteError, UnsupportedError
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.double_pass import cuts
from ef_horovod.methods.base import Method
from ef_horovod.methods.registry import METHODS
from ef_horovod.testing.checkpoints import check_checkpoint, check_merging
from ef_horovod.testing.frameworks import check_frameworks
from ef_horovod.testing.tools import array_of, is_deterministic, norm, require
from ef_horovod.testing.workers import D, Workers, channels, gradients, memory, run_channels
from ef_horovod.training.choice import choose

WORKERS = 3
_BAD = (np.nan, np.inf, -np.inf)


def check_method(method: Method, *, frameworks: Sequence[str] = ("numpy",)) -> None:
    """Raise AssertionError, naming the broken clause, unless a method keeps the contract.

    It runs three workers and takes a few seconds.

    Args:
        method: instance of a registered class.
        frameworks: "numpy", and others whose arrays it must accept: "torch", and "tensorflow",
            which needs Horovod built for it.

    Example:
        >>> import ef_horovod as ef
        >>> check_method(ef.ErrorFeedback(ef.TopK(ratio=0.1)))
    """
    for check in each_method_check(method, frameworks):
        check()
    check_frameworks(method, [name for name in frameworks if name != "numpy"])


def each_method_check(method: Method, frameworks: Sequence[str] = ("numpy",)) -> Iterator[partial]:
    """All checks except the comparison of frameworks, as functions without arguments."""
    yield partial(check_registered, method)
    yield partial(check_messages, method)
    for bad in (None, *_BAD):
        yield partial(check_dropped_push, method, bad)
    for bad in _BAD:
        yield partial(check_bad_gradient, method, bad)
    yield partial(check_undone, method)
    yield partial(check_lost, method)
    yield partial(check_exchanges, method)
    yield partial(check_checkpoint, method)
    for framework in frameworks:
        if framework == "tensorflow":
            continue  # its users run the adapter's ops: see check_frameworks
        if framework != "numpy":
            yield partial(check_states, method, framework)
        yield partial(check_channels, method, framework)
    yield partial(check_refused_slices, method)
    if method.sliceable:
        yield partial(check_bad_gradient, method, np.nan, "double_pass")
        yield partial(check_checkpoint, method, "double_pass")
        yield partial(check_undone, method, "double_pass")
        for framework in frameworks:
            if framework != "tensorflow":
                yield partial(check_slices, method, framework)
    yield partial(check_merging, method)


def check_registered(method: Method) -> None:
    """The method is registered, equals itself, and has valid examples and states."""
    kind = type(method)
    known = METHODS.get(kind.__name__) is kind
    require(known, method, "is not registered; put @register_method before its class")
    same = method == method and hash(method) == hash(method)
    require(same, method, "does not equal itself; make it a frozen dataclass")
    examples = kind.examples(TopK(k=3))
    listed = all(isinstance(example, Method) for example in examples)
    require(listed, method, "lists something else than methods in examples(compressor)")
    for state in method.init(np.zeros(D, np.float32), WORKERS):
        named = state is None or hasattr(state, "_asdict")
        require(named, method, f"has a state of {type(state).__name__}, expected a NamedTuple")


def check_dropped_push(method: Method, bad: float | None) -> None:
    """A push that is dropped, or refuses a `bad` gradient, does not change the states."""
    kept, control = Workers(method, WORKERS), Workers(method, WORKERS)
    for t, g in enumerate(gradients(WORKERS, 8)):
        rank = _speaker(method, kept, g, t)
        spoiled = 100 * g[rank, ::-1].copy()
        spoiled[::7] = spoiled[::7] if bad is None else bad
        before = memory(method, kept.states[rank])
        try:
            method.push(kept.states[rank], spoiled, kept.key(t, rank))
            refused = False
        except NonFiniteError:
            refused = True
        expected = "takes" if bad is None else "refuses with NonFiniteError"
        message = f"push does not do with {bad} in a gradient what it should: it {expected} it"
        require(refused == (bad is not None), method, message)
        same = memory(method, kept.states[rank]) == before
        require(same, method, "push changes an array of the state that it is given")
        messages, direction = kept.step(g, t)
        others, other = control.step(g, t)
        same = [bytes(m) for m in messages] == [bytes(m) for m in others]
        same = same and direction.tobytes() == other.tobytes() and _same(kept, control)
        require(same, method, f"goes on in another way after a dropped push (step {t})")


def check_undone(method: Method, exchange: str = "auto") -> None:
    """A step that is committed and then undone does not change the states."""
    kept, control = (channels(method, WORKERS, exchange=exchange) for _ in range(2))
    for t, g in enumerate(gradients(WORKERS, 10)):
        run_channels(kept, list(100 * g[::-1]), t, undoable=True)
        for channel in kept:
            channel.undo()
        pairs = zip(run_channels(kept, g, t), run_channels(control, g, t), strict=True)
        same = all(a is not None and b is not None and a.tobytes() == b.tobytes() for a, b in pairs)
        message = (
            f"goes on in another way after a step that was undone, by {exchange} (step {t}); list "
            "in pulled_in_place and reduced_in_place what pull and reduce change in place"
        )
        require(same, method, message)


def check_lost(method: Method) -> None:
    """push leaves x - C(x) in the gradient, for a channel's statistics.

    Only checked for deterministic contractions, which bound it.
    """
    compressor, (one, *_) = method.compressor, gradients(1, 1)[0]
    delta = compressor.contraction(D)
    if delta is None or not is_deterministic(compressor, one):
        return
    group, errors, bounded = channels(method, WORKERS), [], True
    if not group[0].exchange.compresses:
        return
    for t, g in enumerate(gradients(WORKERS, 9)):
        run_channels(group, g, t)
        sent = group[0]._message
        if sent is not None and not sent.is_absent:
            errors.append(group[0].stats().relative_error)
            bounded &= sent.num_elements == D  # else the payload holds something derived from x
    least = 0.1 * norm(one - compressor.compress(one).decompress()) / norm(one)
    message = (
        f"push leaves {errors} of what it compressed in the gradient, expected what "
        f"{compressor!r} lost of it"
    )
    limit = np.sqrt(1 - delta) + 1e-6 if bounded else np.inf
    good = max(errors) <= limit and np.median(errors) >= least
    require(good, method, message)


def check_messages(method: Method) -> None:
    """Payloads, including that of `skip`, fit `fixed_size` and `allreducible`."""
    group, lengths, known = Workers(method, WORKERS), set(), False
    for t, g in enumerate(gradients(WORKERS, 8)):
        messages, _ = group.step(g, t)
        sizes = {message.nbytes for message in messages}
        lengths |= sizes
        known |= any(m.nbytes == method.compressor.nbytes(m.num_elements) for m in messages)
        _require_summands(method, messages[0])
        skip = method.skip(g[0].copy(), group.key(t))
        require(skip.is_skip, method, "skip gives a message without the flag that says so")
        if method.fixed_size:
            equal = sizes == {skip.nbytes}
            message = (
                f"is fixed_size, but sends {sizes} and skips with {skip.nbytes} bytes (step {t})"
            )
            require(equal, method, message)
    if method.fixed_size:
        message = f"sends {lengths} bytes, none of them its compressor's {method.compressor}"
        require(known, method, message)
    else:
        require(
            len(lengths) > 1, method, "is not fixed_size, yet all its messages are equally long"
        )


def _require_summands(method: Method, message: Payload) -> None:
    try:
        good = not method.allreducible or message.summands() is not None
    except NotImplementedError:
        good = False
    require(good, method, f"is allreducible, but sends {message}, whose numbers cannot be summed")


def check_states(method: Method, framework: str) -> None:
    """A framework's payloads, aggregated gradients and states bitwise equal NumPy's."""

    def zeros(d: int) -> Any:
        return array_of(framework, np.zeros(d, np.float32))

    ours, theirs = Workers(method, WORKERS), Workers(method, WORKERS, zeros)
    for t, g in enumerate(gradients(WORKERS, 50)):
        messages, direction = ours.step(g, t)
        others, other = theirs.step([array_of(framework, part) for part in g], t)
        same = [bytes(m) for m in messages] == [bytes(m) for m in others]
        require(same, method, f"sends other bytes for {framework} than for numpy (step {t})")
        same = direction.tobytes() == other.tobytes()
        require(same, method, f"gives another direction for {framework} than for numpy (step {t})")
    require(_same(ours, theirs), method, f"remembers other numbers in {framework} than in numpy")


def check_channels(method: Method, framework: str) -> None:
    """Channels over a transport take the same steps as the method alone.

    Catches a channel that hands out an array that a state still needs.
    """
    like = array_of(framework, np.zeros(D, np.float32))
    ranks, reference = channels(method, WORKERS, like), Workers(method, WORKERS, name="weights")
    bits = not ranks[0].exchange.sums
    for t, g in enumerate(gradients(WORKERS, 12)):
        _, expected = reference.step(g, t)
        for direction in run_channels(ranks, g, t):
            message = f"takes another direction in a channel of {framework} arrays (step {t})"
            require(direction is not None and _close(direction, expected, bits), method, message)
    if bits:
        for channel, state in zip(ranks, reference.states, strict=True):
            same = memory(method, channel.worker) == memory(method, state)
            same = same and memory(method, channel.server) == memory(method, reference.server)
            require(same, method, f"remembers other numbers in a channel of {framework} arrays")


def check_bad_gradient(method: Method, bad: float, exchange: str = "auto") -> None:
    """A non-finite gradient on one rank drops the step on all ranks; no state changes."""
    ranks, control = (channels(method, WORKERS, exchange=exchange) for _ in range(2))
    for t, g in enumerate(gradients(WORKERS, 8)):
        if t in (0, 3, 6):  # in step 6 some methods reset
            spoiled = g.copy()
            spoiled[_speaking(method, ranks, g, t), D // 2] = bad
            dropped = [direction is None for direction in run_channels(ranks, spoiled, t)]
            require(all(dropped), method, f"does not drop step {t} on all ranks for {bad} on one")
        pairs = zip(run_channels(ranks, g, t), run_channels(control, g, t), strict=True)
        same = all(_close(ours, theirs, True) for ours, theirs in pairs)
        require(same, method, f"goes on in another way after a dropped step (step {t})")
    for channel, other in zip(ranks, control, strict=True):
        counts = (channel.stats().skipped, channel.stats().steps)
        require(counts == (3, 8), method, f"counts {counts} dropped and taken steps, not (3, 8)")
        same = _remembered(method, channel) == _remembered(method, other)
        require(same, method, "remembers something of a dropped step")


def check_exchanges(method: Method) -> None:
    """exchange="reduce" works for an `allreducible` method, and is refused for others."""
    if not method.allreducible:
        try:
            choose("reduce", method)
        except UnsupportedError:
            return
        require(False, method, "is not allreducible, but exchange='reduce' is not refused")
    gathered = channels(method, WORKERS, exchange="gather")
    reduced = channels(method, WORKERS, exchange="reduce")
    for t, g in enumerate(gradients(WORKERS, 10)):
        pairs = zip(run_channels(gathered, g, t), run_channels(reduced, g, t), strict=True)
        same = all(_close(summed, one, False) for one, summed in pairs)
        message = f"is allreducible, but goes elsewhere if its messages are summed (step {t})"
        require(same, method, message)


def check_refused_slices(method: Method) -> None:
    """exchange="double_pass" is refused for a method that is not `sliceable`."""
    if not method.sliceable:
        try:
            choose("double_pass", method)
        except UnsupportedError:
            return
        require(False, method, "is not sliceable, but exchange='double_pass' is not refused")


def check_slices(method: Method, framework: str = "numpy") -> None:
    """In a double pass each slice bitwise equals the result of workers with a server for it."""
    ranks = channels(method, WORKERS, array_of(framework, np.zeros(D, np.float32)), "double_pass")
    bounds = cuts(D, WORKERS)
    servers = [
        Workers(method, WORKERS, d=stop - start, name=f"weights/{j}")
        for j, (start, stop) in enumerate(bounds)
    ]
    for t, g in enumerate(gradients(WORKERS, 12)):
        pairs = zip(servers, bounds, strict=True)
        expected = np.concatenate([one.step(g[:, a:b], t)[1] for one, (a, b) in pairs])
        for direction in run_channels(ranks, g, t):
            message = f"takes another direction by a double pass of {framework} arrays (step {t})"
            require(_close(direction, expected, True), method, message)
    for rank, channel in enumerate(ranks):
        for piece, one in zip(channel.pieces(), servers, strict=True):
            same = memory(method, piece.channel.worker) == memory(method, one.states[rank])
            require(same, method, "remembers other numbers by a double pass than with a server")
        held = memory(method, channel.pieces()[rank].channel.server)
        same = held == memory(method, servers[rank].server)
        require(same, method, "remembers other numbers for its own slice than a server")


def _speaker(method: Method, group: Workers, g: np.ndarray, t: int) -> int:
    """A worker whose payload in step t is not absent."""
    states = enumerate(zip(group.states, g, strict=True))
    return next(
        rank
        for rank, (state, own) in states
        if not method.push(state, own.copy(), group.key(t, rank))[0].is_absent
    )


def _speaking(method: Method, ranks: Sequence[Channel], g: np.ndarray, t: int) -> int:
    """One of the ranks whose payload in step t is not absent."""
    if not ranks[0].exchange.compresses:
        return t % WORKERS
    speakers = []
    for rank, (channel, own) in enumerate(zip(ranks, g, strict=True)):
        last = channel.pieces()[-1]
        key = last.channel._key._replace(step=t)
        message, _ = method.push(last.channel.worker, own[last.start :].copy(), key)
        if not message.is_absent:
            speakers.append(rank)
    return speakers[t % len(speakers)]


def _remembered(method: Method, channel: Channel) -> list[dict[str, Any]]:
    """The error-feedback states of all pieces, of worker and server."""
    return [
        memory(method, state)
        for piece in channel.pieces()
        for state in (piece.channel.worker, piece.channel.server)
        if state is not None
    ]


def _same(ours: Workers, theirs: Workers) -> bool:
    """Whether the states of two groups are bitwise equal."""
    method = ours.method
    pairs = zip([*ours.states, ours.server], [*theirs.states, theirs.server], strict=True)
    return all(memory(method, a) == memory(method, b) for a, b in pairs)


def _close(got: np.ndarray | None, expected: np.ndarray | None, exact: bool) -> bool:
    """Bitwise equal, or not `exact`: equal up to the rounding of sums in another order."""
    if got is None or expected is None:
        return False
    if exact:
        return got.tobytes() == expected.tobytes()
    return bool(np.all(np.abs(got - expected) <= 1e-5 * np.abs(expected).max() + 1e-7))
