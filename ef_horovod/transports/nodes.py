"""The two levels of a job with several ranks on a node: within a node, and between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ef_horovod.errors import UnsupportedError

if TYPE_CHECKING:
    from ef_horovod.transports.base import Transport


class Levels(NamedTuple):
    """This rank's transports to the ranks of its node, and to those of the other nodes.

    With equally many ranks r on all nodes, each vector is cut into r slices, one per local rank.
    Otherwise the first rank of each node has the whole vector.
    """

    node: Transport  # to the ranks of this node
    cross: Transport | None  # to one rank of each node; None: this rank has no slice
    slices: int  # per node
    per_node: float  # ranks on a node, mean over nodes


class Groups(NamedTuple):
    """The ranks of each level."""

    nodes: list[list[int]]
    cross: list[list[int]]  # by slice

    @property
    def all(self) -> list[list[int]]:
        """All groups of more than one rank."""
        return [group for group in [*self.nodes, *self.cross] if len(group) > 1]


def groups_of(nodes: Sequence[object], *, one_node: bool = False) -> Groups | None:
    """The groups of a job; None with one node, or with one rank on each.

    Args:
        nodes: of each rank, in rank order: anything that is equal for ranks of one node.
        one_node: whether several ranks on a single node are groups, too, because they send to
            somebody outside.

    Example:
        >>> groups_of(["a", "a", "b", "b"])
        Groups(nodes=[[0, 1], [2, 3]], cross=[[0, 2], [1, 3]])
        >>> groups_of(["a", "a", "b"])
        Groups(nodes=[[0, 1], [2]], cross=[[0, 2]])
    """
    by_node: dict[object, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    ranks = list(by_node.values())
    sizes = {len(group) for group in ranks}
    if (len(ranks) == 1 and not one_node) or sizes == {1}:
        return None
    slices = max(sizes) if len(sizes) == 1 else 1
    return Groups(ranks, [[group[place] for group in ranks] for place in range(slices)])


class Place(NamedTuple):
    """Where Horovod says that a rank is."""

    local_rank: int
    local_size: int
    cross_rank: int


def nodes_of(places: Sequence[Place]) -> list[int]:
    """A number of each rank's node, in rank order.

    Equal nodes are numbered by Horovod. It does not number unequal ones; these are counted, which
    needs each node's ranks in a row.

    Raises:
        UnsupportedError: nodes are unequal, and their ranks are not in a row.

    Example:
        >>> nodes_of([Place(0, 2, 0), Place(0, 2, 1), Place(1, 2, 0), Place(1, 2, 1)])
        [0, 1, 0, 1]
        >>> nodes_of([Place(0, 1, 0), Place(0, 2, 1), Place(1, 2, 0)])
        [0, 1, 1]
    """
    if len({place.local_size for place in places}) == 1:
        return [place.cross_rank for place in places]
    nodes: list[int] = []
    while len(nodes) < len(places):
        start, size = len(nodes), places[len(nodes)].local_size
        expected = [(i, size) for i in range(size)]
        if [(p.local_rank, p.local_size) for p in places[start : start + size]] != expected:
            raise UnsupportedError(
                f"got exchange='hierarchical' with rank {start} as local rank "
                f"{places[start].local_rank} of {size} on nodes with different numbers of ranks, "
                "expected the ranks of each node in a row; place them by slot (horovodrun does), "
                "or start equally many ranks on each node"
            )
        nodes += [start] * size
    return nodes
