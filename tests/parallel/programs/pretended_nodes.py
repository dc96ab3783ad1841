"""Nodes of equally many ranks for Horovod over MPI, which sees one machine here."""

from __future__ import annotations


def pretend(hvd, per_node):
    """Let a framework's Horovod say that ranks are in a row on nodes of `per_node`."""
    hvd.local_rank = lambda: hvd.rank() % per_node
    hvd.local_size = lambda: per_node
    hvd.cross_rank = lambda: hvd.rank() // per_node
    hvd.cross_size = lambda: hvd.size() // per_node
