"""`python -m ef_horovod` is the `ef-horovod` command."""

from __future__ import annotations

import sys

from ef_horovod.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
