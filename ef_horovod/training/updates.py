"""What the adapters' `ef.CompressedUpdates` share.

A step of compressed updates, on each rank:

    all ranks agree that all gradients are finite, or leave the step out
    theta' = the rank's own optimizer, from theta and its own gradients
    theta  = theta + mean of what was sent of theta' - theta, by error feedback

The optimizer's state stays on its rank. An adapter adds how its framework takes the step and how
the change gets into the buckets. With H local steps per exchange:

    theta_r = H steps of the rank's own optimizer, from theta; those with NaNs are left out
    theta   = theta + mean of what was sent of theta_r - theta, or theta if any change has a NaN
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.errors import OutOfSyncError, UnsupportedError
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport


def refuse_for_updates(method: Method) -> None:
    """Raise for a method that cannot carry updates.

    Raises:
        UnsupportedError: it has momentum, or makes updates.
    """
    if method.replaces_optimizer:
        raise UnsupportedError(
            f"got {method!r} for updates, expected a method without momentum, because the inner "
            "optimizer has it; take ErrorFeedback(...), or ef.DistributedOptimizer with this method"
        )


def ask_all(transport: Transport, good: bool) -> Callable[[], bool]:
    """Start to ask all ranks whether all of them are good; returns a function that waits."""
    count = transport.allreduce(QUESTION, np.array([not good], np.float32))

    def answer() -> bool:
        bad: Array = count()
        return float(np.asarray(bad)[0]) == 0

    return answer


def require_exchanged(what: str, since: int, local_steps: int) -> None:
    """Raise between exchanges, when the ranks' parameters differ.

    Args:
        what: the user asked for.
        since: steps since the last exchange.
        local_steps: steps per exchange.
    """
    if since:
        raise RuntimeError(
            f"got {what} after {since} of {local_steps} local steps, expected it right after an "
            "exchange, because the ranks' parameters differ until then; call "
            "optimizer.exchange() before, on all ranks"
        )


def compare_since(transport: Transport, since: int) -> Callable[[], None]:
    """Start to compare the ranks' local steps before an exchange; returns a function that waits.

    Without it, an exchange of one rank would be taken for another one of the others.

    Raises:
        OutOfSyncError: by the function, on all ranks: they took different numbers of steps.
    """
    gathered = transport.allgather(SINCE, np.array([since], "<i8").view(np.uint8))

    def wait() -> None:
        everyones = [int(part.view("<i8")[0]) for part in gathered()]
        other = next((r for r, steps in enumerate(everyones) if steps != everyones[0]), None)
        if other is not None:
            raise OutOfSyncError(
                f"got an exchange after {everyones[0]} local steps on rank 0 and "
                f"{everyones[other]} on rank {other}, expected equally many on all ranks; call "
                "optimizer.exchange() on all ranks after the same step, and give all of them "
                "equally many batches"
            )

    return wait


class LocalPart(NamedTuple):
    """What a state says of local steps."""

    committed: int | None  # steps in all exchanges so far; None: of a state without this part
    since: int  # steps since the last one
    start: Mapping[str, Any]  # parameters after the last one, by name; empty right after it


def local_part(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], local_steps: int
) -> LocalPart:
    """The part of a state about local steps.

    Args:
        state: of `UpdateEngine.state_dict`, or a merged one.
        shapes: of all parameters here, by name.
        local_steps: here.

    Raises:
        ValueError: it is between exchanges, and of other parameters or for single steps.
    """
    part = state.get("local", {})
    found = LocalPart(part.get("committed"), part.get("since", 0), part.get("start", {}))
    if found.since and local_steps == 1:
        raise ValueError(
            f"got a compression state after {found.since} local steps, expected one right after an "
            "exchange for local_steps=1; pass the local_steps= of the job that saved it, or "
            "call optimizer.exchange() before it is saved"
        )
    theirs = {name: tuple(value.shape) for name, value in found.start.items()}
    if found.since and theirs != shapes:
        raise ValueError(
            f"got a compression state after {found.since} local steps of {len(theirs)} parameters, "
            f"expected the names and shapes of the {len(shapes)} here; load it into the same model"
        )
    return found


def count_local_steps(
    counters: ChannelStats, before: ChannelStats, since: int, left_out: int
) -> None:
    """Count an exchange as the local steps that it stands for, taken or dropped.

    Args:
        counters: after the exchange, which counted it as one step.
        before: the same before it.
        since: steps since the last exchange.
        left_out: those of them that this rank left out, which are counted already.
    """
    more = since - left_out - 1
    if counters.steps > before.steps:
        counters.steps += more
    else:
        counters.skipped += more
    dense = counters.dense_bytes_out - before.dense_bytes_out
    counters.dense_bytes_out += dense * (since - 1)


QUESTION, SINCE = "updates.bad", "updates.since"  # names of collectives
