"""For type checkers and editors; a test compares it with the module."""

from ef_horovod import *  # noqa: F403
from ef_horovod.torch.compression import Compression as Compression
from ef_horovod.torch.ddp import ddp_hook as ddp_hook
from ef_horovod.torch.estimation import EstimatedGradient as EstimatedGradient
from ef_horovod.torch.log import TrainingLog as TrainingLog
from ef_horovod.torch.optimizer import DistributedOptimizer as DistributedOptimizer
from ef_horovod.torch.sync import require_in_sync as require_in_sync
from ef_horovod.torch.updates import CompressedUpdates as CompressedUpdates
from ef_horovod.training.policies import by_name as by_name
from ef_horovod.training.policies import dense_below as dense_below
from ef_horovod.training.policies import dense_unless_smaller as dense_unless_smaller
from ef_horovod.training.policy import small_or_vector as small_or_vector
from ef_horovod.training.saving import load as load
from ef_horovod.training.saving import save as save
from ef_horovod.transports.torch_distributed import TorchDistributed as TorchDistributed
