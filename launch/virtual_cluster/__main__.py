"""`launch/cluster` by the Python that runs this: `python launch/virtual_cluster --hosts 2 -- true`.

Benchmarks and tests start clusters this way, so that hosts run in their own environment.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder here; the package lies in the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from virtual_cluster.command import main

    sys.exit(main())
