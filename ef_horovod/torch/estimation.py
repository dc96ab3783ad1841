"""`ef.EstimatedGradient`: variance-reduced gradient estimates in a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.estimators import Estimator
from ef_horovod.training.buckets import own_methods

Vectors = list[torch.Tensor]
_KINDS = ("now", "before", "newest", "last")


class EstimatedGradient:
    """Replaces `loss.backward()`: puts an estimator's A into `p.grad`.

    `backward(closure)` calls the closure once per point at which the estimator needs a gradient.
    Each call has the parameters moved to that point, and the same random numbers (dropout). The
    sample must be the same too. Then one backward pass delivers A to `ef.DistributedOptimizer`.
    The exchange cannot overlap with the computation. Buffers, such as batch normalisation's
    averages, are updated by every call. Two copies of the parameters are kept.

    Args:
        estimator: such as STORM(alpha), with the alpha of the optimizer's `ErrorCompensatedX`.
        optimizer: the result of `ef.DistributedOptimizer`, on at least two ranks.

    Raises:
        UnsupportedError: the optimizer is not wrapped, its method does not fit the estimator, or
            an estimator that builds on its last estimate (PAGE) gets accumulated or scaled
            gradients.

    Example:
        alpha, c = ef.Decay(2 / 3), ef.OneBit()
        optimizer = ef.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(),
            compression=ef.ErrorCompensatedX(c, server_compressor=c, alpha=alpha))
        estimate = ef.EstimatedGradient(ef.STORM(alpha), optimizer)
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss = estimate.backward(lambda: cross_entropy(model(inputs), labels))
            optimizer.step()
    """

    def __init__(self, estimator: Estimator, optimizer: Any) -> None:
        if not isinstance(estimator, Estimator):
            raise UnsupportedError(
                f"EstimatedGradient got {type(estimator).__name__} as estimator, expected one such "
                "as STORM(alpha), and the optimizer second; write EstimatedGradient(STORM(alpha), "
                "optimizer)"
            )
        engine = getattr(optimizer, "_engine", None)
        if engine is None:
            raise UnsupportedError(
                f"EstimatedGradient got {type(optimizer).__name__} without an exchange, expected "
                "what ef.DistributedOptimizer returns on at least two ranks: the method averages "
                "there; start the job with horovodrun -np 2"
            )
        options, scaled = engine.options, engine.scaler is not None
        for method in (options.method, *own_methods(engine.buckets, options.method).values()):
            estimator.require_fit(method)
        if estimator.needs_last and (options.passes > 1 or scaled):
            raise UnsupportedError(
                f"{estimator} got backward_passes_per_step={options.passes} and "
                f"grad_scaler={scaled}, expected 1 and none, because it builds on its last "
                "estimate as it was delivered; leave them out"
            )
        self.estimator, self._engine = estimator, engine
        self._parameters: Vectors = [p for p, _ in engine.named_parameters()]
        self._names = [name for _, name in engine.named_parameters()]
        self._step = -1  # of the last call
        self._now: Vectors | None = None  # x as of the last call
        self._before: Vectors | None = None  # x one step earlier
        self._newest: Vectors | None = None  # the estimate of the last call
        self._last: Vectors | None = None  # the estimate of the step before

    def backward(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Estimate the gradient of the closure's loss; returns the loss, without a graph.

        As with `loss.backward()`, call this backward_passes_per_step times per step.

        Args:
            closure: computes the loss of this step's sample, multiplied by the loss scale if any.
        """
        if not callable(closure):
            raise UnsupportedError(
                f"backward() got {type(closure).__name__}, expected a function that computes the "
                "loss, because it is called at several points; write "
                "backward(lambda: loss_of(batch))"
            )
        step = self._engine.step
        if step != self._step:  # a dropped step is repeated, with the same points
            self._step, self._before, self._last = step, self._now, self._newest
            with torch.no_grad():
                self._now = [p.clone() for p in self._parameters]
        loss, gradients = self._gradients(closure, step)
        estimates = self._combine(gradients, step)
        if self.estimator.needs_last:
            self._newest = estimates
            estimates = [estimate.clone() for estimate in estimates]  # p.grad may alias them
        # backward() of a leaf accumulates the given gradient and runs the hooks.
        torch.autograd.backward(self._parameters, estimates)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State for the next step; save it with the optimizer's error-feedback state."""
        held = {kind: getattr(self, f"_{kind}") for kind in _KINDS}
        vectors = {
            kind: dict(zip(self._names, values, strict=True))
            for kind, values in held.items()
            if values is not None
        }
        return {"step": self._step, **vectors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`, from between two steps on this rank of an equal job."""
        self._step = state["step"]
        for kind in _KINDS:
            vectors = state.get(kind)
            loaded = vectors and [
                vectors[name].to(p, copy=True)
                for name, p in zip(self._names, self._parameters, strict=True)
            ]
            setattr(self, f"_{kind}", loaded)

    def _gradients(
        self, closure: Callable[[], torch.Tensor], step: int
    ) -> tuple[torch.Tensor, list[Vectors]]:
        """The loss, and gradients of all parameters at each point."""
        assert self._now is not None
        before = self._before or self._now
        points = [
            self.estimator.points(x, x_before, step)
            for x, x_before in zip(self._now, before, strict=True)
        ]
        losses, gradients = [], []
        with _same_draws() as rewind:
            for point in zip(*points, strict=True):
                rewind()
                with self._moved_to(point):
                    loss = closure()
                    found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
                losses.append(loss.detach())
                gradients.append(
                    [
                        torch.zeros_like(p) if g is None else g.detach()
                        for p, g in zip(self._parameters, found, strict=True)
                    ]
                )
        return losses[0], gradients

    def _combine(self, gradients: list[Vectors], step: int) -> Vectors:
        last: Any = self._last or [None] * len(self._parameters)
        return [
            self.estimator.combine(list(at_points), mine, step)
            for at_points, mine in zip(zip(*gradients, strict=True), last, strict=True)
        ]

    @contextmanager
    def _moved_to(self, point: tuple[torch.Tensor, ...]) -> Iterator[None]:
        """Inside, the parameters are at another point."""
        assert self._now is not None
        try:
            self._write(point)
            yield
        finally:
            self._write(self._now)

    def _write(self, values: Any) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)


@contextmanager
def _same_draws() -> Iterator[Callable[[], None]]:
    """Yields a function that resets torch's random generators to their state on entry."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    cpu, gpus = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in devices]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in zip(devices, gpus, strict=True):
            torch.cuda.set_rng_state(state, device)

    yield rewind
