"""Elastic jobs: an optimizer's error-feedback state where ranks come and go.

Horovod restarts in the same process after each change. `hvd.elastic.TorchState` calls a handler for
the optimizer: `save` at a commit, `restore` after a failure, `sync` after a restart.

    commit     all ranks merge their state; each one keeps the result
    sync       all ranks load the merged state of rank 0, which belongs to rank 0's model

So committed state is never lost, not even that of a rank that is. Without a commit in the same step
(`check_host_updates()` alone), the ranks that are left merge their state in `sync`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch.elastic import state as horovods

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.torch.engine import Engine
from ef_horovod.training.merging import keeps_alone, merge, merged_lengths
from ef_horovod.training.saving import from_rank_0
from ef_horovod.training.state import is_merged
from ef_horovod.training.state_file import pack, unpack
from ef_horovod.transports.base import Transport


def refuse_fixed(method: Method, exchange: str, process_set: Any, transport: Any) -> None:
    """Raise for options of an elastic job that need a fixed set of ranks.

    Raises:
        UnsupportedError: there is one.
    """
    method.require_mergeable()
    fixed = exchange.startswith(("hierarchical", "server", "auto:"))
    other = "a process_set" if process_set is not None else f"transport={transport!r}"
    if fixed or process_set is not None or transport not in (None, "horovod"):
        got = f"exchange={exchange!r}" if fixed else other
        raise UnsupportedError(
            f"got {got} in an elastic job, expected an exchange for any ranks that come and go; "
            "take 'auto', 'gather', 'reduce' or 'double_pass' over all ranks, or start the job "
            "with horovodrun -np N"
        )


class Elastic:
    """Takes an engine from one set of ranks to the next.

    Args:
        engine: of the wrapped optimizer.
        reopen: makes the transport between the present ranks, under the same names.
    """

    def __init__(self, engine: Engine, reopen: Callable[[], Transport]) -> None:
        self._engine, self._reopen = engine, reopen
        # {}: as at the beginning. None: a commit failed, and no step was taken since.
        self._committed: dict[str, Any] | None = {}
        self._rolled_back = False
        engine.is_stale = self._is_stale
        engine.has_newcomers = True

    def _is_stale(self) -> bool:
        # If hosts only left, Horovod restarts without `sync`.
        return bool(hvd.size() != self._engine.transport.size)

    def commit(self) -> None:
        """Keep the merged state of all ranks; collective."""
        self.follow()
        if self._is_known():
            return
        try:
            self._committed = self._engine.merged_state_dict()
        except HorovodInternalError:
            # The rest of the commit is done, so do not break it off: the next collective fails
            # too. What the ranks hold now is the state of this commit.
            self._committed = None

    def take(self, state: dict[str, Any]) -> None:
        """Note that the engine has loaded this merged state."""
        self._committed = state if is_merged(state) else None

    def roll_back(self) -> None:
        """Return to the last commit, in the next `sync`."""
        self._rolled_back = True

    def follow(self) -> None:
        """`sync` if the ranks are others than in the last step."""
        if self._is_stale():
            self.sync()

    def sync(self) -> None:
        """Begin anew between the present ranks, with the state that they have; collective."""
        engine, transport = self._engine, self._reopen()
        state = self._state_of_rank_0(transport)
        engine.renew(transport)
        if state and state["parameters"]:
            engine.load_state_dict(state)
        elif state:  # a rank that is gone had a part of it, so it starts from zero
            engine.step = state["step"]
        self._committed, self._rolled_back = state, False

    def _is_known(self) -> bool:
        """Whether the committed state is the present one: only steps change it."""
        return self._committed is not None and self._committed.get("step", 0) == self._engine.step

    def _state_of_rank_0(self, transport: Transport) -> dict[str, Any]:
        engine, state = self._engine, self._committed
        known = self._is_known() or (self._rolled_back and state is not None)
        lengths = [] if known else merged_lengths(engine.buckets)
        plan = {"committed": known, "step": engine.step, "lengths": lengths}
        told = unpack(from_rank_0(transport, pack(plan)), "rank 0's plan")
        if not told["committed"]:
            state = self._merged_by_survivors(transport, told)
        return unpack(from_rank_0(transport, pack(state or {})), "rank 0's state")

    def _merged_by_survivors(self, transport: Transport, told: dict[str, Any]) -> dict[str, Any]:
        """The state of the ranks that were in rank 0's last step."""
        engine = self._engine
        survived, ranks = engine.step == told["step"], engine.transport.size
        flag = np.array([survived], np.float32)
        left = round(float(np.asarray(transport.allreduce("survivors", flag)())[0]))
        if not survived:
            for i, length in enumerate(told["lengths"]):
                transport.allreduce(f"merge.{i}", np.zeros(length, np.float64))()
            return {}
        parameters = merge(engine.buckets, transport, weight=ranks / left)
        lost = left < ranks
        if lost and transport.rank == 0:
            warnings.warn(
                f"got {left} of {ranks} ranks after step {told['step']}, which is not committed, "
                "expected a commit before ranks leave: what they had not sent is lost, and the "
                "mean of the others' error-feedback state takes its place (state that one rank "
                "keeps for all starts from zero); call state.commit() in place of "
                "state.check_host_updates()",
                stacklevel=2,
            )
        state = engine.describe_merged(parameters)
        if lost and keeps_alone(engine.buckets):
            state["parameters"] = {}
        return state


class _Wrapped(type):
    """Of a type whose instances are the optimizers of elastic jobs."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(getattr(instance, "_elastic", None), Elastic)


class ElasticOptimizer(metaclass=_Wrapped):
    """For `isinstance` in Horovod's registry of handlers."""


class Handler(horovods.OptimizerStateHandler):
    """What `hvd.elastic.TorchState` calls for a wrapped optimizer."""

    def save(self) -> None:
        super().save()
        self.value._elastic.commit()

    def restore(self) -> None:
        super().restore()
        self.value._elastic.roll_back()

    def sync(self) -> None:
        # A rank without optimizer state takes a step to get one, which weight decay makes felt.
        parameters = [p for group in self.value.param_groups for p in group["params"]]
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            super().sync()
            for p, values in zip(parameters, before, strict=True):
                p.copy_(values)
        self.value._elastic.sync()
        self.value._synchronized, self.value.rounds = False, self.value._engine.step

    def set_value(self, value: Any) -> None:
        self.value = value
        super().save()  # not collective


def register() -> None:
    """Let `hvd.elastic.TorchState` take our handler for wrapped optimizers."""
    registry = horovods.get_handler_registry()
    if all(kind is not ElasticOptimizer for kind, _ in registry):
        horovods.set_handler_registry([(ElasticOptimizer, Handler), *registry])
