"""Errors that end an experiment with one sentence."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """An experiment cannot run; the message says why, and the way out."""


class DataNotFound(Refused, FileNotFoundError):
    """The data are not in the folder; the message says where to get them."""


@contextmanager
def reading(what: object, where: str) -> Iterator[None]:
    """For a block that reads data: a damaged file is refused, with the place to get it from."""
    try:
        yield
    except Refused:
        raise
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise Refused(
            f"got {what}, which cannot be read ({said}), expected it complete: get it again from "
            f"{where}"
        ) from error
