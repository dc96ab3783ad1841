"""Tables of all registered compressors, methods and exchanges: their attributes and docstrings.

All rows come from the registries, so those of other packages are listed too.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.identity import Identity
from ef_horovod.compressors.randomk import RandomK
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.compressors.topk import TopK
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.methods.registry import METHODS
from ef_horovod.training.choice import choose

Row = list[str]
_NOTHING = "-"
_STEPS = 20
_USUAL = (  # an exchange's bytes are those of the first one that it carries
    NoFeedback(TopK(ratio=0.01), server_compressor=TopK(ratio=0.01)),
    NoFeedback(RandomK(ratio=0.01)),
    NoFeedback(Identity()),
)
_RANKS = (4, 64)


class Table(NamedTuple):
    """A table, with an explanation of its columns."""

    title: str
    about: str
    headers: Row
    rows: list[Row]
    widths: tuple[int, ...]  # of columns in a terminal, in characters


def page(what: Sequence[str], d: int, *, markdown: bool = False) -> str:
    """All tables as one text.

    Args:
        what: "compressors", "methods", "exchanges" or several of them.
        d: vector length for the sizes.
        markdown: True for a page of the documentation.

    Example:
        >>> "TopK(ratio=0.01)" in page(["compressors"], 1000)
        True
    """
    tables = [table for name in what for table in _TABLES[name](d)]
    if not markdown:
        return "\n\n".join(f"{t.title}\n\n{_text(t)}\n\n{_filled(t.about)}" for t in tables)
    parts = [_HEAD, *(f"## {t.title}\n\n{_filled(t.about)}\n\n{_markdown(t)}" for t in tables)]
    return "\n\n".join(parts)


_HEAD = """# Compressors, methods and exchanges

Made by `ef-horovod list --markdown > docs/compressors.md`; a test says when that is due. Without
`--markdown` the command prints to a terminal, and with `--import PACKAGE` it lists what a package
of yours registers. Bodies of payloads are in [wire-format.md](wire-format.md), methods with their
maths in [methods.md](methods.md)."""


def compressor_tables(d: int) -> list[Table]:
    """Guarantees of compressors, one row per example; their payloads, one row per class."""
    kinds = list(COMPRESSORS.values())
    numbers = Table(
        f"Compressors for {d:,} elements",
        "Bytes of a payload with its header (at least: where the number follows from the data). "
        "contraction: delta with E|C(x) - x|^2 <= (1 - delta) |x|^2, for every x; variance: omega "
        "with E|C(x) - x|^2 <= omega |x|^2, of the unbiased. allreducible: payloads may be summed "
        "in flight. exchange: what `auto` takes among few ranks.",
        [
            *("compressor", "bytes", "of float32", "contraction", "variance"),
            *("unbiased", "allreducible", "exchange"),
        ],
        [_compressor_row(example, d) for kind in kinds for example in kind.examples()],
        (64, 20, 12, 14, 10, 8, 8, 10),
    )
    words = Table(
        "What compressors send",
        "From their docstrings.",
        ["class", "what it does", "body of a payload", "source"],
        [_words(kind, ("Wire format:", "References:")) for kind in kinds],
        (17, 34, 44, 36),
    )
    return [numbers, words]


def method_tables(d: int) -> list[Table]:
    """Costs of methods, one row per example; their descriptions, one row per class."""
    kinds = list(METHODS.values())
    numbers = Table(
        f"Methods for {d:,} elements",
        "up: bytes of a worker's message, several where they differ between steps; down: of the "
        "answer that a parameter server would send "
        "each worker. Memory in vectors of that length, as remembered between steps + room to "
        "work in, for n workers; without a server each rank has both halves. exchange: what `auto` "
        "takes among few ranks.",
        ["method", "up", "down", "worker's memory", "aggregator's memory", "exchange"],
        [_method_row(method, d) for kind in kinds for method in examples_of(kind)],
        (75, 20, 12, 16, 20, 10),
    )
    words = Table(
        "What methods do",
        "From their docstrings; g is a worker's gradient, C the compressor.",
        ["class", "what it does", "source"],
        [_words(kind, ("References:",)) for kind in kinds],
        (24, 60, 50),
    )
    return [numbers, words]


def exchange_tables(d: int) -> list[Table]:
    """What exchanges carry and send, one row per exchange; their descriptions."""
    compressors = [c for kind in COMPRESSORS.values() for c in kind.examples()]
    methods = [m for kind in METHODS.values() for c in compressors for m in kind.examples(c)]
    numbers = Table(
        f"Exchanges for {d:,} elements",
        "compressors, methods: those whose payloads it carries, each in at least one combination. "
        "summed: float32 values are summed in flight. server: only in a job with parameter "
        "servers. bytes: sent by a rank per step, by method and number of ranks. hierarchical: "
        "sent by a node, by number of nodes. docs/cost-model.md has the formulas.",
        [
            *("exchange", "compressors", "methods", "summed", "server", "method of the bytes"),
            *(f"bytes, {ranks} ranks" for ranks in _RANKS),
        ],
        [_exchange_row(exchange, methods, d) for exchange in EXCHANGES.values()],
        (14, 24, 24, 6, 6, 36, 15, 15),
    )
    words = Table(
        "What exchanges do",
        "From their docstrings.",
        ["exchange", "what it does"],
        [[exchange.name, _words(type(exchange), ())[1]] for exchange in EXCHANGES.values()],
        (14, 100),
    )
    return [numbers, words]


_TABLES = {"compressors": compressor_tables, "methods": method_tables, "exchanges": exchange_tables}


def _compressor_row(compressor: Compressor, d: int) -> Row:
    nbytes, variance = compressor.nbytes(d), compressor.variance(d)
    return [
        repr(compressor),
        _bytes(nbytes, compressor.fixed_size),
        f"1/{4 * d / nbytes:,.1f}" if compressor.fixed_size else _NOTHING,
        _below_one(compressor.contraction(d)),
        _NOTHING if variance is None else f"{variance:.3g}",
        *("yes" if said else "no" for said in (compressor.unbiased, compressor.allreducible)),
        choose("auto", NoFeedback(compressor)).name,
    ]


def _method_row(method: Method, d: int) -> Row:
    x = np.zeros(d, np.float32)
    down = getattr(method, "server_compressor", None)
    return [
        repr(method),
        _message(method, x),
        f"{down.nbytes(d) if isinstance(down, Compressor) else 4 * d:,}",
        *(_memory(method, x, half) for half in (0, 1)),
        choose("auto", method).name,
    ]


def _exchange_row(exchange: Exchange, methods: Sequence[Method], d: int) -> Row:
    carried = [method for method in methods if exchange.fits(method)]
    sized = (m for m in (*_USUAL, *carried) if m.fixed_size and exchange.fits(m))
    example = next(sized, None)
    return [
        exchange.name,
        _out_of(COMPRESSORS, {type(method.compressor).__name__ for method in carried}),
        _out_of(METHODS, {type(method).__name__ for method in carried}),
        *("yes" if said else "no" for said in (exchange.sums, exchange.needs_server)),
        *_bytes_sent(exchange, example, d),
    ]


def _out_of(known: Iterable[str], chosen: set[str]) -> str:
    """Names out of the known ones, in their order, or the few that are left out."""
    names, others = ([n for n in known if (n in chosen) == there] for there in (True, False))
    if len(others) < len(names):
        return f"all but {', '.join(others)}" if others else "all"
    return ", ".join(names) or _NOTHING


def _bytes_sent(exchange: Exchange, method: Method | None, d: int) -> Row:
    if method is None:
        return [_NOTHING] * (1 + len(_RANKS))
    sent = (exchange.traffic(method, d, ranks).sent for ranks in _RANKS)
    return [repr(method), *(f"{nbytes:,.0f}" for nbytes in sent)]


def _message(method: Method, x: np.ndarray) -> str:
    """Bytes of a worker's payload; some methods send more in every few steps."""
    nbytes = method.compressor.nbytes(x.size)
    if not method.fixed_size:
        return f"{nbytes:,} or less" if method.compressor.fixed_size else _bytes(nbytes, False)
    sizes = sorted({method.skip(x, Key(step=step)).nbytes for step in range(_STEPS)})
    return " or ".join(f"{size:,}" for size in sizes)


