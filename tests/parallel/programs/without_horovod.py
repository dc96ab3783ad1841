"""Makes every import of Horovod fail in the program that imports this first."""

from __future__ import annotations

import sys

sys.modules.update(dict.fromkeys(("horovod", "horovod.torch", "horovod.common")))
