"""The sentence that matters, once more below a traceback of a hundred lines.

An error inside a graph comes out of TensorFlow as one of its own, with our sentence somewhere in
the middle of what it prints.
"""

from __future__ import annotations

import sys
from types import TracebackType

_sentence, _always = "", False


def remember(sentence: str, *, whatever_is_raised: bool = False) -> None:
    """Print `ef_horovod: SENTENCE` as the last line if the process ends with an error.

    Args:
        sentence: of an error that is about to be raised where another one will quote it.
        whatever_is_raised: print it even if the error does not quote it: it is the cause.
    """
    global _sentence, _always
    if _sentence and _always:
        return  # what comes after the end of all collectives follows from it
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
