"""Options of commands. Only the standard library: `--help` of launch/ needs no installation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def argument(read: Callable[[str], _T]) -> Callable[[str], _T]:
    """An argparse type from a function of a text; argparse shows its error's message.

    argparse shows the message of an `ArgumentTypeError` only. For a ValueError it shows the name of
    the function.

    Args:
        read: raises ValueError for a text that it does not accept.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--workers", type=argument(int))
        >>> parser.parse_args(["--workers", "4"]).workers
        4
    """

    def convert(text: str) -> _T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
