"""For type checkers and editors, which cannot know what registers itself; a test compares them."""

from ef_horovod import cost as cost
from ef_horovod import theory as theory
from ef_horovod.arrays.keys import Key as Key
from ef_horovod.compressors.base import Compressor as Compressor
from ef_horovod.compressors.base import Payload as Payload
from ef_horovod.compressors.cast import Cast as Cast
from ef_horovod.compressors.dithering import NaturalDithering as NaturalDithering
from ef_horovod.compressors.hardthreshold import HardThreshold as HardThreshold
from ef_horovod.compressors.identity import Identity as Identity
from ef_horovod.compressors.natural import Natural as Natural
from ef_horovod.compressors.onebit import OneBit as OneBit
from ef_horovod.compressors.onebit import OneBitBlocks as OneBitBlocks
from ef_horovod.compressors.qsgd import QSGD as QSGD
from ef_horovod.compressors.randomblock import RandomBlock as RandomBlock
from ef_horovod.compressors.randomk import RandomK as RandomK
from ef_horovod.compressors.randomsparsify import RandomSparsify as RandomSparsify
from ef_horovod.compressors.scaled import Scaled as Scaled
from ef_horovod.compressors.terngrad import TernGrad as TernGrad
from ef_horovod.compressors.then import Then as Then
from ef_horovod.compressors.topk import TopK as TopK
from ef_horovod.compressors.truncate_mantissa import TruncateMantissa as TruncateMantissa
from ef_horovod.errors import CollectiveTimeoutError as CollectiveTimeoutError
from ef_horovod.errors import ConfigMismatchError as ConfigMismatchError
from ef_horovod.errors import EFHorovodError as EFHorovodError
from ef_horovod.errors import NonFiniteError as NonFiniteError
from ef_horovod.errors import PayloadError as PayloadError
from ef_horovod.errors import UnsupportedError as UnsupportedError
from ef_horovod.methods.base import Method as Method
from ef_horovod.methods.doublesqueeze import DoubleSqueeze as DoubleSqueeze
from ef_horovod.methods.ef21 import EF21 as EF21
from ef_horovod.methods.ef21_plus import EF21Plus as EF21Plus
from ef_horovod.methods.error_compensated_x import ErrorCompensatedX as ErrorCompensatedX
from ef_horovod.methods.error_feedback import ErrorFeedback as ErrorFeedback
from ef_horovod.methods.estimators import IGT as IGT
from ef_horovod.methods.estimators import PAGE as PAGE
from ef_horovod.methods.estimators import ROOTSGD as ROOTSGD
from ef_horovod.methods.estimators import STORM as STORM
from ef_horovod.methods.estimators import Estimator as Estimator
from ef_horovod.methods.no_feedback import NoFeedback as NoFeedback
from ef_horovod.methods.perturbed import PerturbedCompressedSGD as PerturbedCompressedSGD
from ef_horovod.methods.powersgd import PowerSGD as PowerSGD
from ef_horovod.methods.schedules import Decay as Decay
from ef_horovod.simulation import Run as Run
from ef_horovod.simulation import simulate as simulate

__version__: str
