"""Runs one of the torch examples, then compares the model's parameters on all ranks.

equal_after.py FILE
"""

import runpy
import sys

import horovod.torch as hvd
from digest import require_equal

model = runpy.run_path(sys.argv[1])["model"]
values = [parameter.detach().numpy() for parameter in model.parameters()]
require_equal(values, hvd.allgather_object, hvd.rank())
