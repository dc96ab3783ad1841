"""Variance-reduced estimates that a worker sends instead of its gradient.

An estimator lists the points where it needs gradients on this step's sample, and combines them:

    A = estimator.combine([gradient(point) for point in estimator.points(x, before, t)], last, t)

All gradients of a step must be on the SAME sample. `ef.simulate(..., estimator=)` and
`ef.EstimatedGradient` (torch) do this. Estimators are pure and keep no state. Use those with an
alpha with `ErrorCompensatedX` and the same alpha, which averages
v_t = (1 - alpha_t) v_{t-1} + alpha_t A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ef_horovod.arrays import Array
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_number, keep_seed
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.schedules import Decay, Scheduled, keep_weight, value_at


@dataclass(frozen=True)
class Estimator:
    """A = the gradient: SGD, or momentum SGD if the method averages. Base of the others.

    Example:
        >>> Estimator().combine([3.0], None, 0)
        3.0
    """

    # Whether `combine` reads the worker's last estimate.
    needs_last: ClassVar[bool] = False

    def points(self, x: Array, before: Array, step: int) -> list[Array]:
        """Points where gradients on this step's sample are needed; if x is among them, it is first.

        Args:
            x: x_t.
            before: x_{t-1}; anything at step 0.
            step: t.
        """
        return [x]

    def combine(self, gradients: Sequence[Array], last: Array | None, step: int) -> Array:
        """A, the worker's input to the method.

        Args:
            gradients: at `points`, all on one sample.
            last: the worker's result of the last step, None at the first.
            step: t.
        """
        return gradients[0]

    def require_fit(self, method: Method) -> None:
        """Raise unless the method fits the estimator.

        Raises:
            UnsupportedError: it does not fit.
        """


@dataclass(frozen=True)
class STORM(Estimator):
    """A = (g_t - (1 - alpha_t) g_{t-1}) / alpha_t, both gradients on this step's sample.

    Averaged by `ErrorCompensatedX`, v_t = g_t + (1 - alpha_t) (v_{t-1} - g_{t-1}). At step 0,
    A = g_0.

    Args:
        alpha: the same as the method's.

    Raises:
        ValueError: alpha out of (0, 1].

    Example:
        >>> STORM(0.5).combine([3.0, 2.0], None, 1)
        4.0

    References:
        Cutkosky, Orabona: Momentum-Based Variance Reduction in Non-Convex SGD (NeurIPS 2019).
        Tang, Li, Liu, Yan: ErrorCompensatedX (NeurIPS 2021), for this form.
    """

    alpha: Scheduled = Decay(2 / 3)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        keep_weight(self, "alpha")

    def points(self, x: Array, before: Array, step: int) -> list[Array]:
        return [x] if step == 0 or value_at(self.alpha, step) == 1 else [x, before]

    def combine(self, gradients: Sequence[Array], last: Array | None, step: int) -> Array:
        if len(gradients) == 1:
            return gradients[0]
        alpha = value_at(self.alpha, step)
        return (gradients[0] - (1 - alpha) * gradients[1]) / alpha

    def require_fit(self, method: Method) -> None:
        if getattr(method, "alpha", None) != self.alpha:
            raise UnsupportedError(
                f"{self} got {method}, expected a method that averages with alpha={self.alpha}; "
                f"write for example ErrorCompensatedX(OneBit(), alpha={self.alpha})"
            )


@dataclass(frozen=True)
class ROOTSGD(STORM):
    """STORM with alpha_t = 1 / (t + 1).

    Example:
        >>> ROOTSGD()
        ROOTSGD(alpha=Decay(power=1.0, initial=1.0, offset=1.0))

    References:
        Li, Mou, Wainwright, Jordan: ROOT-SGD (COLT 2022).
    """

    alpha: Scheduled = Decay(1.0)  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class IGT(STORM):
    """A = the gradient at x_t + ((1 - alpha_t) / alpha_t) (x_t - x_{t-1}): implicit transport.

    Args:
        alpha: the same as the method's.

    Raises:
        ValueError: alpha out of (0, 1].

    Example:
        >>> IGT(0.5).points(3.0, 2.0, 1)
        [4.0]

    References:
        Arnold et al.: Reducing the Variance in Online Optimization by Transporting Past Gradients
        (NeurIPS 2019). Tang, Li, Liu, Yan: ErrorCompensatedX (NeurIPS 2021).
    """

    alpha: Scheduled = 0.1

    def points(self, x: Array, before: Array, step: int) -> list[Array]:
        alpha = value_at(self.alpha, step)
        return [x] if step == 0 or alpha == 1 else [x + ((1 - alpha) / alpha) * (x - before)]


@dataclass(frozen=True)
class PAGE(Estimator):
    """v = the full gradient with probability p, else v + g_t - g_{t-1} of one minibatch.

    One random draw per step decides for all workers, from seed and step. In a step with `whole(t)`,
    such as step 0, the sample must be all of the worker's data. With `EF21` without momentum, this
    is EF21-PAGE.

    Args:
        probability: of a full gradient, in (0, 1].
        seed: of the draws.

    Raises:
        ValueError: a probability out of range.

    Example:
        >>> page = PAGE(0.5)
        >>> [page.whole(t) for t in range(6)]
        [True, True, True, False, True, False]

    References:
        Li, Bao, Zhang, Richtarik: PAGE (ICML 2021), Algorithm 1. Fatkhullin et al.: EF21 with
        Bells & Whistles (2021), Table 2: EF21-PAGE.
    """

    needs_last: ClassVar[bool] = True
    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        way_out = "with batches of b out of m samples, b / (m + b) is usual"
        keep_number(self, "probability", "(0, 1]", way_out)
        keep_seed(self)

    def whole(self, step: int) -> bool:
        """Whether the sample of this step is all of the data; equal for all workers."""
        coin = Key(self.seed, step).apart(4).draw(shared=True) / 2.0**64
        return step == 0 or coin < self.probability

    def points(self, x: Array, before: Array, step: int) -> list[Array]:
        return [x] if self.whole(step) else [x, before]

    def combine(self, gradients: Sequence[Array], last: Array | None, step: int) -> Array:
        return gradients[0] if len(gradients) == 1 else last + gradients[0] - gradients[1]

    def require_fit(self, method: Method) -> None:
        for option in ("alpha", "momentum"):
            if getattr(method, option, None) is not None:
                raise UnsupportedError(
                    f"{self} got {method}, expected a method that does not average, because "
                    "the estimate changes by differences; write for example EF21(TopK(ratio=0.01))"
                )
