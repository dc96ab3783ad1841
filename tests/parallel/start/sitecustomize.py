"""What each process of these tests' jobs does first: it makes imports cheaper, half of a start.

Keras imports scikit-learn and matplotlib where they are installed. And the modules of a framework
are a million objects, which the garbage collector would look through again and again.
"""

import gc
import sys

gc.set_threshold(200_000, 20, 100)
for name in ("sklearn", "matplotlib"):
    sys.modules[name] = None  # type: ignore[assignment]  # importing it says that it is missing
