"""What type checkers take the result of `ef.DistributedOptimizer` for; nobody makes one of these.

At run time it is of a subclass of the wrapped optimizer's class that has the same methods.
"""

from __future__ import annotations

import torch

from ef_horovod.torch.optimizer import _Distributed


class WrappedOptimizer(_Distributed, torch.optim.Optimizer):
    """A torch optimizer with the methods that the wrapping adds: `synchronize`, `stats`, ..."""
