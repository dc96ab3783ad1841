"""A cluster of virtual hosts on one machine, with networks of any slower rate.

    launch/cluster --hosts 2 --rate 100mbit -- horovodrun -np 2 -H node1:1,node2:1 python train.py

A host is a set of Linux namespaces with an interface `eth0`. Token buckets limit its traffic in and
out. `docs/cluster.md` explains how it works. It needs root.
"""


class ClusterError(RuntimeError):
    """A virtual cluster cannot be created here; the message says what is missing."""