def examples_of(kind: type[Method]) -> Sequence[Method]:
    """A method's examples with top-k, or with the first compressor that it accepts."""
    compressors = [c for other in COMPRESSORS.values() for c in other.examples()]
    for compressor in (TopK(ratio=0.01), Identity(), *compressors):
        examples = kind.examples(compressor)
        if examples:
            return examples
    return ()


def _memory(method: Method, x: np.ndarray, half: int) -> str:
    """Vectors in the state of a worker (half 0) or the aggregator (half 1): kept + scratch."""
    two, three = (_vectors(method, method.init(x, n)[half], x.size) for n in (2, 3))
    return " + ".join(
        _in_workers(at_two, at_three) for at_two, at_three in zip(two, three, strict=True)
    )


def _vectors(method: Method, state: Any, d: int) -> tuple[float, float]:
    kept = room = 0.0
    for name, value in state._asdict().items() if state is not None else ():
        parts = value if isinstance(value, tuple) else (value,)
        vectors = sum(part.size for part in parts if hasattr(part, "shape")) / d
        if name in method.scratch:
            room += vectors
        else:
            kept += vectors
    return kept, room


def _in_workers(at_two: float, at_three: float) -> str:
    """A number of vectors that is linear in the number of workers n, as text."""
    each = at_three - at_two
    constant = at_two - 2 * each
    if not each:
        return f"{constant:.3g}"
    factor = "n" if each == 1 else f"{each:.3g} n"
    return f"{factor} + {constant:.3g}" if constant else factor


def _bytes(nbytes: int, fixed_size: bool) -> str:
    return f"{nbytes:,}" if fixed_size else f"at least {nbytes:,}"


def _below_one(value: float | None) -> str:
    """delta as text; only a lossless compressor shows 1."""
    if value is not None and value < 1 and float(f"{value:.3g}") == 1:
        return f"1 - {1 - value:.1g}"
    return _NOTHING if value is None else f"{value:.3g}"


def _words(kind: type, sections: Iterable[str]) -> Row:
    """A class's name, the first paragraph of its docstring, and the given sections."""
    text = inspect.cleandoc(kind.__doc__ or _NOTHING)
    if text.startswith(f"{kind.__name__}("):  # the default docstring of a dataclass
        text = _NOTHING
    first = " ".join(text.partition("\n\n")[0].split()).rstrip(":")
    return [kind.__name__, first, *(_section(text, name) for name in sections)]


def _section(text: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\n((?: +.*\n?)+)", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else _NOTHING


def _filled(text: str) -> str:
    return textwrap.fill(text, 100)


def _text(table: Table) -> str:
    from tabulate import tabulate

    rows = [
        [textwrap.fill(cell, width) for cell, width in zip(row, table.widths, strict=True)]
        for row in table.rows
    ]
    multiline = any("\n" in cell for row in rows for cell in row)
    form = "simple_grid" if multiline else "simple"
    return tabulate(rows, table.headers, tablefmt=form, disable_numparse=True)


def _markdown(table: Table) -> str:
    from tabulate import tabulate

    rows = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in table.rows]
    return tabulate(rows, table.headers, tablefmt="github", disable_numparse=True)
