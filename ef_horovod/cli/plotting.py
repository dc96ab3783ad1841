"""What the plots of reports share."""

from __future__ import annotations

from typing import Any

from ef_horovod.errors import UnsupportedError

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, without a window.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "there is no matplotlib in this environment, expected it for the plot; install it by "
            "`pip install matplotlib`"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
