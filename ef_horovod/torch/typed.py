"""Static type of the result of `ef.DistributedOptimizer`; never instantiated.

At run time, the result's class is a subclass of the wrapped optimizer's class with the same
methods.
"""

from __future__ import annotations

import torch

from ef_horovod.torch.optimizer import _Distributed


class WrappedOptimizer(_Distributed, torch.optim.Optimizer):
    """A torch optimizer with the added methods: `synchronize`, `stats`, ..."""
