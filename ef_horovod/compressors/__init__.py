"""Compressors: one file a family. Importing this package registers every one of them."""

from ef_horovod.common.registry import import_all

import_all(__name__, list(__path__))
