"""Repeats our error message below a long traceback.

TensorFlow turns an error inside a graph into an error of another class and prints our message in
the middle of a long text.
"""

from __future__ import annotations

import sys
from types import TracebackType

_sentence, _always = "", False


def remember(sentence: str, *, whatever_is_raised: bool = False) -> None:
    """Print `ef_horovod: SENTENCE` as the last line if the process ends with an error.

    Args:
        sentence: message of an error that is about to be raised and that another error will quote.
        whatever_is_raised: print it even if the error does not quote it, because it is the cause.
    """
    global _sentence, _always
    if _sentence and _always:
        return  # later errors follow from this one
    if not _sentence:
        _print_after(sys.excepthook)
    _sentence, _always = sentence, whatever_is_raised


def _print_after(hook: object) -> None:
    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        hook(kind, error, traceback)  # type: ignore[operator]
        if _always or _sentence in str(error):
            print(f"ef_horovod: {_sentence}", file=sys.stderr, flush=True)

    sys.excepthook = excepthook
