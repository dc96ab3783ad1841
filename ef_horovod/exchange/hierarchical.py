"""Exchange "hierarchical": the ranks of a node sum their gradients, and nodes exchange payloads.

    start      reduce-scatter within the node: each rank gets one slice of the node's gradient
    relay      compress the slice; another exchange between the ranks with the same slice
    agreed     within the node: are the other slices good, too?
    share      aggregate the slice; all-gather of the slices within the node

The method sees one worker per node. So a node sends as much as one rank would, whatever the number
of its ranks. They share the compression, and each has the error-feedback state of one slice. The
exchange between nodes is any other one: "hierarchical:double_pass". With "hierarchical:server",
a parameter server hears one worker per node.

With different numbers of ranks on the nodes, slices have no counterparts. The first rank of each
node then has the whole vector. In all cases the aggregated gradient is the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.errors import EFHorovodError, NonFiniteError, UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel, Piece, Span
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.exchange.double_pass import cuts
from ef_horovod.exchange.network import Work
from ef_horovod.exchange.registry import EXCHANGES, exchange_of, register_exchange, usual_exchange
from ef_horovod.exchange.stats import Counted
from ef_horovod.exchange.traffic import Traffic
from ef_horovod.methods.base import Method
from ef_horovod.methods.parsing import write_method
from ef_horovod.transports.base import Transport
from ef_horovod.transports.nodes import Levels


@register_exchange
class Hierarchical(Exchange):
    """Sums within a node, and another exchange between nodes.

    Args:
        inner: between nodes; None for the usual one of the method: "reduce" or "gather".
    """

    name = "hierarchical"
    by_node = True

    def __init__(self, inner: Exchange | None = None) -> None:
        self._inner = inner
        if inner is not None:
            self.name = f"hierarchical:{inner.name}"
            self.needs_server = inner.needs_server

    @property
    def has_inner(self) -> bool:
        """Whether the exchange between nodes was named."""
        return self._inner is not None

    def with_inner(self, name: str) -> Exchange:
        allowed = [e.name for e in EXCHANGES.values() if e.compresses and not e.by_node]
        if name not in allowed:
            raise ValueError(
                f"got exchange='hierarchical:{name}', expected one between nodes that sends "
                f"payloads after the colon, one of {allowed}; write 'hierarchical' alone for the "
                "cheapest, or import the module that registers yours on all ranks"
            )
        return Hierarchical(exchange_of(name))

    def inner(self, method: Method) -> Exchange:
        """The exchange between nodes."""
        return self._inner or usual_exchange(method)

    def require_fit(self, method: Method) -> None:
        if not method.sliceable:
            raise UnsupportedError(
                f"got exchange={self.name!r} with {method}, expected a method that works on a "
                "slice of a vector as on any other, but this one looks at whole matrices; use "
                "exchange='auto'"
            )
        if self._inner is not None and not self._inner.fits(method):
            what = "messages that can be summed" if self._inner.sums else "messages that it carries"
            raise UnsupportedError(
                f"got exchange={self.name!r} with {method}, expected a method with {what}; write "
                f"'hierarchical:{usual_exchange(method).name}', or 'hierarchical' alone"
            )

    def on(self, transport: Transport, method: Method) -> Exchange:
        if levels_of(transport, self.name) is None:
            return self.inner(method)
        return Hierarchical(self.inner(method))

    def in_dense_steps(self, method: Method, *, in_graph: bool = False) -> Exchange | None:
        if method == UNCOMPRESSED and not in_graph:
            return None
        # The pieces have to be the same.
        return self if self.inner(method).has_answers else Hierarchical()

    def open(
        self, name: str, like: Array, method: Method, transport: Transport, *, seed: int = 0
    ) -> Channel:
        way = self.on(transport, method)
        if not isinstance(way, Hierarchical):
            return way.open(name, like, method, transport, seed=seed)
        return NodeChannel(name, like, method, transport, way, seed=seed)

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        """Of a node with all its ranks; n is the number of nodes."""
        return self.inner(method).traffic(method, d, n)

    def work(self, work: Work, n: int) -> tuple[float, float]:
        raise UnsupportedError(
            f"got exchange={self.name!r} for one rank's work, expected an exchange of one level, "
            "because the rest depends on the ranks of a node; take ef.cost.step_cost"
        )


def between_nodes() -> list[Exchange]:
    """The exchanges that can be the one between nodes, in jobs without servers."""
    return [e for e in EXCHANGES.values() if e.compresses and not e.needs_server and not e.by_node]


def levels_of(transport: Transport, exchange: str) -> Levels | None:
    """A transport's levels, for an exchange as users write it; collective at the first call.

    Raises:
        ConfigMismatchError: a rank has another exchange.
        UnsupportedError: the groups of ranks cannot be made.
    """
    if not transport.levels_known:
        # A rank with another exchange compares its config next, under the same name.
        require_same_config(transport, [f"exchange={exchange!r}, with groups of ranks first,"])
    return transport.levels()


class _Names(NamedTuple):
    """Names of a channel's collectives within the node."""

    sum: str
    good: str
    slices: str


