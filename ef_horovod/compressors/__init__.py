"""Compressors, one file per family. Importing this package registers all of them."""

from ef_horovod.common.registry import import_all

import_all(__name__, list(__path__))
