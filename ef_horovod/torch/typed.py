"""Static types of the results of `ef.DistributedOptimizer` and `ef.CompressedUpdates`; never
instantiated.

At run time, a result's class is a subclass of the wrapped optimizer's class with the same methods.
"""

from __future__ import annotations

import torch

from ef_horovod.torch.optimizer import _Distributed
from ef_horovod.torch.updates import _Updating


class WrappedOptimizer(_Distributed, torch.optim.Optimizer):
    """A torch optimizer with the added methods: `synchronize`, `stats`, ..."""


class UpdatingOptimizer(_Updating, torch.optim.Optimizer):
    """A torch optimizer with the added methods: `stats`, `compression_state_dict`, ..."""
