"""Error-feedback methods: one file each. Importing this package registers every one of them."""

from ef_horovod.common.registry import import_all

import_all(__name__, list(__path__))