class NodeChannel(Channel):
    """A channel whose vector is summed within a node; a slice of it has a channel between nodes.

    The inner channel is that of a job with one rank per node, named "NAME.slice.j". The draws
    of random compressors depend on the name. Bytes are those between nodes.
    """

    exchange: Hierarchical

    def _open(self, seed: int) -> tuple[Any, Any]:
        levels = self._transport.levels()
        assert levels is not None
        self._levels: Levels = levels
        d, ranks = self.gradient.shape[0], levels.node.size
        shares = cuts(d, levels.slices)
        self._slices = shares + [(d, d)] * (ranks - len(shares))
        self._start, self._stop = self._slices[levels.node.rank]
        self._inner: Channel | None = None
        inner = self.exchange.inner(self.method)
        if inner.needs_server:
            lengths = [stop - start for start, stop in shares]
            method = write_method(self.method)
            self._transport.open_slices(self.slice_name, lengths, method, seed)
        if levels.cross is not None:
            self._inner = inner.open(
                self.slice_name(levels.node.rank),
                self.gradient[self._start : self._stop],
                self.method,
                levels.cross,
                seed=seed,
            )
        self.names = _Names(f"{self.name}.sum", f"{self.name}.good", f"{self.name}.slices")
        self._step = 0
        self._relayed = False
        self._failed: Exception | None = None
        return None, None  # the inner channel has the states

    def slice_name(self, j: int) -> str:
        """The name of slice j's channel between nodes."""
        return f"{self.name}.slice.{j}"

    def forget(self) -> None:
        self._undo = None
        if self._inner is not None:
            self._inner.forget()

    @property
    def sums(self) -> bool:
        return self.exchange.inner(self.method).sums

    @property
    def levels(self) -> Levels:
        """The transports within the node and between nodes."""
        return self._levels

    @property
    def inner(self) -> Channel | None:
        """The slice's channel between nodes; None for a rank without a slice."""
        return self._inner

    def pieces(self) -> list[Piece]:
        if self._inner is None:
            return []
        return [
            Piece(f"slice.{self._levels.node.rank}.{name}", self._start + start, channel)
            for name, start, channel in self._inner.pieces()
        ]

    def start(self, step: int) -> None:
        self._begin()
        self._step, self._relayed = step, False
        node = self._levels.node
        self._finish = node.reduce_scatter(self.names.sum, self.gradient, self._slices)

    def relay(self) -> None:
        if self._relayed:  # a graph does so bucket by bucket
            return
        assert self._finish is not None, f"{self.name} was not started"
        with self._timed("seconds_wait"):
            total = self._finish()
        self._finish, self._relayed = None, True
        if self._inner is None:
            return
        with self._timed("seconds_compress"), self._counted():
            # So the mean over nodes is the mean over ranks.
            self._xp.divide(total, self._levels.per_node, out=self._inner.gradient)
            self._inner.start(self._step)

    def arrived(self) -> bool:
        good = True
        if self._inner is not None:
            with self._timed("seconds_wait"), self._counted():
                self._inner.relay()
                good = self._inner.arrived() and self._inner.agreed()
            cross, own = self._levels.cross, self._stop - self._start
            assert cross is not None
            self._stats.dense_bytes_out += cross.dense_nbytes(4 * own)
        flag = np.array([good], np.uint8)
        self._finish = self._levels.node.allgather(self.names.good, flag)
        return good

    def agreed(self) -> bool:
        assert self._finish is not None, f"{self.name} has not arrived"
        with self._timed("seconds_wait"):
            flags = self._finish()
        self._finish = None
        return all(flag[0] for flag in flags)

    def keep_undo(self) -> None:
        super().keep_undo()
        if self._inner is not None:
            self._inner.keep_undo()

    def undo(self) -> None:
        super().undo()
        if self._inner is not None:
            self._inner.undo()

    def reply(self) -> None:
        if self._inner is not None:
            with self._counted():
                self._inner.reply()

    def share(self) -> None:
        if self._finish is not None:  # a graph has done so
            return
        part = self.gradient[self._start : self._stop]
        try:
            if self._inner is not None:
                with self._timed("seconds_decompress"), self._counted():
                    self._inner.share()
                    part = self._inner.commit()
        except EFHorovodError as error:  # this node's other ranks wait for the slice
            self._failed = error
            self._xp.fill(part, float("nan"))
        node = self._levels.node
        self._finish = node.gather_slices(self.names.slices, part, self._slices)

    def commit(self) -> Array:
        """As in `Channel`.

        Raises:
            NonFiniteError: on all ranks, if a slice could not be aggregated.
        """
        self.share()
        assert self._finish is not None
        with self._timed("seconds_wait"):
            whole = self._finish()
        self._finish = None
        if self._failed is not None:
            raise self._failed
        for j, (start, stop) in enumerate(self._slices):
            if start < stop and np.isnan(float(whole[start])):
                raise NonFiniteError(
                    f"slice {j} of '{self.name}' was not aggregated on rank "
                    f"{self._levels.node.members[j]}, expected finite numbers; see what that rank "
                    "said, or lower the learning rate or the loss scale"
                )
        self._stats.steps += 1
        return whole

    def drop(self) -> None:
        if self._inner is not None:
            self._inner.drop()
        super().drop()

    def squared_norms(self) -> tuple[float, float] | None:
        return None if self._inner is None else self._inner.squared_norms()

    def measure(self, spans: Sequence[Span]) -> None:
        """As in `Channel`. Each span is cut to this rank's slice."""
        if self._inner is not None:
            self._inner.measure(
                [(self._within(start), self._within(stop)) for start, stop in spans]
            )

    def _within(self, place: int) -> int:
        return min(max(place, self._start), self._stop) - self._start

    def measured(self) -> list[tuple[float, float]]:
        """As in `Channel`; the gradient is the node's."""
        return [] if self._inner is None else self._inner.measured()

    def _counted(self) -> Counted:
        return Counted(self._stats, self._levels.cross or self._levels.node)
