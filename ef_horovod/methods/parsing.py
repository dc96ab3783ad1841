"""Reads and writes methods and compressors as text, for command lines and between ranks.

Accepts the form of `repr`, `EF21(TopK(ratio=0.01), momentum=0.1)`, and short forms, `topk:0.01` and
`ef21`. Only registered names are called, with numbers and strings; no other Python is evaluated.
"""

from __future__ import annotations

import ast
import math
from dataclasses import fields
from typing import Any

from ef_horovod.common.schedules import SCHEDULES
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.registry import METHODS


def read_compressor(text: str) -> Compressor:
    """Read a compressor from text.

    Raises:
        ValueError: no such compressor, or invalid arguments.

    Example:
        >>> read_compressor("topk:0.01"), read_compressor("OneBit(scale='l2')")
        (TopK(ratio=0.01), OneBit(scale='l2'))
    """
    found = _read(text)
    if not isinstance(found, Compressor):
        raise ValueError(f"got {text!r}, expected a compressor; write for example 'topk:0.01'")
    return found


def write_method(method: Method) -> str:
    """The method as text for `read_method`, with the fields that `repr` omits.

    Example:
        >>> import ef_horovod as ef
        >>> write_method(ef.PowerSGD(rank=2).for_shapes([(30, 40)]))
        'PowerSGD(rank=2, shapes=((30, 40),))'
    """
    shown, hidden = repr(method), [field.name for field in fields(method) if not field.repr]
    given = [(name, getattr(method, name)) for name in hidden]
    more = [f"{name}={value!r}" for name, value in given if value is not None]
    if not more:
        return shown
    return f"{shown[:-1]}{'' if shown.endswith('()') else ', '}{', '.join(more)})"


def read_method(
    text: str, compressor: Compressor | None = None, server_compressor: Compressor | None = None
) -> Method:
    """Read a method from text.

    Args:
        text: a complete method, or a name if the compressors are given separately.
        compressor: of the workers, unless the text has it.
        server_compressor: of the server, unless the text has it.

    Raises:
        ValueError: no such method, or invalid arguments.
        UnsupportedError: a combination that the method refuses.

    Example:
        >>> read_method("doublesqueeze", read_compressor("onebit"), read_compressor("topk:0.05"))
        DoubleSqueeze(OneBit(), server_compressor=TopK(ratio=0.05))
    """
    given = {"compressor": compressor, "server_compressor": server_compressor}
    options = {name: value for name, value in given.items() if value is not None}
    found = _read(text, options)
    if not isinstance(found, Method):
        raise ValueError(
            f"got {text!r}, expected a method; write for example 'EF21(TopK(0.01))', or one of "
            f"{', '.join(sorted(METHODS))} and a compressor"
        )
    return found


def _read(text: str, options: dict[str, Any] | None = None) -> Any:
    head, colon, tail = text.partition(":")
    short = colon and head.strip().isidentifier()  # else a colon within brackets
    written = f"{head}({tail})" if short else text
    try:
        if "\0" in text:  # Python up to 3.11.3 raises another error
            raise SyntaxError
        tree = ast.parse(written.strip(), mode="eval").body
        return _call(tree, options) if options else _value(tree)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(
            f"got {text!r}, expected a name with arguments; write for example 'EF21(TopK(0.01))'"
        ) from None


def _value(tree: ast.expr) -> Any:
    """The value of an expression; a bare name is called without arguments."""
    if isinstance(tree, ast.Name) and tree.id == "inf":  # as `repr` writes it
        return math.inf
    if isinstance(tree, (ast.Call, ast.Name)):
        return _call(tree)
    try:
        return ast.literal_eval(tree)
    except ValueError:
        raise ValueError(
            f"got {ast.unparse(tree)!r}, expected a number, a word in quotes, or a registered name "
            "with arguments in brackets"
        ) from None


def _call(tree: ast.expr, options: dict[str, Any] | None = None) -> Any:
    name = tree.func if isinstance(tree, ast.Call) else tree
    if not isinstance(name, ast.Name):
        raise ValueError(f"got {ast.unparse(tree)!r}, expected a name with arguments")
    kind = _known().get(name.id.lower())
    if kind is None:
        names = sorted({*METHODS, *COMPRESSORS})
        raise ValueError(f"got the name {name.id!r}, expected one of {', '.join(names)}")
    positional: list[Any] = []
    named = dict(options or {})
    if isinstance(tree, ast.Call):
        positional = [_value(part) for part in tree.args]
        for keyword in tree.keywords:
            named[keyword.arg or "**"] = _value(keyword.value)
    try:
        return kind(*positional, **named)
    except UnsupportedError:
        raise
    except TypeError as error:
        raise ValueError(
            f"got {ast.unparse(tree)!r}, expected arguments that {kind.__name__} takes: {error}"
        ) from None


def _known() -> dict[str, Any]:
    kinds: dict[str, Any] = {**METHODS, **COMPRESSORS, **SCHEDULES}
    return {name.lower(): kind for name, kind in kinds.items()}
